"""A gated recurrent network over rows of an image or chunks of a series or table; AdamW at a tenth of ``lr``."""

import torch
from torch import nn


def supported_hyperparameters():
    """What is read from ``prm``."""
    return {"lr", "weight_decay", "width"}


def tokens(x, size=8):
    """Rows of an image, steps of a series or chunks of a table as tokens (batch, tokens, features)."""
    if x.ndim == 4:
        return x.transpose(1, 2).flatten(2)
    if x.ndim == 3:
        x = x.flatten(1)
    x = nn.functional.pad(x, (0, -x.shape[-1] % size))
    return x.unflatten(-1, (-1, size))


class Net(nn.Module):
    """The last state of a GRU, read out."""

    def __init__(self, in_shape, out_shape, prm, device):
        super().__init__()
        features = tokens(torch.zeros(1, *in_shape)).shape[-1]
        self.recurrent = nn.GRU(features, prm["width"], batch_first=True)
        self.readout = nn.Linear(prm["width"], out_shape[0])
        self.to(device)

    def forward(self, x):
        states, _ = self.recurrent(tokens(x))
        return self.readout(states[:, -1])

    def train_setup(self, prm):
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=0.1 * prm["lr"], weight_decay=prm["weight_decay"])

    def learn(self, train_data):
        for x, y in train_data:
            output = self(x)
            if y.is_floating_point():
                loss = nn.functional.mse_loss(output, y)
            else:
                loss = nn.functional.cross_entropy(output, y)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            self.optimizer.step()
