"""MiniBench: small tabular search spaces in which every architecture has been trained, three seeds each.

A table is a JSON file beside this module, written by ``bench/minibench.py``.  An architecture is a dictionary
``variable -> option``; its row holds validation and test accuracies (one a seed), parameters and FLOPs.  Search on
``valid``, report ``test``.

The idea of a tabular benchmark is that of "NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture
Search" (arXiv 2001.00326); the spaces here are small enough to be trained again on one core in minutes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.errors import PomonaError, unknown
from pomona.search.mini_nets import CELL, MLP, arch_key, build_net, enumerate_archs
from pomona.search.strategies import Variables


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
        cls,
        x: Tensor,
        y: Tensor,
        x_test: Tensor,
        y_test: Tensor,
        *,
        n_train: int,
        n_valid: int,
        n_test: int,
        seed: int = 0,
    ) -> Images:
        """Disjoint random training and validation images from ``x``, and the first ``n_test`` test images."""
        if n_train + n_valid > len(x):
            raise PomonaError(f"n_train={n_train} plus n_valid={n_valid} is more than the {len(x)} images given")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        train, valid = order[:n_train], order[n_train : n_train + n_valid]
        mean, std = x[train].mean(), x[train].std()
        x, x_test = (x - mean) / std, (x_test[:n_test] - mean) / std
        return cls(x[train], y[train], x[valid], y[valid], x_test, y_test[:n_test])


def fashion_images(
    data_dir: Path | None = None, *, n_train: int = 4000, n_valid: int = 2000, n_test: int = 4000
) -> Images:
    """Fashion-MNIST averaged to 14x14, in the split of the tables.

    Args:
        data_dir: folder of the idx files (default: where Debian's package puts them).
        n_train: training images.
        n_valid: validation images.
        n_test: test images.
    """
    from pomona.data.builtin import FASHION_MNIST_FOLDER, open_builtin, read_idx

    folder = data_dir or FASHION_MNIST_FOLDER
    if not (folder / "train-labels-idx1-ubyte.gz").is_file():
        open_builtin("fashion_mnist", data_dir)  # says what is missing

    def part(name: str) -> Tensor:
        return torch.from_numpy(read_idx(folder / f"{name}.gz").copy())

    x, x_test = (F.avg_pool2d(part(f"{p}-images-idx3-ubyte")[:, None].float() / 255, 2) for p in ("train", "t10k"))
    y, y_test = (part(f"{p}-labels-idx1-ubyte").long() for p in ("train", "t10k"))
    return Images.split(x, y, x_test, y_test, n_train=n_train, n_valid=n_valid, n_test=n_test)


def digit_images(*, n_train: int = 900) -> Images:
    """scikit-learn's 8x8 digits, in the split of the tables: 900, 397 and 500 images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return Images.split(x[500:], y[500:], x[:500], y[:500], n_train=n_train, n_valid=397, n_test=500)


@dataclass(frozen=True)
class Protocol:
    """How every architecture is trained: AdamW with cosine decay to zero, and the tricks that are switched on.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step.
        lr: first learning rate.
        weight_decay: of AdamW.
        build: size options of the network.
        cutout: side of the square set to zero in every training image.
        shift: largest random shift in pixels; with it, half of the images are mirrored.
        drop_path: probability that an example loses an edge (``mini-cell``).
        auxiliary: weight of the auxiliary head's loss (``mini-cell``).
    """

    epochs: int = 4
    batch_size: int = 50
    lr: float = 1e-2
    weight_decay: float = 1e-3
    build: dict[str, int] = field(default_factory=dict)
    cutout: int = 0
    shift: int = 0
    drop_path: float = 0.0
    auxiliary: float = 0.0

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``build_net``."""
        extra = {"drop_path": self.drop_path, "auxiliary": self.auxiliary > 0}
        return {**self.build, **{name: value for name, value in extra.items() if value}}


TABLES: dict[str, tuple[Variables, str, Protocol]] = {
    "mini-cell": (CELL, "fashion", Protocol()),
    "mini-cell-digits": (CELL, "digits", Protocol(epochs=8)),
    "mini-mlp": (MLP, "fashion", Protocol(epochs=6, lr=3e-3)),
}
"""Name -> space, images and training of the committed tables."""
SOURCES = {"fashion": fashion_images, "digits": digit_images}


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor, *, copies: int = 1, chunk: int = 1000) -> list[float]:
    """Percentage right of each copy, in evaluation mode."""
    net.eval()
    logits = torch.cat([net(part.repeat(1, copies, 1, 1)) for part in x.split(chunk)]).reshape(len(x), copies, -1)
    return (100.0 * (logits.argmax(-1) == y[:, None]).double().mean(0)).tolist()


def augment(x: Tensor, protocol: Protocol, generator: torch.Generator) -> Tensor:
    """Random shift, mirroring and cutout of images ``(n, channels, height, width)``, each image its own."""
    n, _, height, width = x.shape

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=generator)

    if protocol.shift:
        size = protocol.shift
        padded = F.pad(x, (size,) * 4, value=float(x.min()))
        rows, columns = draw(2 * size + 1) + torch.arange(height), draw(2 * size + 1) + torch.arange(width)
        columns = torch.where(draw(2) == 1, columns.flip(1), columns)
        at = torch.arange(n)[:, None, None]
        x = padded.transpose(0, 1)[:, at, rows[:, :, None], columns[:, None, :]].transpose(0, 1)
    if protocol.cutout:
        half = protocol.cutout / 2
        inside = [(torch.arange(length) + 0.5 - draw(length)).abs() < half for length in (height, width)]
        x = x * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
    return x


def train_arch(
    space: str, arch: Mapping[str, Any], images: Images, protocol: Protocol, *, seeds: Sequence[int] = (0, 1, 2)
) -> dict[str, list[float]]:
    """Train one architecture once a seed, all seeds together, and return validation and test accuracies in percent.

    Each seed has its own initial weights and order of the images.  (Initial weights of copies come from one
    stream, so the result of a seed depends on which seeds run with it.)
    """
    copies, n = len(seeds), len(images.x_train)
    stream = sum(seed * 1009**i for i, seed in enumerate(seeds))
    net = build_net(space, arch, copies=copies, seed=stream, **protocol.options())
    steps = protocol.epochs * (n // protocol.batch_size)
    optimiser = torch.optim.AdamW(net.parameters(), lr=protocol.lr, weight_decay=protocol.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.Generator().manual_seed(stream)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        # summed over copies: the gradient of each is that of its own mean loss
        return copies * F.cross_entropy(logits.reshape(y.numel(), -1), y.flatten())

    net.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream)  # of DropPath
        for _ in range(protocol.epochs):
            order = torch.stack([torch.randperm(n, generator=generator) for generator in orders], dim=1)
            for batch in order.split(protocol.batch_size)[: n // protocol.batch_size]:
                x = augment(images.x_train[batch].flatten(0, 1), protocol, noise)
                x, y = x.unflatten(0, batch.shape).flatten(1, 2), images.y_train[batch]
                if protocol.auxiliary:
                    main, second = net.both_heads(x)  # type: ignore[operator]
                    value = loss(main, y) + protocol.auxiliary * loss(second, y)
                else:
                    value = loss(net(x), y)
                optimiser.zero_grad(set_to_none=True)
                value.backward()
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
            raise PomonaError(
                f"name={name!r} has no row for {len(missing)} of its architectures; run bench/minibench.py"
            )

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

    def images(self) -> Images:
        """The images the table was trained on."""
        return SOURCES[self.table["data"]["name"]]()
