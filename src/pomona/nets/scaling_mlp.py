"""Plain and inverted-bottleneck MLPs on flattened images, and what their training recipe does to the images.

Source: Scaling MLPs: A Tale of Inductive Bias, arXiv 2306.13575.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive
from pomona.nn.check import check_input
from pomona.nn.norm import Norm


class ScalingMLP(nn.Module):
    """head(blocks(embed(x))) of flattened images.

    Shape:
        (B, *) with d_in numbers an example -> (B, d_out)
    """

    d_in: int
    embed: nn.Linear
    blocks: nn.Sequential
    head: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """What the head receives: (B, its width)."""
        x = x.flatten(1)
        check_input(self, x, self.d_in)
        return self.blocks(self.embed(x))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.head(self.features(x))


class StandardMLP(ScalingMLP):
    """z_1 = W_1 x;  z_{l+1} = W_{l+1} gelu(LN(z_l));  no skip connections.

    Args:
        d_in, d_out: numbers in an input, and outputs.
        widths: of z_1, z_2, ...

    Shape:
        (B, *) with d_in numbers an example -> (B, d_out)
    """

    def __init__(self, d_in: int, d_out: int, widths: Sequence[int] = (1024,) * 6) -> None:
        super().__init__()
        if not widths:
            raise PomonaError("widths=() must hold at least one width")
        check_positive(d_in=d_in, d_out=d_out, widths=min(widths))
        self.d_in = d_in
        self.embed = nn.Linear(d_in, widths[0])
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.LayerNorm(a), nn.GELU(), nn.Linear(a, b)) for a, b in itertools.pairwise(widths)),
            nn.Sequential(nn.LayerNorm(widths[-1]), nn.GELU()),
        )
        self.head = nn.Linear(widths[-1], d_out)


class InvertedBottleneck(nn.Module):
    """x + W_2 gelu(W_1 norm(x)), with W_1 from m up to the wide layer.

    Parameters with a wide layer of 4 m and layer norm: 8 m^2 weights, 5 m biases, 2 m of the norm.

    Shape:
        (*, thin) -> (*, thin)
    """

    def __init__(self, thin: int, wide: int, norm: str = "layer") -> None:
        super().__init__()
        self.norm = Norm(norm, thin)
        self.up, self.down = nn.Linear(thin, wide), nn.Linear(wide, thin)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class InvertedBottleneckMLP(ScalingMLP):
    """Embedding to a thin stream, `InvertedBottleneck` blocks on it, and a linear head: head(blocks(embed(x))).

    Args:
        d_in, d_out: numbers in an input, and outputs.
        thin: m, width of the stream.
        wide: width inside a block, 4 m by default.
        depth: blocks.
        norm: a name of `pomona.nn.norm.Norm`.

    Shape:
        (B, *) with d_in numbers an example -> (B, d_out)
    """

    def __init__(
        self, d_in: int, d_out: int, thin: int = 1024, wide: int | None = None, depth: int = 6, norm: str = "layer"
    ) -> None:
        super().__init__()
        wide = 4 * thin if wide is None else wide
        check_positive(d_in=d_in, d_out=d_out, thin=thin, wide=wide, depth=depth)
        self.d_in = d_in
        self.embed = nn.Linear(d_in, thin)
        self.blocks = nn.Sequential(*(InvertedBottleneck(thin, wide, norm) for _ in range(depth)))
        self.head = nn.Linear(thin, d_out)

    @classmethod
    def named(cls, name: str, d_in: int, d_out: int, **options: Any) -> InvertedBottleneckMLP:
        """From the paper's names: 'B-12/Wi-1024' has 12 blocks and a stream of 1024.

        Raises:
            PomonaError: for a name of another form.
        """
        found = re.fullmatch(r"B-(\d+)/Wi-(\d+)", name)
        if found is None:
            raise PomonaError(f"name={name!r} is not of the form B-12/Wi-1024: blocks and width")
        return cls(d_in, d_out, thin=int(found[2]), depth=int(found[1]), **options)


def permute_input(net: ScalingMLP, order: Tensor) -> ScalingMLP:
    """A copy, the columns of its embedding permuted, that gives for inputs x[order] what ``net`` gives for x."""
    new = copy.deepcopy(net)
    with torch.no_grad():
        new.embed.weight.copy_(net.embed.weight[:, order])
    return new


def first_layer_filters(net: ScalingMLP, shape: Sequence[int]) -> Tensor:
    """The weights of the embedding as images (units, *shape)."""
    return net.embed.weight.detach().unflatten(1, tuple(shape))


def random_crop_flip(x: Tensor, pad: int, flip: bool = True, generator: torch.Generator | None = None) -> Tensor:
    """Each image (B, C, H, W) moved by up to ``pad`` pixels with zeros behind, and mirrored with probability 1/2."""
    count, _, height, width = x.shape

    def draw(high: int) -> Tensor:
        return torch.randint(high, (count, 1), generator=generator, device=x.device)

    rows = draw(2 * pad + 1) + torch.arange(height, device=x.device)
    columns = draw(2 * pad + 1) + torch.arange(width, device=x.device)
    if flip:
        columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    images = torch.arange(count, device=x.device)[:, None, None]
    return F.pad(x, (pad,) * 4).movedim(1, -1)[images, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


class Augmented(nn.Module):
    """A network that sees random crops and mirror images while it trains, and images as they are in evaluation.

    Shape:
        (B, C, H, W) -> net's output
    """

    def __init__(self, net: nn.Module, pad: int = 4, flip: bool = True) -> None:
        super().__init__()
        self.net, self.pad, self.flip = net, pad, flip

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.net(random_crop_flip(x, self.pad, self.flip) if self.training else x)


@torch.no_grad()
def predict_tta(
    net: nn.Module, x: Tensor, crops: int = 100, *, pad: int = 4, flip: bool = True, seed: int = 0
) -> Tensor:
    """Class probabilities averaged over random crops of each image: (B, C, H, W) -> (B, classes)."""
    check_positive(crops=crops)
    generator = torch.Generator(x.device).manual_seed(seed)
    training = net.training
    net.eval()
    total = sum(net(random_crop_flip(x, pad, flip, generator)).softmax(-1) for _ in range(crops))
    net.train(training)
    return torch.as_tensor(total) / crops


class FineTuned(nn.Module):
    """A copy of a trained network with a fresh head, whose body learns ``body_lr`` times as fast.

    Meant for ``Training(optimizer="sgd")``, as in the paper.

    Args:
        net: trained on other data.
        classes: outputs of the new head, which starts at 0.

    Shape:
        net's input -> (B, classes)
    """

    def __init__(self, net: ScalingMLP, classes: int, body_lr: float = 0.1) -> None:
        super().__init__()
        self.net, self.body_lr = copy.deepcopy(net), body_lr
        self.net.head = nn.Linear(net.head.in_features, classes).to(net.head.weight)
        nn.init.zeros_(self.net.head.weight)
        nn.init.zeros_(self.net.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.net(x)

    def param_groups(self) -> list[dict[str, Any]]:
        """The body with its factor on the learning rate."""
        body = [*self.net.embed.parameters(), *self.net.blocks.parameters()]
        return [{"params": body, "lr_scale": self.body_lr}]
