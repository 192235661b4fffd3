"""A network of your own made smaller, step by step: pruned, fine-tuned, quantised, exported; measured at each step."""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

import pomona as pm
from pomona.edit import fold_batch_norms, take
from pomona.edit.quantize import quantize, to_integer
from pomona.nets.cost import latency
from pomona.train import Budget, Training, evaluate, fit


class Mine(nn.Module):
    """Any module will do: nothing here knows Pomona."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(2 * width * 49, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x):
        return self.head(self.body(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--epochs", type=float, default=4)
    chosen = parser.parse_args()
    task = pm.load("fashion_mnist", limit=chosen.images)
    settings = Training(optimizer="adam", patience=None)

    def train(net: nn.Module, epochs: float) -> nn.Module:
        return fit(net, task, settings, budget=Budget("epochs", epochs)).net

    def row(name: str, net: nn.Module) -> None:
        size = len(save({k: v.contiguous() for k, v in net.state_dict().items()})) / 1024
        one, many = latency(net, task.splits["test"].x[:1]), latency(net, task.splits["test"].x[:64])
        accuracy = evaluate(net, task, "test")["accuracy"]
        print(f"| {name} | {size:.0f} KiB | {one * 1e3:.2f} ms | {many * 1e3:.1f} ms | {accuracy:.1%} |", flush=True)

    print("| step | size | one image | 64 images | test accuracy |\n|---|---|---|---|---|")
    torch.manual_seed(0)
    net = train(Mine(), chosen.epochs)
    row("trained", net)

    axes = pm.trace.axes(net, task.example)
    assert axes.check(), "every axis was permuted in float64, and the outputs stayed"
    small = take(net, axes, keep=0.5).net
    row("half of every axis cut", small)
    small = train(small, chosen.epochs / 2)
    row("fine-tuned", small)

    folded = fold_batch_norms(small, task.example).net
    row("batch norms folded", folded)
    integer = to_integer(quantize(folded, task.splits["train"].x[:512]))
    row("quantised to 8 bits", integer)

    start = time.perf_counter()
    program = torch.export.export(folded, (task.example.clone(),))
    path = Path(tempfile.mkdtemp()) / "small.pt2"
    torch.export.save(program, path)
    print(f"exported in {time.perf_counter() - start:.1f} s to a file of {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
