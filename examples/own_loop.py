"""Two layers in your own network and your own loop: nothing else of Pomona is needed."""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from pomona.nn import GatedPool2d, KANLayer


def main(epochs: int = 15) -> float:
    """Train a small network on the digits; returns its accuracy on test."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.25, random_state=0)

    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        GatedPool2d(2),  # (B, 16, 8, 8) -> (B, 16, 4, 4), between maximum and average as the region asks
        nn.Flatten(),
        KANLayer(256, 10, grid=3),  # a learned function on each of its 2,560 edges
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for epoch in range(epochs):
        net.train()
        for index in torch.randperm(len(train_x)).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(train_x[index]), train_y[index])
            loss.backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            accuracy = float((net(test_x).argmax(1) == test_y).float().mean())
        print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}  test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
