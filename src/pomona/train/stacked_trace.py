"""A function at fixed shapes as a list of plain tensor calls, without vmap's or autograd's overhead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tag, Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Untraceable(Exception):
    """What a function does depends on values, so that a list of its calls would not do."""


_DEPENDENT = {Tag.data_dependent_output, Tag.dynamic_output_shape}

_Call = tuple[str, list[str], list[str], bool]
"""Its text, what it reads and gives by name, and whether it changes what it reads."""


def _view(t: Tensor) -> tuple[Any, ...]:
    return t.storage_offset(), tuple(t.shape), t.stride(), t.dtype


class _Recorder(TorchDispatchMode):
    """Notes every call below autograd and vmap.

    A tensor's name goes with the memory that it reads, and how: autograd hands out other objects for the same tensor.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.known: dict[str, Any] = {}
        self.names: dict[int, tuple[StorageWeakRef, dict[Any, str]]] = {}
        for i, t in enumerate(inputs):
            self.name(t, f"a{i}")

    def find(self, t: Tensor) -> str | None:
        """The name of a tensor, if it has one."""
        found = self.names.get(t.untyped_storage().data_ptr())
        return None if found is None or found[0].expired() else found[1].get(_view(t))

    def name(self, t: Tensor, label: str) -> str:
        """The name of a tensor, ``label`` if it has none yet."""
        storage = t.untyped_storage()
        found = self.names.get(storage.data_ptr())
        if found is None or found[0].expired():  # memory that is new, or was another's
            found = self.names[storage.data_ptr()] = StorageWeakRef(storage), {}
        return found[1].setdefault(_view(t), label)

    def text(self, value: Any) -> str:
        """An argument, as it is written."""
        if isinstance(value, (tuple, list)):
            inner = "".join(f"{self.text(item)}, " for item in value)
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        label = self.find(value) if isinstance(value, Tensor) else None
        if label is None:
            label = f"c{len(self.known)}"
            self.known[label] = value.detach() if isinstance(value, Tensor) else value  # a constant
            if isinstance(value, Tensor):
                self.name(value, label)
        return label

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _DEPENDENT.intersection(func.tags):
            raise Untraceable(f"{func} depends on values")
        options = kwargs or {}
        words = [self.text(value) for value in args] + [f"{key}={self.text(value)}" for key, value in options.items()]
        reads = [self.text(t) for t in pytree.tree_leaves((args, options)) if isinstance(t, Tensor)]
        changes = func._schema.is_mutable
        if changes and any(label[0] == "c" for label in reads):
            raise Untraceable(f"{func} changes a tensor that is kept from call to call")
        out = func(*args, **options)
        outs = [out] if isinstance(out, Tensor) else list(out or ())
        if changes or not all(isinstance(t, Tensor) and self.find(t) for t in outs):  # else it is there already
            number = len(self.calls)
            gives = [self.name(t, f"t{number}_{i}") if isinstance(t, Tensor) else f"t{number}_{i}"
                     for i, t in enumerate(outs)]  # fmt: skip
            self.known[f"f{number}"] = func._op
            left = "" if not outs else f"{gives[0]} = " if isinstance(out, Tensor) else f"[{', '.join(gives)}] = "
            self.calls.append((f"{left}f{number}({', '.join(words)})", reads, gives, changes))
        return out


class Trace:
    """``function`` for tensors of the shapes of ``args``, as one Python function of plain calls.

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
        results = [recorder.text(t) for t in found]
        self.run = self._compiled(recorder.calls, [f"a{i}" for i in range(len(leaves))], results, recorder.known)

    @staticmethod
    def _compiled(
        steps: list[_Call], inputs: list[str], results: list[str], known: dict[str, Any]
    ) -> Callable[..., list[Tensor]]:
        needed, lines = set(results), []
        alive = set(results)
        for text, reads, gives, changes in reversed(steps):
            if not changes and not needed.intersection(gives):
                continue
            over = [label for label in dict.fromkeys([*gives, *reads]) if label[0] == "t" and label not in alive]
            alive.update(over)
            needed.update(reads)
            lines.append(f"    {text}" + (f"; del {', '.join(over)}" if over else ""))
        source = [f"def run({', '.join(inputs)}):", *reversed(lines), f"    return [{', '.join(results)}]"]
        exec(compile("\n".join(source), "<trace>", "exec"), known)  # the text is ours alone
        return known["run"]

    def __call__(self, *args: Any) -> Any:
        """As the function itself."""
        return pytree.tree_unflatten(self.run(*pytree.tree_leaves(args)), self.spec)
