import pytest
import torch

from pomona.data.task import Split
from pomona.errors import PomonaError
from pomona.measure.invertible import contraction, jacobian_spectrum, saved_activations
from pomona.nets.irevnet import IRevNet


def images(count, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    return Split(torch.randn(count, 1, 8, 8, generator=g) + y.view(-1, 1, 1, 1), y)


def small(depth=2, **options):
    torch.manual_seed(0)
    return IRevNet(1, 2, blocks=(depth,), strides=(1,), **options)


def test_contraction_has_an_entry_a_depth_and_tells_separated_classes_apart():
    reading = contraction(small().eval(), images(40, 0), images(40, 1))
    assert [len(values) for values in reading.values.values()] == [3, 3, 3]
    assert reading["linear"][0] > 0.9
    assert 1 <= reading["components"][0] <= 19
    with pytest.raises(PomonaError, match="train holds 1 example of class 0; it needs two or more"):
        contraction(small(), images(2, 0), images(2, 1))


def test_spectrum_multiplies_to_one_and_reversible_storage_does_not_grow():
    spectrum = jacobian_spectrum(small().double().eval(), torch.randn(1, 4, 4, dtype=torch.float64))
    assert spectrum.shape == (16,)
    assert float(spectrum.log().sum()) == pytest.approx(0, abs=1e-10)
    x = images(4, 0).x
    shallow, deep = (saved_activations(small(depth, reversible=True), x) for depth in (2, 12))
    assert shallow == deep
    assert saved_activations(small(12), x) > 4 * deep
