import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nets.bilinear_transformer import BilinearTransformer, fold_norms

TOKENS = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(0))


def make(**options: object) -> BilinearTransformer:
    torch.manual_seed(0)
    return BilinearTransformer(9, 8, 2, max_len=5, **options).double()


def test_a_layer_is_attention_and_a_product():
    model = make()
    x = model.embed(TOKENS)
    block = model.blocks[0]
    x = x + block.attention(x)
    x = x + ((x @ block.ffn.product.w.T) * (x @ block.ffn.product.v.T)) @ block.ffn.project.weight.T
    torch.testing.assert_close(model(TOKENS), x @ model.head.weight.T)
    assert not any(isinstance(m, (nn.LayerNorm, nn.RMSNorm)) for m in model.modules())
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())


def test_folding_is_exact_where_the_scale_is_the_mean():
    model = make(norm="rms", layers=2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.normal_()
    same = TOKENS[:1, :1].expand(4, 1)  # one scale for all
    folded = fold_norms(model, same)
    assert not any(isinstance(m, nn.RMSNorm) for m in folded.modules())
    torch.testing.assert_close(folded(same), model(same), rtol=1e-6, atol=1e-6)
    assert isinstance(model.norm, nn.RMSNorm)


def test_says_what_is_wrong():
    with pytest.raises(PomonaError, match="norm='layer' is not known"):
        make(norm="layer")
