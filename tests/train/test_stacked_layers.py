"""A layer of many members at once gives what each member's own layer gives, and the same gradients."""

import pytest
import torch
from torch.func import vmap
from torch.nn import functional as F

from pomona.train.stacked_functions import StackedFunctions

MEMBERS = 3


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def norm(x, mean, var, weight, bias):
    return F.batch_norm(x, mean.detach().clone(), var.detach().clone(), weight, bias, True, 0.2, 1e-3)


def running(x, mean, var):
    mean, var = mean.detach().clone(), var.detach().clone()
    y = F.batch_norm(x, mean, var, training=True)
    return torch.cat([y.flatten(), mean.flatten(), var.flatten()])


CHANNELS = [(4,)] * 4
CASES = {
    "linear": (F.linear, [(5, 4), (3, 4), (3,)]),
    "linear of tokens, without bias": (F.linear, [(2, 5, 4), (3, 4)]),
    "conv": (lambda x, w, b: F.conv2d(x, w, b, padding=1), [(2, 3, 6, 5), (4, 3, 3, 3), (4,)]),
    "conv with stride": (lambda x, w: F.conv2d(x, w, stride=(2, 3), padding=(0, 2)), [(2, 3, 7, 6), (4, 3, 3, 2)]),
    "conv 1 x 1": (F.conv2d, [(2, 3, 4, 4), (5, 3, 1, 1)]),
    "conv in groups": (lambda x, w: F.conv2d(x, w, groups=2, dilation=2), [(2, 4, 6, 6), (4, 2, 2, 2)]),
    "batch norm": (norm, [(6, 4), *CHANNELS]),
    "batch norm of pictures": (norm, [(2, 4, 3, 5), *CHANNELS]),
    "running statistics": (running, [(2, 4, 3), (4,), (4,)]),
    "batch norm in use": (lambda x, m, v: F.batch_norm(x, m.detach(), v.detach().exp()), [(2, 4, 3, 3), (4,), (4,)]),
    "max pool": (lambda x: F.max_pool2d(x, 2), [(2, 3, 5, 4)]),
    "max pool with overlap": (lambda x: F.max_pool2d(x.relu(), 3, 2, 1), [(2, 3, 6, 5)]),
    "average pool": (lambda x: F.avg_pool2d(x, (2, 1), ceil_mode=True), [(2, 3, 5, 4)]),
    "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, 2), [(2, 3, 5, 4)]),
    "mean of a picture": (lambda x: x.mean((-2, -1)), [(2, 3, 5, 4)]),
    "mean kept": (lambda x: torch.mean(x, dim=(2, 3), keepdim=True), [(2, 3, 5, 4)]),
    "other means": (lambda x: x.mean() + x.mean(1).sum() + x.mean((0, 1)).sum(), [(2, 3, 5, 4)]),
    "attention": (F.scaled_dot_product_attention, [(2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 3)]),
    "causal attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), [(2, 5, 4)] * 3
    ),
    "masked attention": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m > 0.5), [(2, 5, 4)] * 3 + [(2, 5, 5)]
    ),
    "attention with a bias": (F.scaled_dot_product_attention, [(2, 5, 4)] * 3 + [(5, 5)]),
    "attention in groups": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [(2, 4, 5, 3), (2, 2, 5, 3), (2, 2, 5, 3)],
    ),
    "cross-entropy": (lambda z: F.cross_entropy(z, torch.tensor([0, 2, 1, 1, 0])), [(5, 3)]),
    "smoothed cross-entropy": (
        lambda z: F.cross_entropy(z, torch.tensor([0, 2, 1, 1, 0]), label_smoothing=0.1), [(5, 3)]
    ),
}  # fmt: skip


def values_and_gradients(function, stacked):
    leaves = [t.clone().requires_grad_() for t in stacked]
    out = function(*leaves)
    grads = torch.autograd.grad((out * random(*out.shape)).sum(), leaves, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True))]


@pytest.mark.parametrize("name", CASES)
def test_a_layer_in_a_stack_equals_the_same_layer_alone(name):
    function, shapes = CASES[name]
    stacked = [random(MEMBERS, *shape) for shape in shapes]

    def member(*args):
        with StackedFunctions([], fast=True):
            return function(*args)

    together = values_and_gradients(vmap(member), stacked)
    alone = values_and_gradients(
        lambda *args: torch.stack([function(*(a[i] for a in args)) for i in range(MEMBERS)]), stacked
    )
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "linear of tokens, without bias", "conv", "batch norm of pictures"])
def test_an_input_that_all_members_share_may_come_once(name):
    function, (x, *others) = CASES[name]
    shared, stacked = random(*x), [random(MEMBERS, *shape) for shape in others]

    def member(*args):
        with StackedFunctions([], fast=True):
            return function(shared, *args)

    for i, found in enumerate(vmap(member)(*stacked)):
        torch.testing.assert_close(found, function(shared, *(t[i] for t in stacked)), rtol=1e-12, atol=1e-12)
