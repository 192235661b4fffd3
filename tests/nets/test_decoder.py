import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nets.decoder import CausalAttention, DecoderLM, init_linear_
from pomona.nn.bilinear import GLUMLP
from pomona.nn.residual import ReZero

V, T = 13, 7


def tokens(batch: int = 3, length: int = T) -> torch.Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(0))


def make(**options: object) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(V, 16, 2, 2, max_len=T, **options).double().eval()


def test_a_token_does_not_see_later_ones():
    model, x = make(), tokens()
    later = x.clone()
    later[:, 4:] = (later[:, 4:] + 1) % V
    torch.testing.assert_close(model(x)[:, :4], model(later)[:, :4])
    torch.testing.assert_close(model(x[:, :4]), model(x)[:, :4])
    assert not torch.allclose(model(x)[:, 4:], model(later)[:, 4:])


def test_without_norms_there_is_none_and_logits_scale_with_the_head():
    model, x = make(norm="none", tie=False), tokens()
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())
    before = model(x)
    with torch.no_grad():
        model.head.weight.mul_(3.5)
    torch.testing.assert_close(model(x), 3.5 * before, rtol=1e-12, atol=1e-12)
    assert all(block.branch_scale == 0.5 for block in model.blocks)


def test_attention_weights_are_those_that_it_uses():
    layer = CausalAttention(8, 2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    pattern = layer.pattern(x)
    values = layer.qkv(x)[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(layer.out((pattern @ values).transpose(1, 2).flatten(2)), layer(x))
    assert pattern.triu(1).eq(0).all()
    assert make().attention(tokens()).shape == (2, 3, 2, T, T)


def test_parts_can_be_replaced():
    seen = []

    def ffn(dim: int, hidden: int, index: int) -> nn.Module:
        seen.append((dim, hidden, index))
        return GLUMLP(dim, hidden, None)

    model = make(make_ffn=ffn, make_residual=lambda dim: ReZero(), make_norm=nn.RMSNorm, ffn_scale=0.5, bias=False)
    assert seen == [(16, 64, 0), (16, 64, 1)]
    x = tokens()
    logits = nn.functional.linear(model.norm(model.embed(x)), model.token.weight)
    torch.testing.assert_close(model(x), logits)  # ReZero starts at 0
    assert all(p.numel() != 48 for p in model.parameters())  # no bias of q, k, v


def test_parts_are_told_the_tokens():
    class Told(nn.Module):
        def set_tokens(self, tokens: torch.Tensor) -> None:
            self.tokens = tokens

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * x + self.tokens[..., None]

    model, x = make(make_ffn=lambda *sizes: Told(), norm="none", branch_scale=1.0), tokens()
    for block in model.blocks:
        init_linear_(block.attention, 0.0)
    torch.testing.assert_close(model.states(x)[-1], model.embed(x) + 2.0 * x[..., None])


def test_ties_starts_gradients_and_the_empty_batch():
    model = make()
    assert model.head.weight is model.token.weight
    assert model(tokens(0)).shape == (0, T, V)
    model(tokens()).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert init_linear_(nn.Linear(400, 300)).weight.detach().std().item() == pytest.approx(0.05, rel=0.02)
    small = make(init_std=0.02, norm="none")
    assert small.blocks[0].ffn.up.weight.detach().std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.slow
def test_compiles_whole():
    torch.compiler.reset()
    model = make()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), model(tokens()))


def test_says_what_is_wrong():
    with pytest.raises(PomonaError, match="norm='post' is not known"):
        make(norm="post")
    with pytest.raises(PomonaError, match="made for max_len=7, its input has 8"):
        make()(tokens(length=8))
    with pytest.raises(PomonaError, match=r"integer tokens \(batch, time\)"):
        make()(torch.randn(2, 3))
    with pytest.raises(PomonaError, match="Identity has no attention weights"):
        make(make_attention=lambda *sizes: nn.Identity()).attention(tokens())
