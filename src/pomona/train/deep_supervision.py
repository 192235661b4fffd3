"""Deep supervision: a companion classifier on every hidden layer, trained with the network and dropped afterwards.

``DeeplySupervised`` wraps a network for one's own training loop; ``DeepSupervision`` is the same as a learning rule.

Source: Deeply-Supervised Nets (arXiv 1409.5185).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.utils.flop_counter import FlopCounterMode

from pomona.data.task import Task
from pomona.errors import PomonaError, unknown
from pomona.nets.cost import parameters
from pomona.train.local_rule import blocks_of
from pomona.train.rule import Batch, Loss, Tensors, Update, with_hook

Heads = Literal["linear", "gap", "svm", "tied"]
Decay = Literal["linear", "hinge", "none"]
Gradient = Literal["full", "probe", "local"]
_CHOICES = {"heads": ("linear", "gap", "svm", "tied"), "decay": ("linear", "hinge", "none")}
_CHOICES |= {"gradient": ("full", "probe", "local")}


def squared_hinge(output: Tensor, target: Tensor) -> Tensor:
    """Multi-class L2-SVM loss: the mean over examples of sum_{k != y} max(0, 1 - (z_y - z_k))^2.

    Args:
        output: (..., classes).
        target: (...) class indices.

    Source: Deeply-Supervised Nets (arXiv 1409.5185).
    """
    z, y = output.flatten(0, -2), target.reshape(-1, 1)
    short = F.relu(1 - (z.gather(1, y) - z)).square()
    return (short.sum(1) - short.gather(1, y)[:, 0]).mean()


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of logits (..., classes) and class indices (...)."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "sqhinge": squared_hinge}


class Exit(NamedTuple):
    """Logits (batch, classes), the exit each input left at (batch,), the last being the network's own output, and the
    mean share of the network's FLOPs that was needed.
    """

    logits: Tensor
    exit: Tensor
    cost: float


class _Stop(Exception):
    """Raised by a hook once the wanted layer has run."""


class DeeplySupervised(nn.Module):
    """A network with companion classifiers on hidden layers.

        p |w_out|^2 + L(f(x), y) + sum_m a_m(t) max(0, p |w_m|^2 + l(h_m(z_m), y) - gamma)

    z_m is the output of layer m and h_m a classifier on it; a companion stops pushing once its value is below gamma.
    Calling the module gives the network's own output; ``objective`` the sum above.

    Args:
        net: any network; it becomes ``self.net`` and is trained in place.
        taps: names of the layers; by default the end of each block but the last.
        example: an input, to size the companions with.
        heads: ``linear`` on the flattened output, ``gap`` on its mean over the axes after
            the channels, ``svm`` linear without bias and
            with the squared hinge whatever ``loss`` is, ``tied`` the network's own last linear layer (for language
            models).
        weights: a_m, one for all or one each.
        decay: ``linear``: a_m(t) = a_m (1 - t), t being the progress in [0, 1], besides the hinge at gamma; ``hinge``:
            only that; ``none``: neither.
        gamma: value of a companion below which it stops.
        loss: ``ce``, ``sqhinge`` or a function of (output, target), of output and companions alike.
        penalty: p; |w|^2 counts the weights of the last layer and of each companion.
        gradient: ``full``; ``probe``: companions train only their own weights; ``local``: nothing flows below a tap
            except from its own companion (greedy training).

    Raises:
        PomonaError: for an unknown choice, name or number of weights.

    Source: Deeply-Supervised Nets (arXiv 1409.5185).
    """

    def __init__(
        self,
        net: nn.Module,
        taps: Sequence[str] | None = None,
        *,
        example: Tensor,
        heads: Heads = "linear",
        weights: float | Sequence[float] = 0.1,
        decay: Decay = "linear",
        gamma: float = 0.0,
        loss: str | Loss = "ce",
        penalty: float = 1e-4,
        gradient: Gradient = "full",
    ) -> None:
        super().__init__()
        for field, value in {"heads": heads, "decay": decay, "gradient": gradient}.items():
            if value not in _CHOICES[field]:
                raise unknown(field, value, _CHOICES[field])
        if isinstance(loss, str) and loss not in LOSSES:
            raise unknown("loss", loss, LOSSES)
        if taps is None:
            ends = [block.names[-1] for block in blocks_of(net).blocks]
            taps = ends[:-1] or ends
        modules = dict(net.named_modules())
        if missing := [name for name in taps if name not in modules]:
            raise unknown("taps", missing[0], modules)
        self.net, self.taps, self.kind, self.decay, self.gamma = net, list(taps), heads, decay, gamma
        self.weights = [float(weights)] * len(taps) if isinstance(weights, (int, float)) else list(weights)
        if len(self.weights) != len(self.taps):
            raise PomonaError(f"weights has {len(self.weights)} entries for {len(self.taps)} taps")
        self.loss: Loss = LOSSES[loss] if isinstance(loss, str) else loss
        self.companion_loss = squared_hinge if heads == "svm" else self.loss
        self.penalty, self.gradient = penalty, gradient
        linear = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
        if not linear:
            raise PomonaError("net has no nn.Linear, whose weights would count as the output's")
        self.last = linear[-1]
        training = net.training
        with torch.no_grad():
            output, features = self.run(example, eval_mode=True)
        net.train(training)
        sizes = [self.pooled(z).shape[-1] for z in features]
        classes = output.shape[-1]
        tied = heads == "tied"
        self.heads = nn.ModuleList([] if tied else [nn.Linear(size, classes, heads != "svm") for size in sizes])
        self.heads.to(output)
        if tied and set(sizes) != {net.get_submodule(self.last).in_features}:
            raise PomonaError(f"heads='tied' needs taps as wide as the input of {self.last!r}; they have {sizes}")

    def run(self, x: Tensor, until: int | None = None, eval_mode: bool = False) -> tuple[Tensor, list[Tensor]]:
        """The network's output and the output of each tap; with ``until`` nothing above that tap is computed."""
        found: list[Tensor | None] = [None] * len(self.taps)

        def keep(m: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
                found[m] = output.detach() if self.gradient == "probe" else output
                if m == until:
                    raise _Stop
                return output.detach() if self.gradient == "local" else None

            return hook

        if eval_mode:
            self.net.eval()
        hooks = [self.net.get_submodule(name).register_forward_hook(keep(m)) for m, name in enumerate(self.taps)]
        output = torch.empty(0)
        try:
            with suppress(_Stop):
                output = self.net(x)
        finally:
            for handle in hooks:
                handle.remove()
        for name, z in zip(self.taps, found, strict=True):
            if z is None and until is None:
                raise PomonaError(f"taps names {name!r}, which the network does not call")
        return output, found  # type: ignore[return-value]

    def pooled(self, z: Tensor) -> Tensor:
        """What a companion sees of its layer's output."""
        if self.kind == "tied":
            return z
        return z.flatten(2).mean(2) if self.kind == "gap" and z.ndim > 2 else z.flatten(1)

    def companion(self, m: int, z: Tensor) -> Tensor:
        """Logits of companion ``m`` for its layer's output."""
        head: nn.Module = self.net.get_submodule(self.last) if self.kind == "tied" else self.heads[m]
        return head(self.pooled(z))

    def weight(self, m: int, progress: float | Tensor) -> float | Tensor:
        """a_m at this progress of the training."""
        return self.weights[m] * (1 - progress) if self.decay == "linear" else self.weights[m]

    def values(self, features: Sequence[Tensor], y: Tensor) -> list[Tensor]:
        """Each companion's value, before gamma is taken off."""
        losses = [self.companion_loss(self.companion(m, z), y) for m, z in enumerate(features)]
        if self.kind == "tied":
            return losses
        return [l + self.penalty * w.square().sum() for l, w in zip(losses, self._head_weights(), strict=True)]

    def _head_weights(self) -> list[Tensor]:
        if self.kind == "tied":
            return [_weight(self.net.get_submodule(self.last))] * len(self.taps)
        return [_weight(head) for head in self.heads]

    def objective(self, x: Tensor, y: Tensor, progress: float | Tensor = 0.0) -> Tensor:
        """The sum to minimise; ``progress`` of the training in [0, 1]."""
        output, features = self.run(x)
        total = self.loss(output, y) + self.penalty * _weight(self.net.get_submodule(self.last)).square().sum()
        for m, value in enumerate(self.values(features, y)):
            push = value if self.decay == "none" else F.relu(value - self.gamma)
            total = total + self.weight(m, progress) * push
        return total

    def forward(self, x: Tensor) -> Tensor:
        """The network's own output."""
        return self.net(x)

    def export(self) -> nn.Module:
        """A copy of the network without companions."""
        return copy.deepcopy(self.net)

    @property
    def companion_parameters(self) -> int:
        """Parameters that go when training is done."""
        return parameters(self.heads)

    @torch.no_grad()
    def predict(self, x: Tensor, exit: int | str | None = None) -> Tensor:
        """Logits of the companion with that number or name, computing nothing above its layer; None is the output."""
        if exit is None:
            return self.net(x)
        if isinstance(exit, str) and exit not in self.taps:
            raise unknown("exit", exit, self.taps)
        m = self.taps.index(exit) if isinstance(exit, str) else range(len(self.taps))[exit]
        return self.companion(m, self.run(x, until=m)[1][m])

    def costs(self, example: Tensor) -> list[int]:
        """FLOPs for each exit, its companion included, and last for the whole network."""
        counts = []
        for m in [*range(len(self.taps)), None]:
            with FlopCounterMode(display=False) as counter:
                self.predict(example, m)
            counts.append(counter.get_total_flops())
        return counts

    @torch.no_grad()
    def early_exit(self, x: Tensor, confidence: float = 0.9) -> Exit:
        """Each input leaves at the first companion whose largest probability reaches ``confidence``."""
        output, features = self.run(x)
        logits = torch.stack([*(self.companion(m, z) for m, z in enumerate(features)), output], 1)
        sure = logits.softmax(-1).amax(-1) >= confidence
        sure[:, -1] = True
        left = sure.int().argmax(1)
        costs = torch.tensor(self.costs(x[:1]), dtype=torch.float64)
        # an input pays for the companions that it passed, too
        passed = torch.tensor([0, *(2 * w.numel() for w in self._head_weights())]).cumsum(0)
        share = (costs + passed)[left.cpu()] / costs[-1]
        return Exit(logits[torch.arange(len(x)), left], left, float(share.mean()))

    def layer_gradient_norms(self, x: Tensor, y: Tensor, progress: float = 0.0) -> dict[str, float]:
        """Norm of the objective's gradient for each weight matrix or kernel of the network."""
        named = {name: p for name, p in self.net.named_parameters() if p.ndim > 1 and p.requires_grad}
        total = self.objective(x, y, progress)
        grads = torch.autograd.grad(total, list(named.values()), materialize_grads=True)
        return {name: float(g.norm()) for name, g in zip(named, grads, strict=True)}


def _weight(module: nn.Module) -> Tensor:
    return module.weight  # type: ignore[return-value]


class _Objective(nn.Module):
    """The objective and the network's auxiliary losses in one call, for ``functional_call``."""

    def __init__(self, model: DeeplySupervised) -> None:
        super().__init__()
        self.model, self._hooked = model, (with_hook(model.net, "aux_loss"),)

    def forward(self, x: Tensor, y: Tensor, progress: Tensor) -> Tensor:
        return sum((m.aux_loss() for m in self._hooked[0]), self.model.objective(x, y, progress))  # type: ignore[operator]


class DeepSupervision:
    """Deep supervision as a learning rule: ``rule=deep_supervision``. Companions are the rule's own tensors.

    They count neither as parameters of the network nor in what is saved of it. ``model(net, state)`` puts both together
    again, for early exits.

    Args:
        horizon: steps after which the companions' weights have fallen to 0, with ``decay='linear'``.
        taps, heads, weights, decay, gamma, penalty, gradient: as in ``DeeplySupervised``.
        loss: ``task`` for the training's own loss, or as in ``DeeplySupervised``.
        seed: of the companions' initial weights.

    Raises:
        PomonaError: if ``horizon`` is below 1.

    Source: Deeply-Supervised Nets (arXiv 1409.5185).
    """

    noise = 0

    def __init__(
        self,
        horizon: int = 1000,
        taps: list[str] | None = None,
        heads: Heads = "linear",
        weights: float = 0.1,
        decay: Decay = "linear",
        gamma: float = 0.0,
        loss: str = "task",
        penalty: float = 1e-4,
        gradient: Gradient = "full",
        seed: int = 0,
    ) -> None:
        if horizon < 1:
            raise PomonaError(f"horizon={horizon} must be 1 step or more")
        self.horizon, self.taps, self.seed, self.loss_name = horizon, taps, seed, loss
        self.options: dict[str, Any] = {"heads": heads, "weights": weights, "decay": decay, "gamma": gamma}
        self.options |= {"penalty": penalty, "gradient": gradient}

    def init(self, net: nn.Module, loss: Loss, example: Batch) -> Tensors:
        """See :class:`pomona.train.rule.Rule`."""
        chosen = loss if self.loss_name == "task" else self.loss_name
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            copied = copy.deepcopy(net)
            self.supervised = DeeplySupervised(copied, self.taps, example=example[0], loss=chosen, **self.options)
        self.bound = _Objective(self.supervised)
        self.names = {f"head_{name.replace('.', '_')}": name for name, _ in self.supervised.heads.named_parameters()}
        weights = dict(self.supervised.heads.named_parameters())
        state = {own: weights[name].detach().clone() for own, name in self.names.items()}
        for tensor in state.values():
            tensor.is_learnable = True  # type: ignore[attr-defined]
        return {**state, "step": torch.zeros((), device=example[0].device)}

    def grads(self, params: Tensors, buffers: Tensors, state: Tensors, batch: Batch, noise: Tensor) -> Update:
        """See :class:`pomona.train.rule.Rule`."""
        heads = {name: t for name, t in state.items() if name != "step"}
        progress = (state["step"] / self.horizon).clamp(max=1.0)
        self.supervised.train()

        def objective(learned: tuple[Tensors, Tensors]) -> tuple[Tensor, Tensors]:
            # copied so that batch norm's in-place update stays inside this call
            after = {name: buffer.clone() for name, buffer in buffers.items()}
            named = {f"model.net.{name}": t for name, t in {**learned[0], **after}.items()}
            named |= {f"model.heads.{self.names[own]}": t for own, t in learned[1].items()}
            return functional_call(self.bound, named, (*batch, progress)), after

        (gradient, to_heads), (value, after) = grad_and_value(objective, has_aux=True)((params, heads))
        return Update(gradient, after, {**heads, "step": state["step"] + 1}, value.detach(), to_heads)

    def predict(self, params: Tensors, buffers: Tensors, state: Tensors, x: Tensor) -> Tensor:
        """The network's own output; see :class:`pomona.train.rule.Rule`."""
        self.supervised.eval()
        return functional_call(self.supervised.net, {**params, **buffers}, (x,))

    def model(self, net: nn.Module, state: Mapping[str, Tensor]) -> DeeplySupervised:
        """The trained network with its trained companions, in evaluation mode."""
        model = copy.deepcopy(self.supervised)
        model.net.load_state_dict(net.state_dict())
        model.heads.load_state_dict({name: state[own] for own, name in self.names.items()})
        return model.to(next(net.parameters()).device).eval()


def feature_probe(
    net: nn.Module, task: Task, taps: Sequence[str], split: str = "valid", limit: int = 2000
) -> dict[str, float]:
    """Accuracy on a split of logistic regression on each layer's output, fitted on at most ``limit`` training examples.

    Source: Deeply-Supervised Nets (arXiv 1409.5185).
    """
    model = DeeplySupervised(copy.deepcopy(net).eval(), taps, example=task.example)
    (x, y), (x_new, y_new) = task.splits["train"], task.splits[split]
    with torch.no_grad():
        pairs = zip(taps, model.run(x[:limit])[1], model.run(x_new)[1], strict=True)
    accuracy = {}
    for name, old, new in pairs:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        fitted = probe.fit(old.flatten(1).cpu().numpy(), y[:limit].cpu().numpy())
        accuracy[name] = float(fitted.score(new.flatten(1).cpu().numpy(), y_new.cpu().numpy()))
    return accuracy
