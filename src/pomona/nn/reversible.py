"""Additive coupling: layers whose input follows from their output, so that training need not store activations.

Source: i-RevNet: Deep Invertible Networks, arXiv 1802.07088; The Reversible Residual Network, arXiv 1707.04585.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.checkpoint import get_device_states, set_device_states

from pomona.errors import PomonaError, check_divisible, check_positive
from pomona.nn.check import check_input

Pair = tuple[Tensor, Tensor]


def squeeze(x: Tensor, k: int) -> Tensor:
    """Space to depth: (B, C, *sides) -> (B, C k^axes, *sides / k), a permutation of the entries."""
    axes = x.dim() - 2
    for side in x.shape[2:]:
        check_divisible("side", side, "k", k)
    cut = x.reshape(*x.shape[:2], *(n for side in x.shape[2:] for n in (side // k, k)))
    return cut.permute(0, 1, *range(3, 3 + 2 * axes, 2), *range(2, 2 + 2 * axes, 2)).flatten(1, 1 + axes)


def unsqueeze(x: Tensor, k: int) -> Tensor:
    """The inverse of `squeeze`: (B, C, *sides) -> (B, C / k^axes, *sides k)."""
    axes = x.dim() - 2
    check_divisible("channels", x.shape[1], f"k^{axes}", k**axes)
    cut = x.reshape(len(x), x.shape[1] // k**axes, *(k,) * axes, *x.shape[2:])
    order = [axis for i in range(axes) for axis in (2 + axes + i, 2 + i)]
    return cut.permute(0, 1, *order).reshape(
        len(x), -1 if x.numel() else cut.shape[1], *(k * side for side in x.shape[2:])
    )


class RevBlock(nn.Module):
    """y_1 = S(x_2), y_2 = S(x_1) + F(x_2);  inverse x_2 = S^-1(y_1), x_1 = S^-1(y_2 - F(x_2)).

    Args:
        function: F, any module that gives x_2 the shape of S(x_1).
        stride: S is `squeeze` by it; 1 leaves the tensors as they are, which may then have any shape.

    Shape:
        two tensors -> two tensors

    Source: i-RevNet: Deep Invertible Networks, arXiv 1802.07088.
    """

    def __init__(self, function: nn.Module, stride: int = 1) -> None:
        super().__init__()
        check_positive(stride=stride)
        self.function, self.stride = function, stride

    def down(self, x: Tensor) -> Tensor:
        """S."""
        return x if self.stride == 1 else squeeze(x, self.stride)

    def up(self, x: Tensor) -> Tensor:
        """S^-1, which is S transposed too."""
        return x if self.stride == 1 else unsqueeze(x, self.stride)

    def forward(self, x1: Tensor, x2: Tensor) -> Pair:
        """See the class."""
        check_input(self, x1)
        check_input(self, x2)
        return self.down(x2), self.down(x1) + self.function(x2)

    def inverse(self, y1: Tensor, y2: Tensor) -> Pair:
        """The input of an output."""
        x2 = self.up(y1)
        return self.up(y2 - self.function(x2)), x2


@contextmanager
def frozen_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Batch norms in training take the batch's statistics, but their running ones stay as they are."""
    norms = [
        m
        for module in modules
        for m in module.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class _Recompute(torch.autograd.Function):
    """A chain of blocks that stores its output alone; backward inverts block by block."""

    @staticmethod
    def forward(ctx: Any, blocks: Sequence[RevBlock], x1: Tensor, x2: Tensor, *parameters: Tensor) -> Pair:
        kind = x1.device.type
        ctx.autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
        }
        ctx.blocks, ctx.random = blocks, []
        for block in blocks:  # dropout must draw the same again
            ctx.random.append((torch.get_rng_state(), get_device_states(x1, x2)))
            x1, x2 = block(x1, x2)
        ctx.save_for_backward(x1, x2, *parameters)
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy1: Tensor, dy2: Tensor) -> tuple[Any, ...]:
        y1, y2, *rest = ctx.saved_tensors
        gradients: list[Tensor | None] = []
        for block, (state, device_states) in zip(reversed(ctx.blocks), reversed(ctx.random), strict=True):
            names = [name for name, _ in block.function.named_parameters()]
            own = dict(zip(names, rest[len(rest) - len(names) :], strict=True))
            rest = rest[: len(rest) - len(names)]
            x2 = block.up(y1).detach().requires_grad_()
            with (
                torch.enable_grad(),
                frozen_statistics([block]),
                torch.random.fork_rng(devices=device_states[0]),
                torch.autocast(**ctx.autocast),
            ):
                torch.set_rng_state(state)
                set_device_states(*device_states)
                value = functional_call(block.function, own, (x2,))
            wanted = [x2, *(p for p in own.values() if p.requires_grad)]
            found = iter(torch.autograd.grad(value, wanted, dy2, allow_unused=True))
            through = next(found)
            gradients = [next(found) if p.requires_grad else None for p in own.values()] + gradients
            y1, y2 = block.up(y2 - value.detach()), x2.detach()
            dy1, dy2 = block.up(dy2), block.up(dy1) if through is None else block.up(dy1) + through
        return None, dy1, dy2, *gradients


class RevSequential(nn.Module):
    """Blocks of additive coupling in a chain, and its inverse.

    Args:
        functions: F of each block, or ready `RevBlock`s.
        reversible: in training, store the chain's output only and recompute the rest backward: memory that does not
            grow with depth, for one more evaluation of every F. Batch norms recompute with the batch's statistics and
            move their running ones once; dropout draws the same again.

    Shape:
        two tensors -> two tensors

    Raises:
        PomonaError: for inputs that are no pair of floating-point tensors.

    Source: The Reversible Residual Network: Backpropagation Without Storing Activations, arXiv 1707.04585.
    """

    def __init__(self, functions: Iterable[nn.Module], *, reversible: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(f if isinstance(f, RevBlock) else RevBlock(f) for f in functions)
        self.reversible = reversible
        if not len(self.blocks):
            raise PomonaError("functions=() must hold at least one module")

    def forward(self, x1: Tensor, x2: Tensor) -> Pair:
        """See the class."""
        check_input(self, x1)
        check_input(self, x2)
        if self.reversible and torch.is_grad_enabled():
            parameters = [p for block in self.blocks for _, p in block.function.named_parameters()]  # type: ignore[union-attr]
            return _Recompute.apply(tuple(self.blocks), x1, x2, *parameters)
        for block in self.blocks:
            x1, x2 = block(x1, x2)
        return x1, x2

    def states(self, x1: Tensor, x2: Tensor) -> list[Pair]:
        """The input, then the output of every block."""
        states = [(x1, x2)]
        for block in self.blocks:
            states.append(block(*states[-1]))
        return states

    def inverse(self, y1: Tensor, y2: Tensor) -> Pair:
        """The input of an output, if F is the same function both ways: with batch norms in evaluation mode."""
        for block in reversed(list(self.blocks)):
            y1, y2 = block.inverse(y1, y2)  # type: ignore[operator]
        return y1, y2

    def extra_repr(self) -> str:
        """Whether activations are stored."""
        return f"reversible={self.reversible}"
