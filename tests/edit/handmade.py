"""Small networks with axes written by hand, independent of the trace."""

import torch
from torch import nn

from pomona.trace.axis import Axis, AxisSet, Fixed, Place


def axis(name, size, places, **more):
    """An axis from (tensor, dim, role) or (tensor, dim, role, indices of each unit)."""
    plain = torch.arange(size)[:, None]
    held = tuple(Place(*place[:3], place[3] if len(place) > 3 else plain) for place in places)
    return Axis(name, more.pop("kind", "unit"), size, held, **more)


def by_hand(net, example, *axes, fixed=()):
    return AxisSet(net, example, None, axes, tuple(fixed))


def mlp(act=nn.ReLU, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 8), act(), nn.Linear(8, 6), act(), nn.Linear(6, 3)).double()
    between = (act.__name__.lower(),)
    axes = by_hand(
        net,
        (torch.randn(4, 5).double(),),
        axis("0.weight", 8, [("0.weight", 0, "out"), ("0.bias", 0, "out"), ("2.weight", 1, "in")], between=between),
        axis("2.weight", 6, [("2.weight", 0, "out"), ("2.bias", 0, "out"), ("4.weight", 1, "in")], between=between),
        fixed=[Fixed("4.weight", 0, "the network's output")],
    )
    return net, axes


class ConvNet(nn.Module):
    """conv-bn-relu, depthwise conv, flatten, linear; channels last before the flatten if asked."""

    def __init__(self, last=False):
        super().__init__()
        self.conv, self.bn, self.deep = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 12, 3, groups=6)
        self.fc, self.last = nn.Linear(12 * 4, 3), last

    def forward(self, x):
        x = self.deep(torch.relu(self.bn(self.conv(x)))).relu()
        return self.fc((x.permute(0, 2, 3, 1) if self.last else x).flatten(1))


def convnet(last=False):
    torch.manual_seed(0)
    net = ConvNet(last).double()
    net.bn.running_mean.normal_()
    net.bn.running_var.uniform_(0.5, 2)
    pairs = torch.arange(12).view(6, 2)
    pixels = torch.arange(48).view(4, 12).T if last else torch.arange(48).view(12, 4)
    rows = [("conv.weight", 0, "out"), ("conv.bias", 0, "out"), ("deep.weight", 0, "out", pairs)]
    rows += [(f"bn.{leaf}", 0, "elem") for leaf in ("weight", "bias", "running_mean", "running_var")]
    rows += [("deep.bias", 0, "out", pairs), ("fc.weight", 1, "in", pixels[pairs].flatten(1))]
    axes = by_hand(net, (torch.randn(2, 2, 4, 4).double(),), axis("conv.weight", 6, rows, kind="block"))
    return net.eval(), axes


def plain_convnet():
    net, _ = convnet()
    net = nn.Sequential(net.conv, net.bn, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 3).double()).eval()
    rows = [("0.weight", 0, "out"), ("0.bias", 0, "out"), ("4.weight", 1, "in", torch.arange(96).view(6, 16))]
    rows += [(f"1.{leaf}", 0, "elem") for leaf in ("weight", "bias", "running_mean", "running_var")]
    return net, by_hand(net, (torch.randn(2, 2, 4, 4).double(),), axis("0.weight", 6, rows, between=("relu",)))


class Heads(nn.Module):
    """Attention of 4 heads of 6 channels with its sizes in code, or read from its attributes."""

    def __init__(self, literal=False):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 72), nn.Linear(24, 8)
        self.num_heads, self.head_dim, self.literal = 4, 6, literal

    def forward(self, x):
        b, t, _ = x.shape
        heads, dim = (4, 6) if self.literal else (self.num_heads, self.head_dim)
        q, k, v = self.qkv(x).view(b, t, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) / 6**0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, heads * dim))


def attention(literal=False):
    torch.manual_seed(0)
    net = Heads(literal).double()
    at = torch.arange(72).view(3, 24)
    heads = torch.cat([at[i].view(4, 6) for i in range(3)], 1)
    made = (("qkv.weight", 0, "out"), ("qkv.bias", 0, "out"))
    read = ("proj.weight", 1, "in")
    axes = by_hand(
        net,
        (torch.randn(2, 3, 8).double(),),
        axis("heads", 4, [(*p, heads) for p in made] + [(*read, torch.arange(24).view(4, 6))], kind="block"),
        axis("qk", 24, [(*p, at[:2].T) for p in made], groups=4),
        axis("v", 24, [(*p, at[2:].T) for p in made] + [read], groups=4),
    )
    return net, axes
