"""Banks of experts: stacked weights, every token sent to its own few, by sorting and one matrix product a segment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from pomona.errors import PomonaError, check_positive
from pomona.nn.activation import act as make_activation
from pomona.nn.check import check_input


@torch.library.custom_op("pomona::segment_mm", mutates_args=())
def _segment_mm(x: Tensor, weight: Tensor, bounds: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[2])
    done = 0
    for e, (start, end) in enumerate(bounds.tolist()):
        y[done:start] = 0
        torch.mm(x[start:end], weight[e], out=y[start:end])
        done = end
    y[done:] = 0
    return y


@torch.library.custom_op("pomona::segment_outer", mutates_args=())
def _segment_outer(x: Tensor, y: Tensor, bounds: Tensor) -> Tensor:
    weight = x.new_empty(bounds.shape[0], x.shape[1], y.shape[1])
    for e, (start, end) in enumerate(bounds.tolist()):
        torch.mm(x[start:end].mT, y[start:end], out=weight[e])  # zeros for an empty segment
    return weight


_segment_mm.register_fake(lambda x, weight, bounds: x.new_empty(x.shape[0], weight.shape[2]))
_segment_outer.register_fake(lambda x, y, bounds: x.new_empty(bounds.shape[0], x.shape[1], y.shape[1]))


def _vmap_rule(operation: Callable[..., Tensor]) -> Callable[..., Any]:
    """Members become further segments: rows, segments and results of all of them stand one after another."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        members = int(info.batch_size)
        x, second, bounds = (
            t.expand(members, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(args, in_dims, strict=True)
        )
        shift = x.shape[1] * torch.arange(members, device=bounds.device)
        out = operation(x.flatten(0, 1), second.flatten(0, 1), (bounds + shift[:, None, None]).flatten(0, 1))
        return out.reshape(members, out.shape[0] // members, *out.shape[1:]), 0

    return rule


_segment_mm.register_vmap(_vmap_rule(_segment_mm))
_segment_outer.register_vmap(_vmap_rule(_segment_outer))


@register_flop_formula([torch.ops.pomona.segment_mm, torch.ops.pomona.segment_outer])
def _flops(first: torch.Size, second: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * first[0] * first[1] * second[-1]


class _SegmentMatmul(torch.autograd.Function):  # a custom operator's own autograd is closed to torch.func
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bounds: Tensor) -> Tensor:
        return _segment_mm(x, weight, bounds)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bounds = ctx.saved_tensors
        return _SegmentMatmul.apply(grad, weight.mT, bounds), _SegmentOuter.apply(x, grad, bounds), None


class _SegmentOuter(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, bounds: Tensor) -> Tensor:
        return _segment_outer(x, y, bounds)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y, bounds = ctx.saved_tensors
        return _SegmentMatmul.apply(y, grad.mT, bounds), _SegmentMatmul.apply(x, grad, bounds), None


def segment_matmul(x: Tensor, weight: Tensor, bounds: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_n = x_n W_e + b_e for rows n of segment e, bounds[e, 0] <= n < bounds[e, 1]; rows of no segment give zeros.

    Args:
        x: (rows, in).
        weight: (segments, in, out).
        bounds: (segments, 2) int64, in order and without overlap.
        bias: (segments, out).

    Returns:
        (rows, out)
    """
    if bias is not None:  # one more row of the weight, so that its gradient is a product too
        x, weight = F.pad(x, (0, 1), value=1.0), torch.cat([weight, bias[:, None]], 1)
    return _SegmentMatmul.apply(x, weight.to(x.dtype), bounds)


class Segments(NamedTuple):
    """Entries (token, choice) sorted by expert.

    Attributes:
        order: (entries,) which entry stands at each place.
        expert: (entries,) the expert at each place, not falling; the number of experts stands for none.
        bounds: (experts, 2) the place of each expert's first, and the place after its last.
    """

    order: Tensor
    expert: Tensor
    bounds: Tensor

    def rank(self) -> Tensor:
        """How many entries of the same expert stand before: (entries,), in the order that they came in."""
        starts = torch.cat([self.bounds[:, 0], self.bounds[-1:, 1]])
        place = torch.arange(len(self.order), device=self.order.device)
        return torch.zeros_like(self.order).scatter(0, self.order, place - starts[self.expert])


def segments(index: Tensor, n_experts: int) -> Segments:
    """Sort the entries of ``index`` (experts in 0 .. n_experts, of any shape), keeping their order within an expert."""
    expert, order = torch.sort(index.flatten(), stable=True)
    count = order.new_zeros(n_experts + 1).scatter_add(0, expert, torch.ones_like(order))
    ends = count.cumsum(0)
    return Segments(order, expert, torch.stack([ends - count, ends], -1)[:n_experts])


@dataclass(frozen=True)
class Load:
    """How entries spread over experts: ``count`` and ``share`` (experts,), ``imbalance`` = largest / mean count."""

    count: Tensor
    share: Tensor
    imbalance: float


def load(index: Tensor, n_experts: int) -> Load:
    """Load of each expert for chosen experts ``index`` of any shape."""
    count = torch.bincount(index.flatten(), minlength=n_experts)[:n_experts].double()
    total = count.sum().clamp(min=1)
    return Load(count.long(), count / total, float(count.max() / (total / n_experts)))


def top_gates(logits: Tensor, top_k: int, *, renormalise: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The ``top_k`` largest of p = softmax(logits), taken in float32 at least; they sum to 1 if ``renormalise``.

    Returns:
        index (*, top_k), gate (*, top_k), p (*, experts)
    """
    p = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    gate, index = p.topk(top_k, -1)
    return index, gate / gate.sum(-1, keepdim=True) if renormalise else gate, p


def balance_loss(p: Tensor, index: Tensor) -> Tensor:
    """E sum_e f_e P_e: f_e the share of entries at expert e, P_e its mean probability; 1 when both are uniform.

    Args:
        p: (*, experts) router probabilities.
        index: (*, choices) chosen experts.

    Source: Switch Transformers, arXiv 2101.03961.
    """
    n = p.shape[-1]
    ones = torch.ones_like(index.flatten(), dtype=p.dtype)
    share = torch.zeros_like(p.detach().reshape(-1, n).sum(0)).scatter_add(0, index.flatten(), ones)
    return n * (share / ones.numel() * p.reshape(-1, n).mean(0)).sum() if ones.numel() else p.sum()


class LastPass:
    """A tensor of a layer's last forward pass, which copies and files of the layer do not carry."""

    def __init__(self) -> None:
        self.value = torch.zeros(())

    def __reduce__(self) -> tuple[type[LastPass], tuple[()]]:
        return LastPass, ()


class TokenContext(nn.Module):
    """The token ids that a language model lends its layers for a forward pass.

    Before each pass the model calls ``set_tokens(tokens)`` on every submodule that has it, tokens (B, T); the layer
    calls the context with its input for the ids. A model that generates with a cache hands over all tokens so far and
    only its last states, so ids are aligned at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = LastPass()

    def set_tokens(self, tokens: Tensor) -> None:
        """Lend ``tokens``, (B, T) integers."""
        self.held.value = tokens

    def forward(self, x: Tensor) -> Tensor:
        """The ids (B, T) for states x (B, t, D), t <= T.

        Raises:
            PomonaError: if no ids are there, or ids of another batch.
        """
        tokens = self.held.value
        if tokens.dim() < 1:
            raise PomonaError("tokens=None: a layer that routes by token needs them as an argument or by set_tokens")
        if x.shape[:-2] != tokens.shape[:-1] or x.shape[-2] > tokens.shape[-1]:
            raise PomonaError(f"tokens have shape {tuple(tokens.shape)}, which does not fit states {tuple(x.shape)}")
        return tokens


def shapes_may_depend_on_values() -> bool:
    """Whether neither compilation nor a transform of ``torch.func`` is under way."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is None


class Experts(nn.Module):
    """Experts that share a shape; subclasses define `run`.

    `dispatch` sorts the entries by expert, applies each expert to one segment of rows, and sorts back: no padding, no
    dropping, no one-hot. With `segment_matmul` it works in every floating-point type, twice differentiable, under
    ``torch.compile`` and under ``vmap``, where the members' experts are one larger bank. Forward-mode derivatives are
    not defined.

    Args:
        n_experts: E.
        dim: features in.
        out_features: features out, ``dim`` by default.

    Shape:
        x (*, dim), index (*) or (*, choices), gate as index or None -> (*, out_features)

    Raises:
        PomonaError: for sizes that are not positive, or an index that does not fit the tokens.
    """

    def __init__(self, n_experts: int, dim: int, out_features: int | None = None) -> None:
        super().__init__()
        check_positive(n_experts=n_experts, dim=dim)
        self.n_experts, self.dim, self.out_features = n_experts, dim, out_features or dim

    def run(self, rows: Tensor, at: Segments) -> Tensor:
        """Rows (entries, dim), sorted by expert, through their experts: (entries, out_features)"""
        raise NotImplementedError("a bank of experts defines run(rows, at)")

    def dispatch(self, x: Tensor, index: Tensor, gate: Tensor | None = None) -> Tensor:
        """Send every token to its experts; an index of ``n_experts`` means none and adds nothing."""
        check_input(self, x, self.dim)
        if index.dim() < x.dim():
            index, gate = index[..., None], None if gate is None else gate[..., None]
        if index.shape[:-1] != x.shape[:-1]:
            raise PomonaError(f"index of shape {tuple(index.shape)} does not fit tokens of shape {tuple(x.shape)}")
        order, expert, bounds = segments(index, self.n_experts)
        back = torch.zeros_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
        nobody = 0
        if shapes_may_depend_on_values() and not x.is_meta:  # leave out the entries that go to no expert
            used = int(bounds[-1, 1])
            nobody, order, expert = len(order) - used, order[:used], expert[:used]
        rows = x.reshape(-1, self.dim).index_select(0, order // index.shape[-1])
        out = F.pad(self.run(rows, Segments(order, expert, bounds)), (0, 0, 0, nobody))
        out = out.index_select(0, back).reshape(*index.shape, self.out_features)
        if gate is not None:
            out = out * gate[..., None].to(out.dtype)
        return out.sum(-2)

    def forward(self, x: Tensor, index: Tensor, gate: Tensor | None = None) -> Tensor:
        """See `dispatch`."""
        return self.dispatch(x, index, gate)

    def load(self, index: Tensor) -> Load:
        """How evenly ``index`` uses the experts."""
        return load(index, self.n_experts)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"n_experts={self.n_experts}, dim={self.dim}, out_features={self.out_features}"


class ExpertBank(Experts):
    """y = sum_k g_k (act(x W1_e + b1_e) W2_e + b2_e), e = index_k: two-layer experts with stacked weights.

    Args:
        n_experts: E.
        dim: features in.
        hidden: features between.
        out_features: features out, ``dim`` by default.
        act: activation between, by name.
        bias: biases b1 and b2.

    Shape:
        x (*, dim), index (*) or (*, choices), gate as index or None -> (*, out_features)

    Raises:
        PomonaError: for sizes that are not positive.
    """

    def __init__(
        self,
        n_experts: int,
        dim: int,
        hidden: int,
        *,
        out_features: int | None = None,
        act: str = "relu",
        bias: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(n_experts, dim, out_features)
        check_positive(hidden=hidden)
        self.act = make_activation(act, features=hidden)
        before = hidden
        factor = getattr(self.act, "out_factor", 1)
        if factor != 1:
            before = round(hidden / factor)
            self.act = make_activation(act, features=before)
        self.up = nn.Parameter(torch.empty(n_experts, dim, before))
        self.down = nn.Parameter(torch.empty(n_experts, hidden, self.out_features))
        self.up_bias = nn.Parameter(torch.empty(n_experts, before)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(n_experts, self.out_features)) if bias else None
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """U(-1, 1) / sqrt(inputs), each expert as `torch.nn.Linear`."""
        for weight, bias in ((self.up, self.up_bias), (self.down, self.down_bias)):
            bound = weight.shape[1] ** -0.5
            for p in (weight, bias):
                if p is not None:
                    nn.init.uniform_(p, -bound, bound, generator=generator)

    def run(self, rows: Tensor, at: Segments) -> Tensor:
        """See `Experts`."""
        hidden = segment_matmul(rows, self.up, at.bounds, self.up_bias)
        return segment_matmul(self.act(hidden), self.down, at.bounds, self.down_bias)
