"""MiniBench: small tabular search spaces in which every architecture has been trained, three seeds each.

A table is a JSON file beside this module, written by ``bench/minibench.py``.  An architecture is a dictionary
``variable -> option``; its row holds validation and test accuracies (one a seed), parameters and FLOPs.  Search on
``valid``, report ``test``.

The idea of a tabular benchmark is that of "NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture
Search" (arXiv 2001.00326); the spaces here are small enough to be trained again on one core in minutes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.errors import PomonaError, check_positive, unknown

Arch = dict[str, Any]
Variables = Mapping[str, tuple[Any, ...]]

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

    def __init__(self, arch: Mapping[str, str], channels: int, *, copies: int = 1) -> None:
        super().__init__()
        self.edge01, self.edge02, self.edge12 = (_operation(arch[edge], channels, copies) for edge in CELL)

    def forward(self, x: Tensor) -> Tensor:
        return self.edge02(x) + self.edge12(self.edge01(x))


class MiniCellNet(nn.Module):
    """Stem, ``cells`` cells, halving of the image, ``cells`` cells of twice the width, mean pooling, linear head.

    Args:
        arch: operation of each edge; all cells share it.
        channels: width of the stem.
        cells: cells in each of the two stages.
        in_channels: channels of an image.
        classes: number of logits.
        copies: independent networks held side by side as groups of channels (seeds trained together).

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
    ) -> None:
        super().__init__()
        check_positive(channels=channels, cells=cells, classes=classes, copies=copies)
        self.copies, narrow, wide = copies, copies * channels, 2 * copies * channels

        def conv(c_in: int, c_out: int, kernel: int, bias: bool = False) -> nn.Conv2d:
            return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=copies, bias=bias)

        self.stem = nn.Sequential(conv(copies * in_channels, narrow, 3), nn.BatchNorm2d(narrow))
        self.first = nn.Sequential(*(MiniCell(arch, channels, copies=copies) for _ in range(cells)))
        self.reduce = nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), conv(narrow, wide, 1), nn.BatchNorm2d(wide))
        self.second = nn.Sequential(*(MiniCell(arch, 2 * channels, copies=copies) for _ in range(cells)))
        self.norm = nn.Sequential(nn.BatchNorm2d(wide), nn.ReLU())
        self.head = conv(wide, copies * classes, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.reduce(self.first(self.stem(x))))
        logits = self.head(self.norm(h).mean((2, 3), keepdim=True)).flatten(1)
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


class Images(NamedTuple):
    """Standardised images ``(n, 1, height, width)`` and labels of the three splits."""

    x_train: Tensor
    y_train: Tensor
    x_valid: Tensor
    y_valid: Tensor
    x_test: Tensor
    y_test: Tensor

    @classmethod
    def split(
        cls, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, *, n_train: int, n_valid: int, n_test: int, seed: int = 0
    ) -> Images:
        """Disjoint random training and validation images from ``x``, and the first ``n_test`` test images."""
        if n_train + n_valid > len(x):
            raise PomonaError(f"n_train={n_train} plus n_valid={n_valid} is more than the {len(x)} images given")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        train, valid = order[:n_train], order[n_train : n_train + n_valid]
        mean, std = x[train].mean(), x[train].std()
        x, x_test = (x - mean) / std, (x_test[:n_test] - mean) / std
        return cls(x[train], y[train], x[valid], y[valid], x_test, y_test[:n_test])


@dataclass(frozen=True)
class Protocol:
    """How every architecture of a table is trained: AdamW, cosine decay to zero, no augmentation."""

    epochs: int = 4
    batch_size: int = 50
    lr: float = 1e-2
    weight_decay: float = 1e-3
    build: dict[str, int] = field(default_factory=dict)


def build_net(space: str, arch: Mapping[str, Any], *, copies: int = 1, seed: int | None = None, **kw: int) -> nn.Module:
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


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor, *, copies: int = 1, chunk: int = 1000) -> list[float]:
    """Percentage right of each copy, in evaluation mode."""
    net.eval()
    logits = torch.cat([net(part.repeat(1, copies, 1, 1)) for part in x.split(chunk)]).reshape(len(x), copies, -1)
    return (100.0 * (logits.argmax(-1) == y[:, None]).double().mean(0)).tolist()


def train_arch(
    space: str, arch: Mapping[str, Any], images: Images, protocol: Protocol, *, seeds: Sequence[int] = (0, 1, 2)
) -> dict[str, list[float]]:
    """Train one architecture once a seed, all seeds together, and return validation and test accuracies in percent.

    Each seed has its own initial weights and order of the images.  (Initial weights of copies come from one
    stream, so the result of a seed depends on which seeds run with it.)
    """
    copies, n = len(seeds), len(images.x_train)
    net = build_net(space, arch, copies=copies, seed=sum(s * 1009**i for i, s in enumerate(seeds)), **protocol.build)
    steps = protocol.epochs * (n // protocol.batch_size)
    optimiser = torch.optim.AdamW(net.parameters(), lr=protocol.lr, weight_decay=protocol.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    net.train()
    for _ in range(protocol.epochs):
        order = torch.stack([torch.randperm(n, generator=generator) for generator in orders], dim=1)
        for batch in order.split(protocol.batch_size)[: n // protocol.batch_size]:
            logits = net(images.x_train[batch].flatten(1, 2)).reshape(batch.numel(), -1)
            # sum over copies: the gradient of each is that of its own mean loss
            loss = copies * F.cross_entropy(logits, images.y_train[batch].flatten())
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    return {
        "valid": accuracy(net, images.x_valid, images.y_valid, copies=copies),
        "test": accuracy(net, images.x_test, images.y_test, copies=copies),
    }


def cost(space: str, arch: Mapping[str, Any], in_shape: tuple[int, ...], **kw: int) -> dict[str, int]:
    """Trainable parameters, and FLOPs (two a multiply-add) of one example."""
    from torch.utils.flop_counter import FlopCounterMode

    net = build_net(space, arch, seed=0, **kw).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, *in_shape))
    return {"params": sum(p.numel() for p in net.parameters()), "flops": int(counter.get_total_flops())}


def arch_key(arch: Mapping[str, Any]) -> str:
    """The row name of an architecture: its options in the order of the variables."""
    return "|".join(str(option) for option in arch.values())


class MiniBench:
    """A committed table of trained architectures.

    Args:
        name: ``mini-cell`` (Fashion-MNIST 14x14), ``mini-cell-digits`` (the same cells on 8x8 digits), ``mini-mlp``.
        table: the table itself instead of a committed one (for tests and for new spaces).

    Attributes:
        variables: options of each variable.
        archs: every architecture.

    Raises:
        PomonaError: for a name without a table.
    """

    def __init__(self, name: str, *, table: Mapping[str, Any] | None = None) -> None:
        if table is None:
            folder = resources.files("pomona.search")
            file = folder / f"minibench_{name}.json"
            if not file.is_file():
                known = (entry.name for entry in folder.iterdir() if entry.name.startswith("minibench_"))
                raise unknown("name", name, sorted(entry[10:-5] for entry in known))
            table = json.loads(file.read_text())
        self.name = name
        self.table: Mapping[str, Any] = table
        self.rows: Mapping[str, Mapping[str, Any]] = table["rows"]
        self.variables: Variables = {key: tuple(options) for key, options in table["variables"].items()}
        self.archs = list(enumerate_archs(self.variables))
        missing = [key for key in map(arch_key, self.archs) if key not in self.rows]
        if missing:
            raise PomonaError(f"name={name!r} has no row for {len(missing)} of its architectures; run bench/minibench.py")

    def __len__(self) -> int:
        return len(self.archs)

    def row(self, arch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row of an architecture: ``valid`` and ``test`` (one a seed), ``params``, ``flops``."""
        key = arch_key({variable: arch.get(variable) for variable in self.variables})
        if key not in self.rows:
            raise unknown("arch", key, self.rows)
        return self.rows[key]

    def score(self, arch: Mapping[str, Any], *, split: str = "test", seed: int | None = None) -> float:
        """Accuracy in percent: of one seed's training, or the mean over seeds."""
        values = self.row(arch)[split]
        return float(values[seed] if seed is not None else sum(values) / len(values))

    def scores(self, *, split: str = "test") -> Tensor:
        """All accuracies ``(architectures, seeds)`` in the order of ``archs``."""
        return torch.tensor([self.row(arch)[split] for arch in self.archs], dtype=torch.float64)

    def build(self, arch: Mapping[str, Any], *, seed: int | None = None, **kw: int) -> nn.Module:
        """The untrained network of an architecture, of the size the table used unless ``kw`` says otherwise."""
        return build_net(self.name, arch, seed=seed, **{**self.protocol.build, **kw})

    @property
    def protocol(self) -> Protocol:
        """How the table was trained."""
        return Protocol(**self.table["protocol"])


def enumerate_archs(variables: Variables) -> Iterator[Arch]:
    """Every combination of options, the last variable moving fastest."""
    for options in itertools.product(*variables.values()):
        yield dict(zip(variables, options, strict=True))
