r"""A network of parallel branches to search in: every block holds all candidates, and a factor for each channel.

.. math:: y = [x] + \mathrm{norm}\Big(\sum_b W_b \,\sigma\big(\gamma_b \,\widehat{m_b(\sigma(\mathrm{norm}(V_b x)))}
          + \beta_b\big)\Big)

The mixing m of a branch works on each channel alone: a depthwise convolution, or attention to a pooled image. A channel
with gamma = beta = 0 therefore adds nothing.

Source: HR-NAS: Searching Efficient High-Resolution Neural Architectures with Lightweight Transformers
(arXiv 2106.06560); AtomNAS: Fine-Grained End-to-End Neural Architecture Search (arXiv 1912.09640).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.errors import PomonaError, check_positive

Kind = int | str
ATTENTION = "attention"


class Branches(nn.ModuleDict):
    """The sum of its modules' outputs; zero, in the shape of the input, without any.

    Args:
        branches: by name.
        required: the last branch may not be taken away, as there is no shortcut around.
    """

    def __init__(self, branches: Mapping[str, nn.Module], required: bool) -> None:
        super().__init__(branches)
        self.required = required

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H', W')."""
        outputs = [branch(x) for branch in self.values()]
        return torch.stack(outputs).sum(0) if outputs else torch.zeros_like(x)


class ConvBranch(nn.Module):
    """Expand by a 1x1 convolution, mix positions channel by channel, scale by the ``factor`` norm, project.

    Args:
        channels, hidden, out: of the input, inside and of the output.
        kernel: of the depthwise convolution, odd.
        stride: of the block.
    """

    def __init__(self, channels: int, hidden: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.mix = self._mix(channels, hidden, kernel, stride)
        self.factor, self.project = nn.BatchNorm2d(hidden), nn.Conv2d(hidden, out, 1, bias=False)

    def _mix(self, channels: int, hidden: int, kernel: int, stride: int) -> nn.Module:
        return nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False)

    def _mixed(self, h: Tensor, x: Tensor) -> Tensor:
        return self.mix(h)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H', W')."""
        h = F.relu(self.norm(self.expand(x)))
        return self.project(F.relu(self.factor(self._mixed(h, x))))


class AttentionBranch(ConvBranch):
    """A branch in which every position attends to an image pooled to ``kernel`` x ``kernel``.

    Queries and keys come from the input, not from the channels that may go.
    """

    def _mix(self, channels: int, hidden: int, kernel: int, stride: int) -> nn.Module:
        self.pool = nn.AdaptiveAvgPool2d(kernel)
        self.query, self.key = nn.Conv2d(channels, 8, 1, stride), nn.Conv2d(channels, 8, 1)
        return nn.Identity()

    def _mixed(self, h: Tensor, x: Tensor) -> Tensor:
        query, key, value = self.query(x), self.key(self.pool(x)), self.pool(h)
        q, k, v = (part.flatten(2).transpose(1, 2).unsqueeze(1) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return mixed.unflatten(2, query.shape[2:])


class SuperBlock(nn.Module):
    """All branches side by side, a norm of their sum, and a shortcut where shapes allow it (the identity branch).

    Args:
        channels, out, stride: of the block.
        hidden: channels inside each branch.
        kinds: kernel sizes of convolution branches, and ``"attention"``.

    Raises:
        PomonaError: an even kernel or another word.
    """

    def __init__(self, channels: int, out: int, stride: int, hidden: int, kinds: Iterable[Kind]) -> None:
        super().__init__()
        self.shortcut = stride == 1 and channels == out
        made: dict[str, nn.Module] = {}
        for kind in kinds:
            if kind == ATTENTION:
                made[ATTENTION] = AttentionBranch(channels, hidden, out, 4, stride)
            elif isinstance(kind, int) and kind % 2:
                made[f"conv{kind}"] = ConvBranch(channels, hidden, out, kind, stride)
            else:
                raise PomonaError(f"kinds holds {kind!r}; give odd kernel sizes or {ATTENTION!r}")
        self.branches, self.norm = Branches(made, required=not self.shortcut), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H', W')."""
        y = self.norm(self.branches(x))
        return x + y if self.shortcut else y


class Supernet(nn.Module):
    """A stem, blocks of parallel branches, the mean over positions and a linear head.

    Args:
        channels: of the images.
        outputs: of the head.
        stages: ``(width, stride)`` of each block.
        hidden: channels inside each branch.
        kinds: see :class:`SuperBlock`.
        stem_stride: of the first convolution, whose kernel reaches over all it skips.

    Source: HR-NAS: Searching Efficient High-Resolution Neural Architectures with Lightweight Transformers
    (arXiv 2106.06560).
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        stages: Sequence[tuple[int, int]] = ((16, 1), (16, 2), (16, 1)),
        hidden: int = 16,
        kinds: Sequence[Kind] = (3, 5, 7),
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        check_positive(hidden=hidden, stages=len(stages), kinds=len(kinds))
        width, kernel = stages[0][0], max(3, 2 * stem_stride - 1)
        conv = nn.Conv2d(channels, width, kernel, stem_stride, kernel // 2, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential()
        for out, stride in stages:
            self.blocks.append(SuperBlock(width, out, stride, hidden, kinds))
            width = out
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs)."""
        return self.head(self.blocks(self.stem(x)).mean((-2, -1)))
