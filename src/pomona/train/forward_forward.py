"""The forward-forward algorithm, with layer collaboration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.errors import PomonaError, unknown
from pomona.train.local_rule import LocalRule
from pomona.train.rule import Batch, Loss, Tensors

Negatives = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, y, uniform numbers (B, 1)) -> wrong labels (B,), or without labels -> negative inputs like ``x``."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "goodness": ("sum", "mean"),
    "gamma_layers": ("all", "previous"),
    "label": ("auto", "embed", "add", "none"),
    "negatives": ("random", "hard", "hybrid"),
    "norm": ("rms", "none"),
}


class ForwardForward(LocalRule):
    """loss_l = softplus(-s (g_l + gamma_l - theta_l)), s = +1 for real examples and -1 for negative ones.

    The goodness g_l is the sum (or mean) of block l's squared activations. Collaboration adds to each block's logit
    what the others found: gamma_l = sum over j != l of g_j, without gradient, so that a block's local gradient is
    scaled by the error of the TOTAL goodness; theta_l then counts every block that contributes.

    A real example carries its label in its input, a negative one a wrong label. Every block sees its input scaled to
    unit root mean square, which hides the goodness of the block below. Prediction tries all labels at once and adds
    up the goodness; these sums, (B, K), serve as logits: their softmax is the odds of "real", normalised over
    labels. Without labels negatives are hybrids of two examples, and the head learns the task from the last block's
    detached output.

    Args:
        theta: threshold of one block: ``units`` (the number of its activations; 1 for mean goodness) or a number.
        goodness: ``sum`` or ``mean`` over a block's activations.
        theta_total: with collaboration, sum theta over the blocks that contribute; else one block's.
        collaborate: the second paper's collaboration; False is plain forward-forward.
        gamma_layers: which blocks contribute: ``all`` others, or those ``previous`` to it, known in one pass.
        negatives: ``random`` wrong labels, ``hard`` ones drawn by the softmax of the network's own goodness, or a
            function. Without labels ``hybrid``: two examples mixed by blurred random masks; or a function.
        label: ``embed`` overwrites the first K numbers of the input with a one-hot label as large as the example's
            largest entry; ``add`` adds a fixed random direction for each label to the stem's output, which destroys
            no feature; ``auto`` embeds in images and adds elsewhere; ``none`` learns without labels.
        norm: ``rms`` or ``none``.
        skip_first: leave the first block's goodness out of the prediction, when there are more.
        classes: number of labels; by default the width of the network's output.
        blocks: names of the blocks; see :func:`pomona.train.local_rule.blocks_of`.
        seed: of the directions of ``add``.

    Raises:
        PomonaError: for unknown choices, targets that are not classes, networks that have no blocks, inputs
            narrower than the one-hot label.

    Source: The Forward-Forward Algorithm, arXiv 2212.13345; Layer Collaboration in the Forward-Forward
    Algorithm, arXiv 2305.12393.
    """

    def __init__(
        self,
        theta: Literal["units"] | float = "units",
        goodness: Literal["sum", "mean"] = "sum",
        theta_total: bool = True,
        collaborate: bool = True,
        gamma_layers: Literal["all", "previous"] = "all",
        negatives: Literal["random", "hard", "hybrid"] | Negatives = "random",
        label: Literal["auto", "embed", "add", "none"] = "auto",
        norm: Literal["rms", "none"] = "rms",
        skip_first: bool = True,
        classes: int | None = None,
        blocks: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(blocks)
        given = {"goodness": goodness, "gamma_layers": gamma_layers, "label": label, "norm": norm}
        for field, value in {**given, **({} if callable(negatives) else {"negatives": negatives})}.items():
            if value not in _CHOICES[field]:
                raise unknown(field, value, _CHOICES[field])
        if isinstance(theta, str) and theta != "units":
            raise PomonaError(f"theta={theta!r} must be units or a number")
        self.theta, self.goodness, self.theta_total, self.collaborate = theta, goodness, theta_total, collaborate
        self.gamma_layers, self.negatives, self.label, self.norm = gamma_layers, negatives, label, norm
        self.skip_first, self.classes, self.seed = skip_first, classes, seed

    # -- binding -------------------------------------------------------------------------------------------------

    def init(self, net: nn.Module, loss: Loss, example: Batch) -> Tensors:
        """See :class:`pomona.train.rule.Rule`."""
        super().init(net, loss, example)
        x, y = example
        if y.is_floating_point():
            raise PomonaError("rule=forward_forward needs class targets; for numbers use rule=backprop")
        self.labels = {"auto": "embed" if x.ndim > 2 else "add"}.get(self.label, self.label)
        unsupervised = self.labels == "none"
        # a hybrid's mask takes a number for each position, a wrong label takes one
        self.noise = (x[0, :1] if x.ndim > 2 else x[0]).numel() if unsupervised else 1
        probe = copy.deepcopy(net).eval()
        with torch.no_grad():
            self.count = self.classes or probe(x).shape[-1]
            h = self.cut.stem(probe, _tensors(probe), x)[0]
        if self.count < 2:
            raise PomonaError(f"classes={self.count} must be 2 or more; name it where the output is not the logits")
        if unsupervised:
            self._check_head(probe, h)
        if self.labels == "embed" and (x[0].numel() < self.count or not x.is_floating_point()):
            raise PomonaError(f"{x[0].numel()} inputs cannot hold a one-hot label of {self.count}; use label=add")
        if self.labels != "add":
            return {}
        generator = torch.Generator().manual_seed(self.seed)
        return {"label_codes": torch.randn(self.count, *h.shape[1:], generator=generator).to(h)}

    def _check_head(self, probe: nn.Module, h: Tensor) -> None:
        try:
            with torch.no_grad():
                last = self.run(_tensors(probe), h)[0][-1]
                shape = self.cut.head(probe, _tensors(probe), last)[0].shape
        except RuntimeError:
            shape = None
        if not self.cut.head.names or shape != (len(h), self.count):
            raise PomonaError("label=none needs a network whose head takes the last block's output, such as mlp")

    def learns(self, name: str) -> bool:
        """See :class:`LocalRule`."""
        return super().learns(name) or (self.labels == "none" and self.cut.head.owns(name))

    # -- pieces --------------------------------------------------------------------------------------------------

    def prepare(self, h: Tensor) -> Tensor:
        """Scale ``h`` to h / (rms(h) + 1e-8)."""
        return h / (_rms(h) + 1e-8) if self.norm == "rms" else h

    def inputs(self, tensors: Tensors, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | float]:
        """What the first block gets of ``x`` with labels ``y`` (B,) in it, and the stem's auxiliary loss."""
        one_hot = y.unsqueeze(-1) == torch.arange(self.count, device=y.device)
        if self.labels == "embed":
            flat = x.flatten(1)
            label = one_hot.to(x.dtype) * flat.abs().amax(1, keepdim=True)
            return self.cut.stem(self.net, tensors, torch.cat([label, flat[:, self.count :]], 1).reshape(x.shape))
        h, extra = self.cut.stem(self.net, tensors, x)
        # as large as the example itself, but never silent
        size = _rms(h.detach()).clamp_min(1e-3)
        return h + size * torch.tensordot(one_hot.to(h.dtype), tensors["label_codes"], 1), extra

    def good(self, h: Tensor) -> Tensor:
        """Goodness (B,) of a block's output."""
        square = h.flatten(1).square()
        return square.sum(1) if self.goodness == "sum" else square.mean(1)

    def threshold(self, h: Tensor) -> float:
        """Threshold of the block with output ``h``."""
        if isinstance(self.theta, str):
            return float(h.shape[1:].numel()) if self.goodness == "sum" else 1.0
        return self.theta

    def block_losses(self, outputs: list[Tensor], sign: Tensor) -> list[Tensor]:
        """Each block's loss; ``sign`` (B,) is +1 for real and -1 for negative examples."""
        goods = [self.good(h) for h in outputs]
        thetas = [self.threshold(h) for h in outputs]
        losses = []
        for i, (g, theta) in enumerate(zip(goods, thetas, strict=True)):
            logit = g
            if self.collaborate:
                others = [j for j in range(len(goods)) if j < i or (self.gamma_layers == "all" and j > i)]
                logit = g + sum(goods[j].detach() for j in others)
                theta += sum(thetas[j] for j in others) if self.theta_total else 0.0
            losses.append(F.softplus(-sign * (logit - theta)).mean())
        return losses

    # -- the rule ------------------------------------------------------------------------------------------------

    def losses(self, tensors: Tensors, batch: Batch, noise: Tensor) -> list[Tensor]:
        """See :class:`LocalRule`."""
        x, y = batch
        if self.labels == "none":
            wrong = self.negatives(x, y, noise) if callable(self.negatives) else hybrid(x, noise)
            h, first = self.cut.stem(self.net, tensors, torch.cat([x, wrong]))
        else:
            labels = torch.cat([y, self.wrong_labels(tensors, x, y, noise)])
            h, first = self.inputs(tensors, torch.cat([x, x]), labels)
        outputs, extra = self.run(tensors, h)
        sign = torch.cat([torch.ones_like(y), -torch.ones_like(y)]).to(h.dtype)
        losses = self.block_losses(outputs, sign)
        if self.labels == "none":
            output, more = self.cut.head(self.net, tensors, self.prepare(outputs[-1][: len(x)].detach()))
            losses.append(self.loss(output, y) + more)
        return [losses[0] + first + extra, *losses[1:]]

    def wrong_labels(self, tensors: Tensors, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """A label (B,) other than ``y`` for each example."""
        if callable(self.negatives):
            return self.negatives(x, y, noise)
        if self.negatives == "hard":
            # on copies, so that this pass leaves no trace in batch norm's statistics
            scores = self.total_goodness({name: t.detach().clone() for name, t in tensors.items()}, x)
            true = y.unsqueeze(-1) == torch.arange(self.count, device=y.device)
            edges = scores.masked_fill(true, -torch.inf).softmax(-1).cumsum(-1)
            # scaled by the last edge, which rounding may leave below 1; inverse of the distribution function
            drawn = (noise[:, :1] * edges[:, -1:] >= edges).sum(-1).clamp(max=self.count - 1)
            return torch.where(drawn == y, (y + 1) % self.count, drawn)
        return (y + 1 + (noise[:, 0] * (self.count - 1)).long().clamp(max=self.count - 2)) % self.count

    def total_goodness(self, tensors: Tensors, x: Tensor) -> Tensor:
        """Goodness (B, K) of ``x`` with each label, all in one pass."""
        labels = torch.arange(self.count, device=x.device).repeat(len(x))
        outputs, _ = self.run(tensors, self.inputs(tensors, x.repeat_interleave(self.count, 0), labels)[0])
        counted = outputs[1:] if self.skip_first and len(outputs) > 1 else outputs
        return torch.stack([self.good(h) for h in counted]).sum(0).reshape(len(x), self.count)

    def predict(self, params: Tensors, buffers: Tensors, state: Tensors, x: Tensor) -> Tensor:
        """Goodness of each label (B, K); without labels the head's output."""
        tensors = {**params, **buffers, **state}
        if self.labels != "none":
            return self.total_goodness(tensors, x)
        outputs, _ = self.run(tensors, self.cut.stem(self.net, tensors, x)[0])
        return self.cut.head(self.net, tensors, self.prepare(outputs[-1]))[0]


def hybrid(x: Tensor, noise: Tensor) -> Tensor:
    """Each example mixed with its neighbour in the batch by a mask with large patches of ones and zeros.

    Args:
        x: (B, ..., H, W), (B, C, L) or (B, features); numbers in no spatial order are mixed entry by entry.
        noise: uniform random numbers, one a position.
    """
    other = x.roll(1, 0)
    if x.ndim == 2:
        return torch.where(noise > 0.5, x, other)
    mask = noise.reshape(len(x), 1, *x.shape[2:])
    blur = F.avg_pool2d if x.ndim == 4 else F.avg_pool1d
    for _ in range(6):
        mask = blur(mask, 3, 1, 1, count_include_pad=False)
    return torch.where(mask > 0.5, x, other)


def _rms(h: Tensor) -> Tensor:
    return h.square().mean(tuple(range(1, h.ndim)), keepdim=True).sqrt()


def _tensors(net: nn.Module) -> Tensors:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}
