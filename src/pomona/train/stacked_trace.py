"""A function at fixed shapes as a list of plain tensor calls, without vmap's or autograd's overhead."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tag, Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Untraceable(Exception):
    """What a function does depends on values, so that a list of its calls would not do."""


_DEPENDENT = {Tag.data_dependent_output, Tag.dynamic_output_shape}

_Call = tuple[Callable[..., Any], list[int], dict[str, Any], list[int], bool, bool]
"""The operation, registers that it reads, other keywords, registers that it gives, whether that is one tensor alone,
and whether it changes what it reads.
"""


def _view(t: Tensor) -> tuple[Any, ...]:
    return t.storage_offset(), tuple(t.shape), t.stride(), t.dtype


def _depends_on_values(func: Any, args: tuple[Any, ...]) -> bool:
    if func is torch.ops.aten.index.Tensor:  # tagged for its boolean masks; integers give a shape that is known
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return bool(_DEPENDENT.intersection(func.tags))


def _list(*items: Any) -> list[Any]:
    return list(items)


class _Recorder(TorchDispatchMode):
    """Notes every call below autograd and vmap; each value has a register, constants too.

    A tensor's register goes with the memory that it reads, and how: autograd hands out other objects for the same
    tensor.
    """

    def __init__(self, inputs: list[Any]) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.registers: list[Any] = []
        self.constant: list[bool] = []
        self.known: dict[int, tuple[StorageWeakRef, dict[Any, int]]] = {}
        for t in inputs:
            self.name(t, self.new()) if isinstance(t, Tensor) else self.new()

    def new(self, *constant: Any) -> int:
        """A fresh register, for a constant where one is given."""
        self.registers.append(constant[0] if constant else None)
        self.constant.append(bool(constant))
        return len(self.registers) - 1

    def find(self, t: Tensor) -> int | None:
        """The register of a tensor, if it has one."""
        found = self.known.get(t.untyped_storage().data_ptr())
        return None if found is None or found[0].expired() else found[1].get(_view(t))

    def name(self, t: Tensor, register: int) -> int:
        """The register of a tensor, ``register`` if it has none yet."""
        storage = t.untyped_storage()
        found = self.known.get(storage.data_ptr())
        if found is None or found[0].expired():  # memory that is new, or was another's
            found = self.known[storage.data_ptr()] = StorageWeakRef(storage), {}
        return found[1].setdefault(_view(t), register)

    def read(self, value: Any) -> int:
        """The register of an argument."""
        if isinstance(value, Tensor):
            found = self.find(value)
            return self.name(value, self.new(value.detach())) if found is None else found
        if isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value):
            self.calls.append((_list, [self.read(item) for item in value], {}, [self.new()], True, False))
            return self.calls[-1][3][0]
        return self.new(value)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _depends_on_values(func, args):
            raise Untraceable(f"{func} depends on values")
        options = kwargs or {}
        if any(isinstance(value, Tensor) for value in options.values()):
            raise Untraceable(f"{func} is given a tensor by keyword")
        reads = [self.read(value) for value in args]
        changes = func._schema.is_mutable
        if changes and any(self.constant[self.read(t)] for t in pytree.tree_leaves(args) if isinstance(t, Tensor)):
            raise Untraceable(f"{func} changes a tensor that is kept from call to call")
        out = func(*args, **options)
        alone = isinstance(out, Tensor)
        outs = [out] if alone else list(out or ())
        if changes or not all(isinstance(t, Tensor) and self.find(t) is not None for t in outs):  # else it is there
            gives = [self.name(t, self.new()) if isinstance(t, Tensor) else self.new() for t in outs]
            self.calls.append((func._op, reads, options, gives, alone, changes))
        return out


class Trace:
    """``function`` for tensors of the shapes of ``args``, as a list of plain calls.

    Calls that change nothing and results that nobody reads are left out, and memory is given back after its last use.

    Args:
        function: tensors, and nests of them, to the same; it must do the same calls whatever the values.
        args: examples.

    Raises:
        Untraceable: if it reads values, or changes a tensor of its own from call to call.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        leaves = pytree.tree_leaves(args)
        recorder = _Recorder(leaves)
        with recorder:
            result = function(*args)
        found, self.spec = pytree.tree_flatten(result)
        self.results = [recorder.read(t) for t in found]
        self.registers = recorder.registers
        self.calls = self._needed(recorder, kept={*range(len(leaves)), *self.results})

    def _needed(self, recorder: _Recorder, kept: set[int]) -> list[tuple[Any, ...]]:
        """The calls that matter: operation, how to pick its arguments, keywords, where the results go, what is over."""
        needed, alive, steps = set(self.results), set(kept), []
        nothing = recorder.new(None)
        for op, reads, options, gives, alone, changes in reversed(recorder.calls):
            if not changes and not needed.intersection(gives):
                continue
            over = [i for i in {*gives, *reads} if i not in alive and not recorder.constant[i]]
            alive.update(over)
            needed.update(reads)
            steps.append((op, _pick(reads), options, gives[0] if alone else gives or [nothing], over))
        return steps[::-1]

    def run(self, *leaves: Any) -> list[Any]:
        """The function without nests."""
        registers = self.registers.copy()
        registers[: len(leaves)] = leaves
        for op, pick, options, gives, over in self.calls:
            if isinstance(gives, int):
                registers[gives] = op(*pick(registers), **options)
            else:
                for i, value in zip(gives, op(*pick(registers), **options) or (), strict=False):
                    registers[i] = value
            for i in over:
                registers[i] = None
        return [registers[i] for i in self.results]

    def __call__(self, *args: Any) -> Any:
        """As the function itself."""
        return pytree.tree_unflatten(self.run(*pytree.tree_leaves(args)), self.spec)


def _pick(places: list[int]) -> Callable[[list[Any]], Any]:
    """What takes the items at ``places`` out of a list, as a sequence."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1)) if places else lambda registers: ()
