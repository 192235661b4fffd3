"""The networks of the MiniBench spaces: a cell of three nodes with an operation an edge, and a perceptron."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.search.strategies import Arch, Variables

OPERATIONS = ("none", "skip", "conv1", "conv3", "pool")
CELL: Variables = {"edge01": OPERATIONS, "edge02": OPERATIONS, "edge12": OPERATIONS}
MLP: Variables = {
    "width": (8, 16, 32, 64),
    "depth": (1, 2, 3),
    "act": ("relu", "gelu", "tanh", "sigmoid"),
    "norm": ("none", "layer"),
}
ACTS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class Zero(nn.Module):
    """The operation ``none``: an edge that carries nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class DropPath(nn.Module):
    """Drops an edge for a random share ``p`` of the examples in training and scales the rest by ``1/(1-p)``."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(len(x), 1, 1, 1, dtype=x.dtype, device=x.device) >= self.p
        return x * keep / (1 - self.p)


def _operation(name: str, channels: int, copies: int) -> nn.Module:
    """ReLU-convolution-BatchNorm, average pooling, identity or zero on ``copies * channels`` channels."""
    if name == "none":
        return Zero()
    if name == "skip":
        return nn.Identity()
    if name == "pool":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    kernel = {"conv1": 1, "conv3": 3}[name]
    width = copies * channels
    conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=copies, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(width))


class MiniCell(nn.Module):
    """A cell of three nodes: ``node1 = e01(node0)``, ``node2 = e02(node0) + e12(node1)``; node2 is the output."""

    def __init__(self, arch: Mapping[str, str], channels: int, *, copies: int = 1, drop_path: float = 0.0) -> None:
        super().__init__()
        self.edge01, self.edge02, self.edge12 = (_operation(arch[edge], channels, copies) for edge in CELL)
        # the identity is never dropped
        self.drop01, self.drop02, self.drop12 = (DropPath(0.0 if arch[edge] == "skip" else drop_path) for edge in CELL)

    def forward(self, x: Tensor) -> Tensor:
        node1 = self.drop01(self.edge01(x))
        return self.drop02(self.edge02(x)) + self.drop12(self.edge12(node1))


class MiniCellNet(nn.Module):
    """Stem, ``cells`` cells, halving of the image, ``cells`` cells of twice the width, mean pooling, linear head.

    Args:
        arch: operation of each edge; all cells share it.
        channels: width of the stem.
        cells: cells in each of the two stages.
        in_channels: channels of an image.
        classes: number of logits.
        copies: independent networks held side by side as groups of channels (seeds trained together).
        drop_path: probability that an example loses an edge in training.
        auxiliary: a second head after the first stage, see ``both_heads``.

    Shapes: ``(batch, copies * in_channels, height, width) -> (batch, classes)``, with ``copies > 1``
    ``(batch, copies, classes)``.
    """

    def __init__(
        self,
        arch: Mapping[str, str],
        *,
        channels: int = 8,
        cells: int = 1,
        in_channels: int = 1,
        classes: int = 10,
        copies: int = 1,
        drop_path: float = 0.0,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, cells=cells, classes=classes, copies=copies)
        self.copies, narrow, wide = copies, copies * channels, 2 * copies * channels

        def conv(c_in: int, c_out: int, kernel: int, bias: bool = False) -> nn.Conv2d:
            return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=copies, bias=bias)

        self.stem = nn.Sequential(conv(copies * in_channels, narrow, 3), nn.BatchNorm2d(narrow))
        cell: dict[str, Any] = {"copies": copies, "drop_path": drop_path}
        self.first = nn.Sequential(*(MiniCell(arch, channels, **cell) for _ in range(cells)))
        self.reduce = nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), conv(narrow, wide, 1), nn.BatchNorm2d(wide))
        self.second = nn.Sequential(*(MiniCell(arch, 2 * channels, **cell) for _ in range(cells)))
        self.norm = nn.Sequential(nn.BatchNorm2d(wide), nn.ReLU())
        self.head = conv(wide, copies * classes, 1, bias=True)
        # after all else, so that the other weights do not depend on it
        self.auxiliary = conv(narrow, copies * classes, 1, bias=True) if auxiliary else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.second(self.reduce(self.first(self.stem(x)))))
        return self._logits(self.head, h)

    def both_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the head and of the auxiliary head."""
        if self.auxiliary is None:
            raise PomonaError("auxiliary=False has no second head; build the network with auxiliary=True")
        h = self.first(self.stem(x))
        out = self._logits(self.head, self.norm(self.second(self.reduce(h))))
        return out, self._logits(self.auxiliary, torch.relu(h))

    def _logits(self, head: nn.Module, h: Tensor) -> Tensor:
        logits = head(h.mean((2, 3), keepdim=True)).flatten(1)
        return logits if self.copies == 1 else logits.unflatten(1, (self.copies, -1))


class MiniMLP(nn.Module):
    """``depth`` hidden layers of ``width`` neurons (linear, [LayerNorm], activation) and a linear head.

    Shapes: ``(batch, channels, height, width) -> (batch, classes)``.
    """

    def __init__(self, arch: Mapping[str, Any], *, in_features: int = 196, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for _ in range(arch["depth"]):
            layers.append(nn.Linear(in_features, arch["width"]))
            if arch["norm"] == "layer":
                layers.append(nn.LayerNorm(arch["width"]))
            layers.append(ACTS[arch["act"]]())
            in_features = arch["width"]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(in_features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class SideBySide(nn.Module):
    """Several networks, each on its own channel of the input; outputs stacked ``(batch, copies, classes)``."""

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.nets), dim=1)
        return torch.stack([net(part) for net, part in zip(self.nets, parts, strict=True)], dim=1)


def build_net(space: str, arch: Mapping[str, Any], *, copies: int = 1, seed: int | None = None, **kw: Any) -> nn.Module:
    """The network of an architecture; ``seed`` fixes its weights without touching the global generator.

    Args:
        space: ``mini-cell`` or ``mini-mlp`` (or a table name that starts with one of them).
        arch: option of every variable.
        copies: networks side by side; the output is ``(batch, copies, classes)`` if above 1.
        seed: of the initial weights.
        kw: size options of ``MiniCellNet`` or ``MiniMLP``.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        if space.startswith("mini-cell"):
            return MiniCellNet(arch, copies=copies, **kw)
        if space.startswith("mini-mlp"):
            nets = [MiniMLP(arch, **kw) for _ in range(copies)]
            return nets[0] if copies == 1 else SideBySide(nets)
    raise unknown("space", space, ["mini-cell", "mini-mlp"])


def arch_key(arch: Mapping[str, Any]) -> str:
    """The row name of an architecture: its options in the order of the variables."""
    return "|".join(str(option) for option in arch.values())


def enumerate_archs(variables: Variables) -> Iterator[Arch]:
    """Every combination of options, the last variable moving fastest."""
    for options in itertools.product(*variables.values()):
        yield dict(zip(variables, options, strict=True))
