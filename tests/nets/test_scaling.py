import pytest
from torch import nn

from pomona.errors import PomonaError
from pomona.nets.scaling import scaling
from pomona.nn.hypermixer import HyperMixing
from pomona.nn.lambda_layer import LambdaLayer


def test_exponents_tell_linear_from_quadratic():
    lengths = [128, 256, 512]
    linear = scaling(lambda n: HyperMixing(8), lengths, 8, repeats=1)
    local = scaling(lambda n: LambdaLayer(8, n, k=4, scope=7), lengths, 8, repeats=1)
    wide = scaling(lambda n: LambdaLayer(8, n, k=4), lengths, 8, repeats=1)
    for found in (linear, local):
        assert found.exponents()["flops"] == pytest.approx(1, abs=0.01)
        assert found.exponents()["bytes"] == pytest.approx(1, abs=0.1)
    assert wide.exponents()["flops"] > 1.8 and wide.exponents()["bytes"] > 1.8
    assert wide.tokens == lengths and min(wide.seconds) > 0


def test_memory_of_a_lambda_layer_does_not_grow_with_the_batch_times_length_squared():
    one, many = (
        scaling(lambda n: LambdaLayer(8, n, k=4), [256, 512], 8, batch=batch, repeats=1).bytes[-1] for batch in (1, 8)
    )
    assert many < 2 * one


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match=r"tokens=\[8, 8\] must be at least two lengths"):
        scaling(lambda n: nn.Identity(), [8, 8], 4)
