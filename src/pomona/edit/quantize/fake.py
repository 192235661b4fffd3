"""Fake quantisation: a module that quantises and dequantises in floating point, and learns through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pomona.edit.quantize.quantizer import Grid, Levels, Quantizer, Uniform, stochastic_up, straight_through
from pomona.errors import PomonaError, unknown

Update = Literal["fixed", "dynamic", "ema", "lsq", "pact"]


class FakeQuant(nn.Module):
    r"""Quantise and dequantise, with a straight-through gradient: 1 inside the range, 0 outside.

    .. math:: \hat r = S \, (\mathrm{clamp}(\mathrm{round}(r / S) + Z, q_{min}, q_{max}) - Z)

    Args:
        quantizer: the levels.
        rows: (rows, n) values to fit them to.
        update: where the levels come from: ``fixed``; ``dynamic``, fitted to each input; ``ema``, a moving average
            of the inputs' extremes in training; ``lsq``, a learned step S with gradient scale
            ``1 / sqrt(n qmax)``; ``pact``, a learned upper clip.
        activation: whether the first dimension of the input is the batch.
        grid: ready levels in place of fitted ones.

    Raises:
        PomonaError: for a learned or averaged range of levels that are not uniform.

    Source: Learned Step Size Quantization (arXiv 1902.08153); PACT (arXiv 1805.06085).
    """

    scale: Tensor
    zero: Tensor
    levels: Tensor
    boundaries: Tensor
    up: Tensor | None

    def __init__(
        self,
        quantizer: Quantizer,
        rows: Tensor,
        update: Update = "fixed",
        *,
        activation: bool = False,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        if update not in ("fixed", "dynamic", "ema", "lsq", "pact"):
            raise unknown("update", update, ("fixed", "dynamic", "ema", "lsq", "pact"))
        grid = quantizer.fit(rows) if grid is None else grid
        self.quantizer, self.update, self.activation, self.enabled = quantizer, update, activation, True
        self.register_buffer("up", None)
        if isinstance(grid, Levels):
            if update not in ("fixed", "dynamic"):
                raise PomonaError(f"update={update!r} needs mapping='uniform', not {quantizer.mapping!r}")
            self._clip = grid.clip
            self.register_buffer("levels", grid.levels)
            self.register_buffer("boundaries", grid.boundaries)
            return
        scale = grid.scale
        if update == "lsq":  # 2 mean|r| / sqrt(qmax), never wider than the range; a shifted range is kept
            step = 2 * rows.abs().mean(1, keepdim=True) / (grid.qmax - grid.zero).clamp_min(1).sqrt()
            scale = torch.where(grid.zero == 0, torch.minimum(scale, step.clamp_min(scale * 1e-3)), scale)
        if update == "pact":
            scale = grid.high
        if update == "ema":
            self.register_buffer("extremes", torch.stack([grid.low, grid.high]))
        if update in ("lsq", "pact"):
            self.scale = nn.Parameter(scale)  # of pact: the upper clip
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("zero", grid.zero)

    def grid(self) -> Grid:
        """The present levels (of ``dynamic``: those of the fit)."""
        if self.quantizer.mapping != "uniform":
            return Levels(self.levels, self.boundaries, self._clip)
        qmin, qmax = self.quantizer.qmin, self.quantizer.qmax
        scale = self.scale.clamp_min(1e-12)
        return Uniform(scale / (qmax - self.zero) if self.update == "pact" else scale, self.zero, qmin, qmax)

    def grid_for(self, x: Tensor) -> Grid:
        """The levels that ``x`` is quantised with outside training."""
        return self.quantizer.fit(self.quantizer.rows(x.detach())) if self.update == "dynamic" else self.grid()

    def codes(self, x: Tensor) -> Tensor:
        """The codes of ``x``, in its shape and as int64."""
        rows = self.quantizer.rows(x.detach())
        return self.grid_for(x).encode(rows, self.up).view_as(x).long()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the levels, in its own shape."""
        if not self.enabled or not x.numel():
            return x
        rows = self.quantizer.rows(x)
        if self.update == "ema" and self.training:
            self._average(rows.detach())
        grid = self.grid_for(x)
        up = self.up
        if up is None and self.training and self.quantizer.rounding == "stochastic":
            up = stochastic_up(rows, grid)
        if self.update == "lsq":
            out = self._learned_step(rows, x, up)
        elif self.update == "pact":
            out = _learned_clip(rows, grid)
        else:
            out = straight_through(rows, grid, up)
        return out.view_as(x)

    @torch.no_grad()
    def _average(self, rows: Tensor) -> None:
        keep = self.quantizer.momentum
        now = torch.stack([rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)])
        self.extremes.mul_(keep).add_(now, alpha=1 - keep)  # type: ignore[operator]
        grid = self.quantizer.uniform(*self.extremes)  # type: ignore[misc]
        self.scale.copy_(grid.scale)
        self.zero.copy_(grid.zero)

    def _learned_step(self, rows: Tensor, x: Tensor, up: Tensor | None) -> Tensor:
        """``dr^/dS = round(r / S) - r / S`` inside the range, and the clipped code outside."""
        grid = self.grid()
        assert isinstance(grid, Uniform)
        count = x[0].numel() if self.activation else rows.shape[1]
        factor = (count * (grid.qmax - grid.zero).clamp_min(1)).rsqrt()
        step = (grid.scale * (1 - factor)).detach() + grid.scale * factor
        ratio = rows / step
        whole = ratio.round() if up is None else ratio.floor() + up
        codes = (whole.detach() + (ratio - ratio.detach()) + grid.zero).clamp(grid.qmin, grid.qmax)
        return step * (codes - grid.zero)

    def param_groups(self) -> list[dict[str, Any]]:
        """Steps are not decayed; the clip of PACT is, like a weight."""
        return [{"params": [self.scale], "weight_decay": 0.0}] if self.update == "lsq" else []

    def extra_repr(self) -> str:
        """The levels in short."""
        own = self.quantizer
        return f"bits={own.bits}, {own.mapping}, {own.granularity}, range={own.range}, update={self.update}"


def _learned_clip(rows: Tensor, grid: Grid) -> Tensor:
    """``dr^/dclip = 1`` above the clip and 0 inside."""
    inside = torch.minimum(torch.maximum(rows, grid.low), grid.high)
    return grid.decode(grid.encode(rows)).detach() + (inside - inside.detach())


class Shift(nn.Module):
    """A constant added to a bias: what bias correction does."""

    shift: Tensor

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.enabled = True
        self.register_buffer("shift", shift)

    def forward(self, bias: Tensor) -> Tensor:
        """The corrected bias."""
        return bias + self.shift if self.enabled else bias


@contextmanager
def only(net: nn.Module, name: str | None = None) -> Iterator[None]:
    """Within it all quantisers of ``net`` are switched off, but those of the layer of that name."""
    parts = [(path, part) for path, part in net.named_modules() if isinstance(part, (FakeQuant, Shift))]
    before = [part.enabled for _, part in parts]
    for path, part in parts:
        part.enabled = part.enabled and name is not None and path.startswith(f"{name}." if name else "")
    try:
        yield
    finally:
        for (_, part), value in zip(parts, before, strict=True):
            part.enabled = value
