"""Who chooses the next transformation of a network: a learned policy, chance, or one small step at a time.

Source: Efficient Architecture Search by Network Transformation (arXiv 1707.04873).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive

Step = Literal["wider", "deeper"]
T = TypeVar("T")
KINDS = ("conv", "linear", "pool")
KERNELS = (1, 3, 5)
"""Of a new convolution."""
BUCKETS = 32
"""Of widths and kernels in the policy's embeddings."""


@dataclass(frozen=True)
class Layer:
    """A layer as a controller sees it.

    Attributes:
        name: of the submodule.
        kind: ``conv``, ``linear`` or ``pool``.
        kernel: its size; 1 for a linear layer.
        width: channels or units that it gives.
        block: number of the run of layers of equal resolution that it lies in.
        axis: of its units, where they can be copied.
        wider: the next width; ``None`` where it is not to grow.
        at: the submodule that a new layer and a ReLU can follow without effect; ``None`` where none can.
        after: the norm or activation that follows the layer, or the layer itself.
        first: whether the new layer or its activation comes first there.
        batch_norm: whether a batch norm follows the layer.
    """

    name: str
    kind: str
    kernel: int
    width: int
    block: int
    axis: str | None = None
    wider: int | None = None
    at: str | None = None
    after: str = ""
    first: Literal["layer", "activation"] = "layer"
    batch_norm: bool = False


class Controller(Protocol):
    """What :class:`pomona.edit.eas.EAS` asks of one; any object with these methods will do."""

    def episode(self, wider: int, deeper: int) -> list[Step]:
        """Begin a new network: its steps, of the so many that are allowed of each kind."""
        ...

    def wider(self, layers: Sequence[Layer]) -> list[bool]:
        """Whether to widen each layer; said of one that cannot grow, it is ignored."""
        ...

    def deeper(self, layers: Sequence[Layer]) -> tuple[Layer, int]:
        """After which of the layers with an ``at`` to insert one, and with which kernel."""
        ...

    def update(self, rewards: Sequence[float]) -> None:
        """Learn from the rewards of the episodes since the last update, in their order."""
        ...


class RandomController:
    """Every choice by a fair coin or die, whatever the rewards."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def episode(self, wider: int, deeper: int) -> list[Step]:
        """All the steps, wider ones first."""
        return [*["wider"] * wider, *["deeper"] * deeper]  # type: ignore[list-item]

    def wider(self, layers: Sequence[Layer]) -> list[bool]:
        """A coin for each layer."""
        return (torch.rand(len(layers), generator=self.generator) < 0.5).tolist()

    def deeper(self, layers: Sequence[Layer]) -> tuple[Layer, int]:
        """A block, then a layer of it, then a kernel."""
        places = [layer for layer in layers if layer.at is not None]
        block = self._any(sorted({layer.block for layer in places}))
        return self._any([layer for layer in places if layer.block == block]), self._any(KERNELS)

    def update(self, rewards: Sequence[float]) -> None:
        """Nothing."""

    def _any(self, choices: Sequence[T]) -> T:
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]


class HillClimbController(RandomController):
    """One random change a network, one layer wider or one deeper: with the best network kept, a hill climb.

    Source: Simple and Efficient Architecture Search for Convolutional Neural Networks (arXiv 1711.04528).
    """

    def episode(self, wider: int, deeper: int) -> list[Step]:
        """One step, wider and deeper as often as they are allowed."""
        return [self._any(super().episode(wider, deeper))]

    def wider(self, layers: Sequence[Layer]) -> list[bool]:
        """One of the layers that can grow."""
        chosen = self._any([i for i, layer in enumerate(layers) if layer.wider is not None])
        return [i == chosen for i in range(len(layers))]


class RLController(nn.Module):
    r"""A recurrent policy over the layers of the network at hand, taught by REINFORCE.

    .. math:: \nabla J \approx \frac1m \sum_k \sum_t (R_k - b)\, \nabla \log \pi(a_{k,t} \mid s_{k,t}), \qquad
              b \leftarrow \beta b + (1 - \beta) R_k

    A bidirectional LSTM reads the layers. On its state at each, one shared sigmoid decides whether to widen it. From
    its last states a second LSTM decides in turn on the block, the layer of it, and the kernel of a new layer.

    Args:
        hidden: units of the encoder, each way.
        embedding: of a layer, the sum of those of its kind, kernel and width.
        blocks: at most so many can be told apart.
        positions: likewise within a block.
        lr: of Adam.
        decay: beta of the rewards' moving average.
        seed: of the initial weights and of the draws.
    """

    def __init__(
        self,
        hidden: int = 50,
        embedding: int = 16,
        blocks: int = 8,
        positions: int = 32,
        lr: float = 1e-3,
        decay: float = 0.95,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(hidden=hidden, embedding=embedding, blocks=blocks, positions=positions, lr=lr)
        if not 0 <= decay < 1:
            raise PomonaError(f"decay={decay} must lie in [0, 1)")
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.tables = nn.ModuleList(nn.Embedding(n, embedding) for n in (len(KINDS), BUCKETS, BUCKETS))
            self.encoder = nn.LSTM(embedding, hidden, bidirectional=True)
            self.widen = nn.Linear(2 * hidden, 1)
            self.decoder = nn.LSTMCell(embedding, 2 * hidden)
            sizes = (blocks, positions, len(KERNELS))
            self.heads = nn.ModuleList(nn.Linear(2 * hidden, size) for size in sizes)
            self.past = nn.ModuleList(nn.Embedding(size, embedding) for size in sizes[:-1])
        self.optimizer = torch.optim.Adam(self.parameters(), lr)
        self.decay = decay
        self.baseline: float | None = None
        self.log_probs: list[list[Tensor]] = []
        """Of the choices of each episode since the last update."""

    def episode(self, wider: int, deeper: int) -> list[Step]:
        """All the steps, wider ones first."""
        self.log_probs.append([])
        return [*["wider"] * wider, *["deeper"] * deeper]  # type: ignore[list-item]

    def encode(self, layers: Sequence[Layer]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The state at each layer (layers, 2 hidden), and the last hidden and cell state of both ways (2 hidden,)."""
        tokens = [
            [KINDS.index(one.kind), min(one.kernel, BUCKETS - 1), min(round(2 * math.log2(one.width)), BUCKETS - 1)]
            for one in layers
        ]
        columns = torch.tensor(tokens).T
        states, (h, c) = self.encoder(sum(table(column) for table, column in zip(self.tables, columns, strict=True)))
        return states, (h.flatten(), c.flatten())

    def wider(self, layers: Sequence[Layer]) -> list[bool]:
        """A draw from the sigmoid of each layer."""
        logits = self.widen(self.encode(layers)[0])[:, 0]
        drawn = torch.bernoulli(logits.detach().sigmoid(), generator=self.generator)
        able = torch.tensor([layer.wider is not None for layer in layers])
        # choices without effect do not depend on the policy
        self._record(-nn.functional.binary_cross_entropy_with_logits(logits, drawn, reduction="none")[able].sum())
        return drawn.bool().tolist()

    def deeper(self, layers: Sequence[Layer]) -> tuple[Layer, int]:
        """A draw of the block, of the layer of it, and of the kernel unless the layer is linear."""
        state = self.encode(layers)[1]
        token = torch.zeros(self.decoder.input_size)
        last = [int(head.out_features) - 1 for head in self.heads]  # type: ignore[arg-type]
        places = [layer for layer in layers if layer.at is not None]
        state, block = self._draw(0, token, state, {min(layer.block, last[0]) for layer in places})
        inside = [layer for layer in places if min(layer.block, last[0]) == block]
        state, index = self._draw(1, self.past[0].weight[block], state, range(min(len(inside), last[1] + 1)))  # type: ignore[index]
        if inside[index].kind == "linear":
            return inside[index], 1
        _, kernel = self._draw(2, self.past[1].weight[index], state, range(len(KERNELS)))  # type: ignore[index]
        return inside[index], KERNELS[kernel]

    def _draw(
        self, head: int, token: Tensor, state: tuple[Tensor, Tensor], allowed: set[int] | range
    ) -> tuple[tuple[Tensor, Tensor], int]:
        """One step of the decoder: its new state, and the choice."""
        state = self.decoder(token, state)
        logits = self.heads[head](state[0])
        shut = torch.ones_like(logits, dtype=torch.bool)
        shut[list(allowed)] = False
        log_probs = logits.masked_fill(shut, -math.inf).log_softmax(-1)
        chosen = int(torch.multinomial(log_probs.detach().exp(), 1, generator=self.generator))
        self._record(log_probs[chosen])
        return state, chosen

    def _record(self, log_prob: Tensor) -> None:
        if self.log_probs:
            self.log_probs[-1].append(log_prob)

    def update(self, rewards: Sequence[float]) -> None:
        """One step of Adam on the episodes since the last.

        Raises:
            PomonaError: not one finite reward for each episode.
        """
        if len(rewards) != len(self.log_probs) or not all(map(math.isfinite, rewards)):
            raise PomonaError(f"rewards={list(rewards)} must be {len(self.log_probs)} finite numbers, one an episode")
        baseline = sum(rewards) / len(rewards) if self.baseline is None else self.baseline
        terms = [sum(t, torch.zeros(())) * (baseline - r) for t, r in zip(self.log_probs, rewards, strict=True)]
        loss = torch.stack(terms).mean()  # type: ignore[arg-type]
        self.optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
            self.optimizer.step()
        for reward in rewards:
            baseline = self.decay * baseline + (1 - self.decay) * reward
        self.baseline, self.log_probs = baseline, []
