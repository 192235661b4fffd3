"""Rules under which every block of a network learns from a loss of its own.

Source: Layer Collaboration in the Forward-Forward Algorithm, arXiv 2305.12393.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from pomona.errors import PomonaError
from pomona.train.rule import Batch, Loss, Tensors, Update, _WithAuxiliary, with_hook


@dataclass(frozen=True)
class Block:
    """Submodules of a network that run one after another, by their qualified names."""

    names: tuple[str, ...]

    def owns(self, tensor: str) -> bool:
        """Whether a parameter or buffer of that name belongs to the block."""
        return any(tensor.startswith(f"{name}.") for name in self.names)

    def __call__(self, net: nn.Module, tensors: Tensors, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """Output for ``x`` with ``tensors`` in place of the network's own, and the sum of auxiliary losses."""
        extra: Tensor | float = 0.0
        for name in self.names:
            module = net.get_submodule(name)
            own = {f"net.{k[len(name) + 1 :]}": v for k, v in tensors.items() if k.startswith(f"{name}.")}
            x, more = functional_call(_WithAuxiliary(module, with_hook(module, "aux_loss")), own, (x,))
            extra = extra + more
        return x, extra


@dataclass(frozen=True)
class Cut:
    """A network as stem -> blocks -> head; stem and head may be empty."""

    stem: Block
    blocks: tuple[Block, ...]
    head: Block


def blocks_of(net: nn.Module, blocks: list[str] | None = None) -> Cut:
    """Where a network can be cut.

    Args:
        net: a network with an ordered ``blocks`` container (and perhaps ``stem`` before it and ``memory``, ``head``
            after it), or an ``nn.Sequential``, in which every layer with weight matrices opens a block that runs up
            to the next one; a last layer that nothing follows is the head.
        blocks: qualified names of submodules that run in this order, in place of that.

    Raises:
        PomonaError: if there is no way to cut it, or a name is not a submodule.
    """
    if blocks is not None:
        known = dict(net.named_modules())
        for name in blocks:
            if name not in known:
                raise PomonaError(f"blocks names {name!r}, which is not a submodule of {type(net).__name__}")
        return Cut(Block(()), tuple(Block((name,)) for name in blocks), Block(()))
    inner = getattr(net, "blocks", None)
    if isinstance(net, nn.Sequential):
        cut = _cut_sequential(net)
        if cut.blocks:
            return cut
    elif isinstance(inner, (nn.Sequential, nn.ModuleList)) and len(inner):
        stem, after = (
            Block(tuple(name for name in names if isinstance(getattr(net, name, None), nn.Module)))
            for names in (("stem",), ("memory", "head"))
        )
        return Cut(stem, tuple(Block((f"blocks.{i}",)) for i in range(len(inner))), after)
    raise PomonaError(
        f"{type(net).__name__} has no blocks to learn locally; use an mlp with depth above 0, an nn.Sequential, "
        "a network with an ordered `blocks`, or name them: blocks=['0', '2']"
    )


def _cut_sequential(net: nn.Sequential) -> Cut:
    groups: list[list[str]] = [[]]
    for name, module in net.named_children():
        if any(p.ndim > 1 for p in module.parameters()):
            groups.append([])
        groups[-1].append(name)
    stem, *blocks = [Block(tuple(group)) for group in groups]
    # a lone linear layer at the end gives the outputs: nothing that squashes or rectifies follows it
    last = net.get_submodule(blocks[-1].names[0]) if blocks else None
    lone = len(blocks) > 1 and len(blocks[-1].names) == 1 and not list(last.children())  # type: ignore[union-attr]
    return Cut(stem, tuple(blocks[:-1]), blocks[-1]) if lone else Cut(stem, tuple(blocks), Block(()))


class LocalRule:
    """Every block descends its own loss.

    The input of each block is detached, and the SUM of the losses differentiated once. A subclass gives
    :meth:`losses`. Because of the detaching, the sum's gradient for a block's weights is exactly that
    of the block's own loss. The stem learns with the first block; what no loss touches is frozen.

    Args:
        blocks: see :func:`blocks_of`.
    """

    noise = 0

    def __init__(self, blocks: list[str] | None = None) -> None:
        self.names = blocks

    def init(self, net: nn.Module, loss: Loss, example: Batch) -> Tensors:
        """See :class:`pomona.train.rule.Rule`."""
        self.net, self.loss, self.cut = net, loss, blocks_of(net, self.names)
        return {}

    def prepare(self, h: Tensor) -> Tensor:
        """What a block sees of the output below it."""
        return h

    def run(self, tensors: Tensors, h: Tensor) -> tuple[list[Tensor], Tensor | float]:
        """Each block's output, from the stem's output ``h``, detached between blocks; and the auxiliary losses."""
        outputs: list[Tensor] = []
        total: Tensor | float = 0.0
        for block in self.cut.blocks:
            h, extra = block(self.net, tensors, self.prepare(h))
            outputs.append(h)
            h, total = h.detach(), total + extra
        return outputs, total

    def losses(self, tensors: Tensors, batch: Batch, noise: Tensor) -> list[Tensor]:
        """One scalar a block (and any further local ones); ``tensors`` are parameters, buffers and the rule's state."""
        raise NotImplementedError

    def learns(self, name: str) -> bool:
        """Whether the parameter of that name gets a gradient."""
        return self.cut.stem.owns(name) or any(block.owns(name) for block in self.cut.blocks)

    def grads(self, params: Tensors, buffers: Tensors, state: Tensors, batch: Batch, noise: Tensor) -> Update:
        """See :class:`pomona.train.rule.Rule`."""

        def objective(learned: Tensors) -> tuple[Tensor, tuple[Tensors, Tensor]]:
            # copied so that batch norm's in-place update stays inside this call
            after = {name: buffer.clone() for name, buffer in buffers.items()}
            losses = torch.stack(self.losses({**params, **learned, **after, **state}, batch, noise))
            return losses.sum(), (after, losses.detach())

        learned = {name: p for name, p in params.items() if self.learns(name)}
        gradient, (after, losses) = grad(objective, has_aux=True)(learned)
        logs = {f"loss_{i}": value for i, value in enumerate(losses)}
        return Update(gradient, after, state, losses.sum(), logs=logs)

    def predict(self, params: Tensors, buffers: Tensors, state: Tensors, x: Tensor) -> Tensor:
        """See :class:`pomona.train.rule.Rule`; the network's own output."""
        return functional_call(self.net, {**params, **buffers}, (x,))
