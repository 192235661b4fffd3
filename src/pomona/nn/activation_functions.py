"""Activations with a formula of their own; ``activation`` holds the whole catalogue.

One that changes the width says so in ``out_factor``. Where a function has corners they are listed in
``kinks``, which the quadrature of ``gain`` uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown


class Activation(nn.Module):
    """Base of the activations below: elementwise and shape-preserving unless ``out_factor`` says otherwise.

    ``param_groups`` keeps weight decay off the parameters that shape the function.
    """

    out_factor: float = 1.0
    kinks: tuple[float, ...] = ()

    def param_groups(self) -> list[dict[str, object]]:
        """No weight decay on the parameters of the function."""
        own = list(self.parameters())
        return [{"params": own, "weight_decay": 0.0}] if own else []


_CDF: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda u: 0.5 * (1 + torch.erf(u / math.sqrt(2))),
    "tanh": lambda u: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))),
    "sigmoid": lambda u: torch.sigmoid(1.702 * u),
}


class GELU(Activation):
    """Gaussian error linear unit.

        f(x) = x Phi((x - mu) / sigma),        f'(x) = Phi(x) + x phi(x)  for mu = 0, sigma = 1

    Phi is the normal distribution function, or an approximation of it: 'tanh' is
    (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))/2 and 'sigmoid' is sigmoid(1.702 x). sigma -> 0 gives ReLU.

    Args:
        approximate: 'none', 'tanh' or 'sigmoid'.
        mu: mean of the threshold.
        sigma: standard deviation of the threshold.

    Raises:
        PomonaError: for an unknown ``approximate`` or ``sigma`` not above 0.

    Source: Gaussian Error Linear Units (arXiv 1606.08415).
    """

    def __init__(self, approximate: str = "none", mu: float = 0.0, sigma: float = 1.0) -> None:
        super().__init__()
        if approximate not in _CDF:
            raise unknown("approximate", approximate, _CDF)
        check_positive(sigma=sigma)
        self.approximate, self.mu, self.sigma = approximate, mu, sigma

    def keep(self, x: Tensor) -> Tensor:
        """The probability Phi((x - mu)/sigma) that a unit is kept."""
        return _CDF[self.approximate]((x - self.mu) / self.sigma)

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        if self.mu == 0 and self.sigma == 1 and self.approximate != "sigmoid":
            return F.gelu(x, approximate=self.approximate)
        return x * self.keep(x)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"approximate={self.approximate!r}, mu={self.mu}, sigma={self.sigma}"


class StochasticGELU(GELU):
    """Stochastic zero-or-identity map: x m with m ~ Bernoulli(Phi((x - mu)/sigma)) in training, GELU in eval.

    The mask carries no gradient, so a unit that is kept passes its gradient whole, like dropout with a rate
    that depends on the input.

    Args:
        approximate, mu, sigma: as in ``GELU``.
        generator: source of the masks; torch's default if None.

    Source: Gaussian Error Linear Units (arXiv 1606.08415), section 2.
    """

    def __init__(
        self,
        approximate: str = "none",
        mu: float = 0.0,
        sigma: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(approximate, mu, sigma)
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        if not self.training:
            return super().forward(x)
        uniform = torch.rand(x.shape, generator=self.generator, dtype=x.dtype, device=x.device)
        return torch.where(uniform < self.keep(x.detach()), x, 0.0)


class RReLU(Activation):
    """Leaky ReLU whose slope is Uniform(lower, upper) per element in training, its mean in eval.

    Source: Empirical Evaluation of Rectified Activations in Convolutional Network (arXiv 1505.00853).
    """

    kinks = (0.0,)

    def __init__(self, lower: float = 1 / 8, upper: float = 1 / 3, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not lower <= upper:
            raise PomonaError(f"lower={lower} must not be above upper={upper}")
        self.lower, self.upper, self.generator = lower, upper, generator

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        if not self.training:
            return torch.where(x > 0, x, (self.lower + self.upper) / 2 * x)
        uniform = torch.rand(x.shape, generator=self.generator, dtype=x.dtype, device=x.device)
        return torch.where(x > 0, x, (self.lower + (self.upper - self.lower) * uniform) * x)


class Swish(Activation):
    """f(x) = x sigmoid(beta x) with one beta a layer, trained unless ``trainable=False``.

    beta = 1 is SiLU; beta -> infinity gives ReLU.

    Source: Searching for Activation Functions (arXiv 1710.05941).
    """

    def __init__(self, beta: float = 1.0, trainable: bool = True) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(float(beta)), requires_grad=trainable)

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        return x * torch.sigmoid(self.beta * x)


class Sine(Activation):
    """f(x) = sin(w0 x).

    Source: Implicit Neural Representations with Periodic Activation Functions (arXiv 2006.09661).
    """

    def __init__(self, w0: float = 1.0) -> None:
        super().__init__()
        self.w0 = w0

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        return torch.sin(self.w0 * x)


class Snake(Activation):
    """f(x) = x + sin(a x)^2 / a with one frequency a a layer, trained unless ``trainable=False``.

    Source: Neural Networks Fail to Learn Periodic Functions and How to Fix It (arXiv 2006.08195).
    """

    def __init__(self, frequency: float = 1.0, trainable: bool = True) -> None:
        super().__init__()
        check_positive(frequency=frequency)
        self.frequency = nn.Parameter(torch.tensor(float(frequency)), requires_grad=trainable)

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        return x + torch.sin(self.frequency * x).square() / self.frequency


class GCU(Activation):
    """Growing cosine unit: f(x) = x cos(x). Source: Growing Cosine Unit (arXiv 2108.12943)."""

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        return x * torch.cos(x)


class ReLUSquared(Activation):
    """f(x) = max(0, x)^2. Source: Primer: Searching for Efficient Transformers (arXiv 2109.08668)."""

    kinks = (0.0,)

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        return torch.relu(x).square()


class Squareplus(Activation):
    """f(x) = (x + sqrt(x^2 + b))/2, a softplus without exponentials.

    Source: Squareplus (arXiv 2112.11687).
    """

    def __init__(self, b: float = 4.0) -> None:
        super().__init__()
        check_positive(b=b)
        self.b = b

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        return (x + torch.sqrt(x.square() + self.b)) / 2


class CReLU(Activation):
    """Concatenated ReLU: [max(0, x), max(0, -x)] along ``channel_dim``, so the width doubles.

    Source: Understanding and Improving Convolutional Neural Networks via Concatenated Rectified Linear Units
    (arXiv 1603.05201).
    """

    out_factor = 2.0
    kinks = (0.0,)

    def __init__(self, channel_dim: int = -1) -> None:
        super().__init__()
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        return torch.cat([torch.relu(x), torch.relu(-x)], self.channel_dim)


class Maxout(Activation):
    """The largest of each k neighbouring channels, so the width becomes 1/k.

    Raises:
        PomonaError: if k is below 2, or the channels of an input do not divide by it.

    Source: Maxout Networks (arXiv 1302.4389).
    """

    def __init__(self, k: int = 2, channel_dim: int = -1) -> None:
        super().__init__()
        if k < 2:
            raise PomonaError(f"k={k} must be at least 2: maxout takes the largest of k channels")
        self.k, self.channel_dim, self.out_factor = k, channel_dim, 1 / k

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        dim = self.channel_dim % x.ndim
        if x.shape[dim] % self.k:
            raise PomonaError(f"maxout k={self.k} needs channels it divides, got {x.shape[dim]}")
        return x.unflatten(dim, (x.shape[dim] // self.k, self.k)).max(dim + 1).values
