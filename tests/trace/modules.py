"""Parts and whole networks of many architectures, small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *[nn.ReLU()] * act)


class Residual(nn.Module):
    def __init__(self, body: nn.Module, short: nn.Module | None = None, act: bool = True):
        super().__init__()
        self.body, self.short, self.act = body, short or nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        y = self.short(x) + self.body(x)
        return F.relu(y) if self.act else y


def basic(i: int, o: int, stride: int = 1) -> Residual:
    short = None if stride == 1 and i == o else conv_bn(i, o, 1, stride, act=False)
    return Residual(nn.Sequential(conv_bn(i, o, 3, stride), conv_bn(o, o, act=False)), short)


def bottleneck(i: int, o: int, mid: int, stride: int = 1, groups: int = 1) -> Residual:
    short = None if stride == 1 and i == o else conv_bn(i, o, 1, stride, act=False)
    body = nn.Sequential(conv_bn(i, mid, 1), conv_bn(mid, mid, 3, stride, groups), conv_bn(mid, o, 1, act=False))
    return Residual(body, short)


def classifier(*layers: nn.Module, width: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def vgg() -> nn.Module:
    features = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
    head = (nn.Flatten(), nn.Linear(12 * 16, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5))
    return nn.Sequential(*features, nn.MaxPool2d(2), *head)


def resnet20(width: int = 16, blocks: int = 3) -> nn.Module:
    layers: list[nn.Module] = [conv_bn(3, width)]
    i = width
    for stage in range(3):
        for block in range(blocks):
            o = width * 2**stage
            layers.append(basic(i, o, 2 if stage and not block else 1))
            i = o
    return classifier(*layers, width=i)


class Dense(nn.Module):
    def __init__(self, i: int, growth: int):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(i), nn.Conv2d(i, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def densenet() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), Dense(8, 4), Dense(12, 4), Dense(16, 4), conv_bn(20, 10, 1), nn.AvgPool2d(2)]
    return classifier(*layers, Dense(10, 4), Dense(14, 4), nn.BatchNorm2d(18), width=18)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


def mobilenet() -> nn.Module:
    def block(i: int, wide: int, o: int, stride: int = 1) -> nn.Module:
        body = nn.Sequential(
            conv_bn(i, wide, 1),
            conv_bn(wide, wide, 3, stride, wide),
            SqueezeExcite(wide, 4),
            conv_bn(wide, o, 1, act=False),
        )
        return Residual(body, act=False) if i == o and stride == 1 else body

    return classifier(conv_bn(3, 8), block(8, 16, 8), block(8, 24, 12, 2), block(12, 24, 12), width=12)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return classifier(nn.Conv2d(3, 8, 2, 2), ConvNeXtBlock(8), nn.Conv2d(8, 12, 2, 2), ConvNeXtBlock(12), width=12)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 6), conv_bn(6, 8), conv_bn(8, 12)
        self.up2, self.up1 = nn.ConvTranspose2d(12, 8, 2, 2), nn.ConvTranspose2d(8, 6, 2, 2)
        self.d2, self.d1, self.head = conv_bn(16, 8), conv_bn(12, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        d = self.d2(torch.cat([self.up2(c), b], 1))
        return self.head(self.d1(torch.cat([self.up1(d), a], 1)))


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 10), nn.GELU(), nn.Linear(10, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 14), nn.GELU(), nn.Linear(14, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(3, 12, 4, 4), nn.Sequential(MixerBlock(4, 12), MixerBlock(4, 12))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch(x).flatten(2).transpose(1, 2))).mean(1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, t, self.heads * self.head_dim))


class PreNorm(nn.Module):
    def __init__(self, width: int, body: nn.Module):
        super().__init__()
        self.norm, self.body = nn.LayerNorm(width), body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(self.norm(x))


class ViT(nn.Module):
    def __init__(self, width: int = 12, heads: int = 3, depth: int = 2):
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(
            *(
                layer
                for _ in range(depth)
                for layer in (
                    PreNorm(width, Attention(width, heads)),
                    PreNorm(width, nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))),
                )
            )
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class WindowAttention(nn.Module):
    """Windows of 2x2, rolled by one, with a relative position bias and heads mixed before and after the softmax."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.before, self.after = nn.Linear(heads, heads), nn.Linear(heads, heads)
        self.table = nn.Parameter(torch.randn(9, heads))
        at = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None]
        self.register_buffer("index", (apart[0] + 1) * 3 + apart[1] + 1)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = torch.roll(x, (-1, -1), (1, 2)).view(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        q, k, v = (z.view(-1, 4, self.heads, c // self.heads).transpose(1, 2) for z in self.qkv(y).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5
        scores = scores + self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        scores = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        scores = self.after(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.proj((scores @ v).transpose(1, 2).reshape(-1, 4, c))
        y = y.view(b, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(b, h, w, c)
        return torch.roll(y, (1, 1), (1, 2))


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.body = nn.Conv2d(3, 12, 2, 2), PreNorm(12, WindowAttention(12, 3))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.patch(x).permute(0, 2, 3, 1))).mean((1, 2)))


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 24), nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.up(x).chunk(2, -1)
        return self.down(self.norm(u) * torch.sigmoid(v))


def groupnorm() -> nn.Module:
    def block(i: int, o: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(4, o), nn.SiLU()

    return classifier(*block(3, 8), *block(8, 16), width=16)


def grouped() -> nn.Module:
    return classifier(conv_bn(3, 8), bottleneck(8, 16, 8, groups=4), bottleneck(16, 16, 8, groups=4), width=16)


class WeightStandardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) * (w.var((1, 2, 3), keepdim=True) + 1e-5).rsqrt()
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def standardized() -> nn.Module:
    return classifier(
        WeightStandardized(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), WeightStandardized(8, 6, 3), nn.ReLU(), width=6
    )


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.rnn = kind(6, 8, batch_first=True, **options)
        self.head = nn.Linear(8 * (2 if options.get("bidirectional") else 1), 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0][:, -1])


def weight_norm() -> nn.Module:
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Linear(6, 10)), nn.ReLU(), norm(nn.Linear(10, 8)), nn.ReLU(), nn.Linear(8, 3))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.a, self.b = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(16, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = F.relu(self.left(x)), torch.tanh(self.right(y))
        return self.a(x * y), self.b(torch.cat([x, y], -1))


class DictOutput(TwoInputs):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        a, b = super().forward(x, y)
        return {"a": a, "more": b}


@dataclass
class Result:
    a: Tensor
    b: Tensor | None = None


class DataclassOutput(TwoInputs):
    def forward(self, x: Tensor, y: Tensor) -> Result:  # type: ignore[override]
        return Result(super().forward(x, y)[0])


class WrittenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale, self.down = nn.Linear(6, 10), nn.Parameter(torch.rand(10)), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return self.down(F.silu(x))


class Shuffle(nn.Module):
    """ShuffleNet's unit: half of the channels pass, then all are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv_bn(3, 8), nn.Sequential(conv_bn(4, 4), conv_bn(4, 4)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        y = torch.cat([a, self.body(b)], 1)
        y = y.view(len(y), 2, 4, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head(y.mean((2, 3)))


class EinsumAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(2, 8, 4)) for _ in range(3))
        self.out, self.head = nn.Parameter(torch.randn(2, 4, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (torch.einsum("btc,hcd->bhtd", x, w) for w in (self.q, self.k, self.v))
        a = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
        return self.head(x + torch.einsum("bhqk,bhkd,hdc->bqc", a, v, self.out))


class HaloAttention(nn.Module):
    """Windows that see a larger one around them; a head's keys and values lie side by side in one layer."""

    def __init__(self, heads: int = 2, k: int = 4, v: int = 6) -> None:
        super().__init__()
        self.heads, self.k, self.v = heads, k, v
        self.q, self.kv = nn.Conv2d(3, heads * k, 1), nn.Conv2d(3, heads * (k + v), 1, bias=False)
        self.position, self.out = nn.Parameter(torch.randn(36, k)), nn.Conv2d(heads * v, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).reshape(-1, self.k, 2, 4, 2, 4).permute(0, 1, 3, 5, 2, 4)
        q = q.reshape(self.heads, self.k, 16, 4).transpose(1, 3)
        kv = F.pad(self.kv(x), [1, 1, 1, 1]).unfold(2, 6, 4).unfold(3, 6, 4)
        kv = kv.reshape(self.heads, self.k + self.v, 4, 36).permute(0, 2, 3, 1)
        k, v = kv.split([self.k, self.v], -1)
        near = (q.reshape(-1, 16, self.k) @ self.position.T).reshape(self.heads, 4, 16, 36)
        y = (q @ k.transpose(-1, -2) + near).softmax(-1) @ v
        y = y.transpose(1, 3).reshape(-1, 4, 4, 2, 2).permute(0, 3, 1, 4, 2)
        return self.out(y.reshape(1, self.heads * self.v, 8, 8))
