"""What a network costs: parameters, floating-point operations, memory, latency; and width chosen to a number of
parameters.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pomona.errors import PomonaError


def parameters(net: nn.Module) -> int:
    """Trainable numbers; shared ones count once."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


@torch.no_grad()
def flops(net: nn.Module, example: Tensor) -> int:
    """Floating-point operations of one forward pass of one example, from two rows of ``example``.

    Matrix products, convolutions and attention count two operations a multiply-add; elementwise work is not counted.
    """
    training = net.training
    net.eval()
    with FlopCounterMode(display=False) as counter:
        net(example[:2])
    net.train(training)
    return int(counter.get_total_flops() / len(example[:2]))


class _LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made under it that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in self.seen:
                    self.seen.add(storage)
                    size = storage.nbytes()
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, size)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def training_memory(net: nn.Module, example: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> int:
    """Peak bytes that one training step's forward and backward pass of ``example`` allocate, gradients included,
    parameters not.
    """
    objective = loss or (lambda output: output.square().mean())
    state = {name: value.clone() for name, value in net.state_dict().items()}
    counter = _LiveBytes()
    training = net.training
    net.train()
    # dropout draws from the global generator, which is not ours to move
    with torch.random.fork_rng(), counter:
        value = objective(net(example))
        if value.requires_grad:  # a learning rule may have no path for gradients
            value.backward()
    net.zero_grad(set_to_none=True)
    net.load_state_dict(state)  # batch norm has moved its statistics
    net.train(training)
    return counter.peak


@torch.no_grad()
def latency(net: nn.Module, rows: Tensor, repeats: int = 15) -> float:
    """Median seconds of a forward pass of ``rows`` in evaluation mode, after three unmeasured ones."""
    training = net.training
    net.eval()
    times = []
    for i in range(repeats + 3):
        start = time.perf_counter()
        net(rows)
        if rows.is_cuda:
            torch.cuda.synchronize()
        if i >= 3:
            times.append(time.perf_counter() - start)
    net.train(training)
    return sorted(times)[len(times) // 2]


def match_width(
    make: Callable[[int], nn.Module], target: int, *, tolerance: float = 0.02, lowest: int = 1, highest: int = 8192
) -> int:
    """The width at which ``make(width)`` comes nearest to ``target`` parameters, by bisection.

    Widths at which ``make`` raises :class:`PomonaError` (a size that does not divide, say) are stepped over.

    Raises:
        PomonaError: if no width comes within ``tolerance`` of the target.
    """
    counts: dict[int, int] = {}

    def unallocated(width: int) -> nn.Module:
        """``make(width)`` without memory for its weights, where its initialisation can do without."""
        with torch.random.fork_rng():
            try:
                with torch.device("meta"):
                    return make(width)
            except NotImplementedError:  # it computes with values
                return make(width)

    def count(width: int) -> int | None:
        if width not in counts:
            try:
                counts[width] = parameters(unallocated(width))
            except PomonaError:
                counts[width] = -1
        return None if counts[width] < 0 else counts[width]

    def probe(width: int) -> int | None:
        """The first width at or above that can be built."""
        return next((w for w in range(width, min(width + 64, highest) + 1) if count(w) is not None), None)

    low = high = lowest
    while high < highest:  # doubling first, so that no network far larger than asked for is made
        high = min(2 * high, highest)
        usable = probe(high)
        if usable is None or counts[usable] > target:
            break
        low = usable
    while high - low > 1:
        middle = (low + high) // 2
        usable = probe(middle)
        if usable is None or usable >= high or counts[usable] > target:
            high = middle
        else:
            low = usable
    for width in range(max(lowest, low - 16), min(highest, low + 17)):
        count(width)
    usable_counts = {w: c for w, c in counts.items() if c >= 0}
    if not usable_counts:
        raise PomonaError(f"no width between {lowest} and {highest} can be built")
    best = min(usable_counts, key=lambda w: abs(usable_counts[w] - target))
    if abs(usable_counts[best] - target) > tolerance * target:
        raise PomonaError(
            f"no width comes within {tolerance:.0%} of {target} parameters; "
            f"the nearest is width={best} with {usable_counts[best]}"
        )
    return best
