"""Very deep MLPs with batch normalisation whose gradients neither vanish nor explode.

Source: Towards Training Without Depth Limits: Batch Normalization Without Gradient Explosion (arXiv 2310.02012).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pomona.errors import check_positive, unknown
from pomona.nn.check import check_input

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "id": lambda x: x,
    "sin": torch.sin,
    "tanh": torch.tanh,
    "relu": torch.relu,
}
WEIGHTS, ORDERS = ("haar", "gaussian"), ("act_norm", "norm_act")


def haar(rows: int, columns: int, generator: torch.Generator | None = None) -> Tensor:
    """An orthogonal matrix drawn uniformly (orthonormal rows or columns where it is not square): (rows, columns).

    QR of a Gaussian matrix, with the signs of R's diagonal put into Q; without them Q is not uniform.
    """
    return nn.init.orthogonal_(torch.empty(rows, columns), generator=generator)


class BatchScale(nn.Module):
    """Batch normalisation without gain and bias, and without the mean unless ``centre``: x / sqrt(mean_batch x^2).

    Args:
        features: size of the last axis.
        centre: subtract the batch's mean first.
        momentum: of the running statistics that evaluation takes; plain means until 1 / momentum batches are seen.
        eps: the smallest root mean square that is divided by.

    Shape:
        (batch, features) -> (batch, features)
    """

    mean: Tensor
    square: Tensor
    batches: Tensor

    def __init__(self, features: int, centre: bool = False, momentum: float = 0.1, eps: float = 1e-12) -> None:
        super().__init__()
        check_positive(features=features, momentum=momentum, eps=eps)
        self.centre, self.momentum, self.eps = centre, momentum, eps
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("square", torch.ones(features))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if not (self.training and len(x)):
            return (x - self.mean) / self.square.sqrt().clamp_min(self.eps)
        self.batches.add_(1)
        rate = (1 / self.batches).clamp_min(self.momentum).to(self.mean)
        if self.centre:
            mean = x.mean(0)
            self.mean.lerp_(mean.detach().to(self.mean), rate)
            x = x - mean
        square = x.square().mean(0)
        self.square.lerp_(square.detach().to(self.square), rate)
        return x / square.clamp_min(self.eps**2).sqrt()


class IsoMLP(nn.Module):
    """An MLP for depth without end: orthogonal weights, batch norm, activations that grow linear with depth.

    X <- BN(f(alpha_l X W_l^T)),  alpha_l = (l + 1)^e,  l = 0..depth - 1;  logits = X W^T + b

    The theory is for f = id without centring and a batch of at most ``width`` linearly independent examples: the
    gradients are then bounded whatever the depth. With dependent examples they diverge.

    Args:
        d_in, width, depth, classes: sizes; ``depth`` hidden layers.
        act: f: 'id', 'sin', 'tanh' or 'relu'.
        gain_exponent: e; about -1/2 for 'sin' and -1 for 'tanh', 0 leaves the activation as it is. With 'id' BN
            cancels it.
        order: 'act_norm' as above, or 'norm_act': X <- f(alpha_l BN(X W_l^T)).
        weights: 'haar' (uniform orthogonal) or 'gaussian' of variance 1 / fan in.
        centre: BN subtracts the mean, as it commonly does.
        generator: source of the initial values.

    Shape:
        (batch, *) with d_in numbers an example -> (batch, classes)

    Raises:
        PomonaError: for a size that is not positive or an unknown name.

    Source: Towards Training Without Depth Limits: Batch Normalization Without Gradient Explosion (arXiv 2310.02012).
    """

    def __init__(
        self,
        d_in: int,
        width: int,
        depth: int,
        classes: int,
        act: str = "sin",
        gain_exponent: float = -0.5,
        order: str = "act_norm",
        weights: str = "haar",
        centre: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(d_in=d_in, width=width, depth=depth, classes=classes)
        for field, value, choices in (
            ("act", act, ACTIVATIONS),
            ("order", order, ORDERS),
            ("weights", weights, WEIGHTS),
        ):
            if value not in choices:
                raise unknown(field, value, choices)
        self.d_in, self.act, self.gain_exponent, self.order = d_in, act, gain_exponent, order

        def draw(i: int) -> nn.Parameter:
            if weights == "haar":
                return nn.Parameter(haar(width, i, generator))
            return nn.Parameter(nn.init.normal_(torch.empty(width, i), std=i**-0.5, generator=generator))

        self.weights = nn.ParameterList(draw(width if layer else d_in) for layer in range(depth))
        self.norms = nn.ModuleList(BatchScale(width, centre) for _ in range(depth))
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=width**-0.5, generator=generator)
        nn.init.zeros_(self.head.bias)

    def hidden(self, x: Tensor) -> list[Tensor]:
        """The input and the output of every hidden layer: depth + 1 tensors (batch, features)."""
        x = x.flatten(1)
        check_input(self, x, self.d_in)
        f, found = ACTIVATIONS[self.act], [x]
        for layer, (weight, norm) in enumerate(zip(self.weights, self.norms, strict=True)):
            gain = (layer + 1) ** self.gain_exponent
            x = found[-1] @ weight.T
            found.append(norm(f(gain * x)) if self.order == "act_norm" else f(gain * norm(x)))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.hidden(x)[-1])

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"act={self.act!r}, gain_exponent={self.gain_exponent}, order={self.order!r}"
