import pytest
import torch

from pomona.train.stacked_trace import Trace, Untraceable


def test_a_trace_gives_what_the_function_gives_for_other_values():
    scale = torch.tensor(3.0)

    def function(params, x):
        with torch.enable_grad():
            w = params["w"].detach().requires_grad_()
            y = (x @ w).relu().sum() * scale
            torch.zeros(3).add_(1).exp()
            (grad,) = torch.autograd.grad(y, [w])
        total = torch.zeros_like(grad)
        total[0] += grad[0]
        return {"grad": grad, "first": total.view(total.shape).detach()}, [y.detach(), x.T]

    def arguments(seed):
        g = torch.Generator().manual_seed(seed)
        return {"w": torch.randn(4, 3, generator=g)}, torch.randn(5, 4, generator=g)

    traced = Trace(function, *arguments(0))
    for seed in range(3):
        found, expected = traced(*arguments(seed)), function(*arguments(seed))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_integers_may_index_and_lists_of_tensors_may_be_changed():
    def function(x, index):
        a, b = x[index].clone(), x[:, index].sum(1)
        torch._foreach_add_([a, b], 1.0)
        return a, torch.cat([b, b]), 2

    x, index = torch.arange(12.0).view(4, 3), torch.tensor([2, 0])
    traced = Trace(function, x, index)
    torch.testing.assert_close(traced(x + 1, index - 1), function(x + 1, index - 1), rtol=0, atol=0)


def test_what_depends_on_values_is_refused():
    with pytest.raises(Untraceable, match="depends on values"):
        Trace(lambda x: x if x.sum() > 0 else -x, torch.ones(3))
    with pytest.raises(Untraceable, match="depends on values"):
        Trace(lambda x: x[x > 0], torch.ones(3))
    kept = torch.zeros(3)
    with pytest.raises(Untraceable, match="kept from call to call"):
        Trace(lambda x: kept.add_(x), torch.ones(3))
    with pytest.raises(Untraceable, match="kept from call to call"):
        Trace(lambda x: torch._foreach_add_([kept, x], 1.0), torch.ones(3))
