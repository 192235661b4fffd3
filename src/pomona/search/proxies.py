"""Scores of an untrained network that are to predict its accuracy after training.

Every proxy is called ``proxy(net, x, y) -> float``, larger is better, and leaves the network as it was.

Sources: GradSign (arXiv 2110.08616); snip (arXiv 1810.02340); grasp (arXiv 2002.07376); synflow (arXiv 2006.05467);
fisher (arXiv 1906.04113); jacob_cov and naswot (arXiv 2006.04647); their use as proxies (arXiv 2101.08134).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from pomona.errors import PomonaError, check_positive, unknown
from pomona.search.strategies import Arch, Strategy

Loss = Callable[[Tensor, Tensor], Tensor]


class Proxy(Protocol):
    """``proxy(net, x, y) -> float``: x ``(n, ...)``, y ``(n,)``."""

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> float: ...


def _weights(net: nn.Module, params: str = "weights") -> dict[str, Tensor]:
    """Name -> parameter: weight matrices of convolutions and linear layers, or all that are trained."""
    if params == "all":
        return {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    if params != "weights":
        raise unknown("params", params, ["weights", "all"])
    layers = {name: m for name, m in net.named_modules() if isinstance(m, (_ConvNd, nn.Linear))}
    found = {f"{name}.weight" if name else "weight": m.weight.detach() for name, m in layers.items()}
    if not found:
        raise PomonaError("params='weights' finds no convolution or linear layer; use params='all'")
    return found


def _batch_gradient(net: nn.Module, x: Tensor, y: Tensor, loss_fn: Loss) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and their gradients of the loss of the whole batch, batch normalisation as in training."""
    net = on_batch_statistics(net)
    theta = _weights(net)
    return theta, grad(lambda t: loss_fn(functional_call(net, t, (x,)), y))(theta)


def on_batch_statistics(net: nn.Module) -> nn.Module:
    """A copy in evaluation mode (no dropout) whose batch normalisations use the statistics of each batch."""
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return net


def with_batch_statistics(net: nn.Module, x: Tensor) -> nn.Module:
    """A copy in evaluation mode whose batch normalisations hold the statistics of ``x``."""
    net = copy.deepcopy(net).eval().requires_grad_(False)
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    if norms:
        with torch.no_grad():
            net(x)
    return net.eval()


def grad_sign(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss_fn: Loss = F.cross_entropy,
    reduce: Literal["sum", "mean"] = "sum",
    params: Literal["weights", "all"] = "weights",
    bn: Literal["frozen", "batch"] = "frozen",
    chunk_size: int = 16,
    repeats: int = 1,
    init_fn: Callable[[nn.Module], object] | None = None,
    seed: int = 0,
) -> float:
    """GradSign: how far the gradients of single examples agree in sign, ``S = sum_k | sum_i sign(g_ik) |``.

    Examples whose optima lie close together pull a random start the same way; ``S`` grows with the density of
    such optima.

    Args:
        net: the untrained network.
        x: ``(n, ...)``.
        y: ``(n,)``.
        loss_fn: mean loss of a batch.
        reduce: ``sum``, or ``mean``: S divided by n and the number of parameters, in [0, 1].
        params: weight matrices of convolutions and linear layers, or all parameters.
        bn: ``frozen``: normalise by the statistics of ``x`` held fixed; ``batch``: the gradient of each example's
            loss runs through the statistics of the shared batch.
        chunk_size: examples at a time; memory is chunk_size x parameters.
        repeats: average over the network as given and ``repeats - 1`` new initialisations.
        init_fn: initialises a network in place (default: every module's ``reset_parameters``).
        seed: of the new initialisations.

    Source: "GradSign: Model Performance Inference with Theoretical Insights" (arXiv 2110.08616).
    """
    check_positive(chunk_size=chunk_size, repeats=repeats)
    if reduce not in ("sum", "mean"):
        raise unknown("reduce", reduce, ["sum", "mean"])
    if bn not in ("frozen", "batch"):
        raise unknown("bn", bn, ["frozen", "batch"])
    scores = []
    for repeat in range(repeats):
        start = net if repeat == 0 else reinitialised(net, init_fn, seed + repeat)
        start = with_batch_statistics(start, x) if bn == "frozen" else on_batch_statistics(start)
        theta = _weights(start, params)
        signs = _signs_frozen if bn == "frozen" else _signs_batch
        count = signs(start, theta, x, y, loss_fn, chunk_size)
        score = sum(part.abs().sum() for part in count.values())
        size = len(x) * sum(part.numel() for part in count.values()) if reduce == "mean" else 1
        scores.append(float(score) / size)
    return sum(scores) / repeats


def _signs_frozen(
    net: nn.Module, theta: dict[str, Tensor], x: Tensor, y: Tensor, loss_fn: Loss, chunk: int
) -> dict[str, Tensor]:
    """``sum_i sign(g_i)``, the examples apart from one another."""

    def loss(theta: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(functional_call(net, dict(theta), (x[None],)), y[None])

    gradients = vmap(grad(loss), (None, 0, 0), randomness="same")
    count = {name: torch.zeros_like(value) for name, value in theta.items()}
    for start in range(0, len(x), chunk):
        part = gradients(theta, x[start : start + chunk], y[start : start + chunk])
        for name in count:
            count[name] += part[name].sign().sum(0)
    return count


def _signs_batch(
    net: nn.Module, theta: dict[str, Tensor], x: Tensor, y: Tensor, loss_fn: Loss, chunk: int
) -> dict[str, Tensor]:
    """``sum_i sign(g_i)``, every example's loss through one forward pass of the whole batch."""
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    output = functional_call(net, leaves, (x,))
    losses = torch.stack([loss_fn(o[None], t[None]) for o, t in zip(output, y, strict=True)])
    count = {name: torch.zeros_like(value) for name, value in theta.items()}
    for value in losses:
        parts = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, materialize_grads=True)
        for name, part in zip(leaves, parts, strict=True):
            count[name] += part.sign()
    return count


def reinitialised(net: nn.Module, init_fn: Callable[[nn.Module], object] | None, seed: int) -> nn.Module:
    """A copy with new initial weights drawn under ``seed``."""
    net = copy.deepcopy(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if init_fn is not None:
            init_fn(net)
        else:
            for module in net.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # type: ignore[operator]
    return net


def psi(local_optima: Tensor, H: float) -> float:
    """``Psi = sqrt(H) / n^2 * sum_ij || theta_i* - theta_j* ||_1``: spread of the optima of single examples.

    With second derivatives at most H in size, the mean loss at the joint optimum is at most ``n^3/2 * Psi^2``
    above the mean of the examples' own minima.

    Args:
        local_optima: ``(n, P)``.
        H: bound on the second derivatives.
    """
    check_positive(H=H)
    n = len(local_optima)
    ranks = 2 * torch.arange(n, dtype=local_optima.dtype) - n + 1  # sum_ij |a_i - a_j| = 2 sum_i ranks_i a_(i)
    total = 2 * (ranks[:, None] * local_optima.sort(0).values).sum()
    return float(H**0.5 / n**2 * total)


def grad_norm(net: nn.Module, x: Tensor, y: Tensor, *, loss_fn: Loss = F.cross_entropy) -> float:
    """Sum over weight matrices of the norm of the batch gradient (arXiv 2101.08134)."""
    _, g = _batch_gradient(net, x, y, loss_fn)
    return float(sum(part.norm() for part in g.values()))


def snip(net: nn.Module, x: Tensor, y: Tensor, *, loss_fn: Loss = F.cross_entropy) -> float:
    """``sum | theta * g |``: first-order change of the loss when weights are removed (arXiv 1810.02340)."""
    theta, g = _batch_gradient(net, x, y, loss_fn)
    return float(sum((theta[name] * g[name]).abs().sum() for name in theta))


def grasp(net: nn.Module, x: Tensor, y: Tensor, *, loss_fn: Loss = F.cross_entropy) -> float:
    """``-sum theta * (H g)``: change of the gradient's size when weights are removed (arXiv 2002.07376)."""
    net = on_batch_statistics(net)
    theta = _weights(net)

    def gradient(t: dict[str, Tensor]) -> dict[str, Tensor]:
        return grad(lambda w: loss_fn(functional_call(net, w, (x,)), y))(t)

    g = gradient(theta)
    # H g is the gradient of <gradient(theta), g>
    hg = grad(lambda t: torch.stack([(a * g[name]).sum() for name, a in gradient(t).items()]).sum())(theta)
    return -float(sum((theta[name] * hg[name]).sum() for name in theta))


def synflow(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """``sum theta * dR/dtheta``, R the output at all-ones input with every weight replaced by its size.

    In float64, without normalisation layers; needs no data (arXiv 2006.05467).
    """
    net = copy.deepcopy(net).double().eval().requires_grad_(False)
    for module in net.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, (_BatchNorm, nn.LayerNorm, nn.GroupNorm)):
                setattr(module, name, nn.Identity())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_()
    theta = _weights(net)
    ones = torch.ones(1, *x.shape[1:], dtype=torch.float64, device=x.device)
    g = grad(lambda t: functional_call(net, t, (ones,)).sum())(theta)
    return float(sum((theta[name] * g[name]).sum() for name in theta))


def fisher(net: nn.Module, x: Tensor, y: Tensor, *, loss_fn: Loss = F.cross_entropy) -> float:
    """``sum_c 1/(2n) sum_i (sum_positions a dL/da)^2`` over channels of all convolution and linear outputs.

    Second-order estimate of the loss change when a channel is removed (arXiv 1801.05787, 1906.04113); ``L`` is the
    summed loss of the batch.
    """
    net = on_batch_statistics(net).requires_grad_()  # so that cells without a path still have a graph
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs.append(output)

    for module in net.modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            module.register_forward_hook(keep)
    with torch.enable_grad():
        loss = len(x) * loss_fn(net(x), y)
    gradients = torch.autograd.grad(loss, outputs, materialize_grads=True)
    total = 0.0
    for a, g in zip(outputs, gradients, strict=True):
        product = (a * g).detach()
        channels = (
            product.flatten(2).sum(2) if product.ndim > 3 else product.reshape(len(x), -1, product.shape[-1]).sum(1)
        )
        total += float(channels.square().sum()) / (2 * len(x))
    return total


def spectrum_score(rows: Tensor, k: float = 1e-5) -> float:
    """``-sum_n [ log(l_n + k) + 1/(l_n + k) ]``, ``l_n`` the eigenvalues of the rows' correlation matrix.

    Largest when rows are uncorrelated; a constant row counts as eigenvalue 0.
    """
    rows = rows.detach().double()
    centred = rows - rows.mean(1, keepdim=True)
    norm = centred.norm(dim=1)
    alive = norm > 1e-12 * rows.norm(dim=1).clamp(min=1e-300)
    unit = centred[alive] / norm[alive, None]
    values = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    values[: len(unit)] = torch.linalg.eigvalsh(unit @ unit.mT).clamp(min=0)
    return -float((torch.log(values + k) + 1 / (values + k)).sum())


def jacob_cov(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """``spectrum_score`` of the input Jacobians of the summed outputs, a row an example (arXiv 2006.04647v1)."""
    net = on_batch_statistics(net).requires_grad_()
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        (jacobian,) = torch.autograd.grad(net(leaf).sum(), leaf, materialize_grads=True)
    return spectrum_score(jacobian.flatten(1))


class _ActivationCodes(TorchFunctionMode):
    """Collects ``input > 0`` of every activation function called, module or functional."""

    FUNCTIONS = frozenset(
        {
            F.relu, torch.relu, torch.relu_, Tensor.relu, F.leaky_relu, F.elu, F.gelu, F.silu, F.softplus, F.hardtanh,
            F.tanh, torch.tanh, Tensor.tanh, F.sigmoid, torch.sigmoid, Tensor.sigmoid, F.selu, F.celu, F.mish,
        }
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.codes: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FUNCTIONS:
            value = args[0] if args else (kwargs or {})["input"]
            self.codes.append((value.detach() > 0).flatten(1))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def naswot_kernel(net: nn.Module, x: Tensor) -> Tensor:
    """``K_ij = N_A - hamming(c_i, c_j)``, c the signs of the inputs of all N_A activation units. ``(n, n)``."""
    net = on_batch_statistics(net)
    with _ActivationCodes() as mode:
        net(x)
    if not mode.codes:
        raise PomonaError("net calls no activation function such as relu; naswot compares their codes")
    signs = torch.cat(mode.codes, dim=1).double() * 2 - 1
    return (signs @ signs.mT + signs.shape[1]) / 2


def naswot(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """``log det K`` of ``naswot_kernel``: examples told apart by their activation codes (arXiv 2006.04647)."""
    sign, logdet = torch.linalg.slogdet(naswot_kernel(net, x))
    return float(logdet) if sign > 0 else float("-inf")


def num_params(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Number of parameters: the reference that a proxy must beat."""
    return float(sum(parameter.numel() for parameter in net.parameters()))


PROXIES: dict[str, Proxy] = {
    "grad_sign": grad_sign,
    "grad_norm": grad_norm,
    "snip": snip,
    "grasp": grasp,
    "synflow": synflow,
    "fisher": fisher,
    "jacob_cov": jacob_cov,
    "naswot": naswot,
    "num_params": num_params,
}


class ProxyAssisted:
    """A strategy that proposes a pool, of which the proxy picks the one to train.

    Args:
        strategy: proposes; it hears only of the architectures that were trained.
        proxy: architecture -> score, larger is better.
        pool: proposals to choose among.

    Source: GradSign-assisted search (arXiv 2110.08616).
    """

    def __init__(self, strategy: Strategy, proxy: Callable[[Arch], float], pool: int = 10) -> None:
        check_positive(pool=pool)
        self.strategy, self.proxy, self.pool = strategy, proxy, pool

    def ask(self) -> Arch:
        """The best of ``pool`` proposals by the proxy."""
        return max((self.strategy.ask() for _ in range(self.pool)), key=self.proxy)

    def tell(self, arch: Arch, score: float) -> None:
        """Pass the result on."""
        self.strategy.tell(arch, score)
