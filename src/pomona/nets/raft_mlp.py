"""RaftMLP: a pyramid of raft token mixing and channel MLPs for images of any size (arXiv 2108.04384)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.feedforward import FeedForward
from pomona.nn.mixing import Branch
from pomona.nn.raft_mlp import MultiScalePatchEmbedding, OriginalMixer, RaftTokenMixer

KERNELS = ((4, 8), (2, 4), (2, 4), (2,))


def _levels(*dims: int) -> list[dict[str, Any]]:
    return [
        {"dim": dim, "depth": depth, "patch": kernels[0], "kernels": kernels, "raft": 2}
        for dim, depth, kernels in zip(dims, (2, 2, 6, 2), KERNELS, strict=True)
    ]


SIZES = {"S": _levels(64, 128, 256, 512), "M": _levels(96, 192, 384, 768), "L": _levels(128, 192, 512, 1024)}
"""Levels of the paper's networks, for images of side 224."""


class RaftBlock(nn.Module):
    """y = mixer(x),  z = y + FFN(LN y), the mixer adding the tokens themselves.

    Shape:
        (B, H, W, C) -> (B, H, W, C)
    """

    def __init__(self, mixer: nn.Module, dim: int, expansion: float, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.mixer, self.norm = mixer, nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, max(1, round(expansion * dim)), dropout=dropout)
        self.branch = Branch(dim, drop=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        grid = (x.shape[1], x.shape[2])
        x = self.mixer(x.flatten(1, 2), grid=grid)
        return (x + self.branch(self.ffn(self.norm(x)))).unflatten(1, grid)


class RaftMLP(nn.Module):
    """Levels of patch embedding and mixer blocks; the pooled last level, scaled and shifted by those before, is read.

    With p_l = mean LN(x_l), and (a_l, b_l) = W_l p_l for all but the last level L:
    f = a_1 * (... (a_{L-1} * p_L + b_{L-1}) ...) + b_1, classes = head(f).

    Args:
        levels: for each level ``dim`` and ``depth``; ``patch`` (2), ``raft`` (2) and ``kernels`` of the embedding
            ((patch,)).
        channels: of the image.
        classes: outputs.
        image: side or (height, width) that the token mixers are made for; others are interpolated.
        mixer: raft, or original (MLP-Mixer's, over all tokens).
        shortcut: the levels before the last are read; otherwise the last alone.
        token_expansion: hidden width of the token MLPs, in inputs.
        channel_expansion: hidden width of the channel MLPs, in channels.
        dropout: probability after the activations.
        drop_path: probability of leaving a step out for an example.

    Shape:
        (B, channels, H, W) -> (B, classes)

    Raises:
        PomonaError: for no levels, a level without its sizes, or an unknown mixer.

    Source: RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality?, arXiv 2108.04384.
    """

    def __init__(
        self,
        levels: Sequence[Mapping[str, Any]],
        channels: int = 3,
        classes: int = 1000,
        image: int | tuple[int, int] = 224,
        *,
        mixer: Literal["raft", "original"] = "raft",
        shortcut: bool = True,
        token_expansion: float = 2.0,
        channel_expansion: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, classes=classes)
        if not levels:
            raise PomonaError("levels is empty; give at least one, such as {'dim': 64, 'depth': 2, 'patch': 4}")
        if mixer not in ("raft", "original"):
            raise unknown("mixer", mixer, ["raft", "original"])
        sides = (image, image) if isinstance(image, int) else image
        last = _read(levels[-1], "dim")
        self.levels, self.norms, self.modulations = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for index, level in enumerate(levels):
            dim, patch = _read(level, "dim"), level.get("patch", 2)
            kernels = tuple(level.get("kernels", (patch,)))
            if min(kernels) != patch:
                raise PomonaError(f"kernels={kernels} must have patch={patch} as their smallest")
            sides = (-(-sides[0] // patch), -(-sides[1] // patch))
            common: dict[str, Any] = {"expansion": token_expansion, "dropout": dropout, "drop_path": drop_path}
            blocks = []
            for _ in range(_read(level, "depth")):
                if mixer == "raft":
                    mix: nn.Module = RaftTokenMixer(*sides, dim, raft=level.get("raft", 2), **common)
                else:
                    mix = OriginalMixer(*sides, dim, **common)
                blocks.append(RaftBlock(mix, dim, channel_expansion, dropout, drop_path))
            self.levels.append(nn.Sequential(MultiScalePatchEmbedding(channels, dim, kernels), *blocks))
            at_end = index == len(levels) - 1
            if shortcut or at_end:
                self.norms.append(nn.LayerNorm(dim))
            if shortcut and not at_end:
                self.modulations.append(nn.Linear(dim, 2 * last))
            channels = dim
        self.head = nn.Linear(last, classes)

    @classmethod
    def sized(cls, name: str, *, image: int = 224, channels: int = 3, classes: int = 1000, **options: Any) -> Self:
        """One of the paper's networks by name: S, M or L, whose published sizes are those without ``shortcut``."""
        if name not in SIZES:
            raise unknown("name", name, SIZES)
        return cls(SIZES[name], channels, classes, image, **{"shortcut": False, **options})

    def features(self, x: Tensor) -> Tensor:
        """What the head receives: (B, dim of the last level)."""
        maps = []
        for level in self.levels:
            maps.append(level(x))
            x = maps[-1].movedim(-1, 1)
        pooled = [norm(y).mean((1, 2)) for norm, y in zip(self.norms, maps[-len(self.norms) :], strict=True)]
        f = pooled[-1]
        for modulation, p in zip(reversed(list(self.modulations)), reversed(pooled[:-1]), strict=True):
            scale, shift = modulation(p).chunk(2, -1)
            f = scale * f + shift
        return f

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.head(self.features(x))


def _read(level: Mapping[str, Any], field: str) -> int:
    if field not in level:
        raise PomonaError(f"a level has no {field!r}; it says {dict(level)}")
    check_positive(**{field: level[field]})
    return level[field]
