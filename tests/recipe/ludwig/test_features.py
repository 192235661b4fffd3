from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pomona.errors import PomonaError
from pomona.recipe.ludwig import TYPES
from pomona.recipe.ludwig.encoders import ENCODERS, Backbone, Field, make_encoder, reduce_steps
from pomona.recipe.ludwig.features import fill, fill_value

HERE = Path()
FIELDS = {
    "values": Field("values", 4),
    "code": Field("code", 1, 5),
    "counts": Field("counts", 4),
    "tokens": Field("tokens", 6, 5),
    "series": Field("series", 12, shape=(2, 6)),
    "image": Field("image", 64, shape=(1, 8, 8)),
}


@pytest.mark.parametrize(("form", "name"), [(form, name) for form, named in ENCODERS.items() for name in named])
def test_every_encoder_says_its_width_takes_an_empty_batch_and_does_not_mix_rows(form, name):
    torch.manual_seed(0)
    field = FIELDS[form]
    net = make_encoder("encoder", field, {"type": name}).eval()
    x = torch.randint(0, 4, (5, field.width)).float()
    out = net(x)
    assert out.shape == (5, net.features)
    torch.testing.assert_close(net(x[2:3]), out[2:3], rtol=1e-4, atol=1e-6)
    assert len(net(x[:0])) == 0


@pytest.mark.parametrize(
    ("form", "name"),
    [("values", "mlp linear=kan width=8"), ("code", "mlp width=8"), ("tokens", "mlp width=8 depth=1"),
     ("image", "convnet width=4 depth=1"), ("series", "mlp linear=low_rank width=8"), ("values", "quadratic width=8")],
)  # fmt: skip
def test_any_backbone_and_layer_is_an_encoder(form, name):
    net = make_encoder("encoder", FIELDS[form], {"type": name})
    assert isinstance(net, Backbone)
    assert net(torch.ones(3, FIELDS[form].width)).shape == (3, net.features)


def test_padding_does_not_change_a_sequence_encoding():
    torch.manual_seed(0)
    for name in ("embed", "rnn", "transformer"):
        net = make_encoder("encoder", FIELDS["tokens"], {"type": name}).eval()
        short = torch.tensor([[2.0, 3, 0, 0, 0, 0]])
        present = net(short)
        if name != "transformer":
            net.shape = ()
            torch.testing.assert_close(net(short[:, :2]), present)
        assert present.isfinite().all() and net(torch.zeros(1, 6)).isfinite().all()


def test_reductions_leave_absent_steps_out():
    x = torch.tensor([[[1.0], [5.0], [9.0]], [[7.0], [7.0], [7.0]]])
    present = torch.tensor([[True, True, False], [False, False, False]])
    found = {how: reduce_steps(x, how, present)[:, 0].tolist() for how in ("sum", "mean", "max", "last")}
    assert found == {"sum": [6, 0], "mean": [3, 0], "max": [5, 0], "last": [5, 0]}


@pytest.mark.parametrize("normalization", ["zscore", "minmax", "log1p", "quantile", "none"])
def test_number_is_given_back_in_its_own_units(normalization):
    column = pd.Series(np.random.default_rng(0).gamma(2.0, 3.0, 50), name="x")
    kind = TYPES["number"]
    meta = kind.fit_meta(column, HERE, normalization=normalization)
    packed = torch.from_numpy(kind.target(column, meta, HERE)).double()
    back = kind.postprocess("x", packed, meta)["x_prediction"]
    np.testing.assert_allclose(back, column, rtol=1e-4, atol=1e-3)
    if normalization == "minmax":
        assert packed.min() == 0 and packed.max() == 1
    assert kind.metrics(packed, packed, meta)["rmse"] == 0


def test_missing_values_are_filled_from_training_rows():
    column = pd.Series([1.0, None, 3.0, 3.0], name="x")
    for strategy, value in (("fill_with_mean", 7 / 3), ("fill_with_const", 9), ("fill_with_mode", 3.0)):
        filled = fill(column, strategy, fill_value(column, strategy, 9))
        assert float(filled.iloc[1]) == pytest.approx(value)
    assert fill(column, "ffill", None).tolist() == [1, 1, 3, 3]


def test_sets_bags_and_sequences_code_their_words():
    column = pd.Series(["a b a", "b", None], name="x")
    bag, members, sequence = (TYPES[name] for name in ("bag", "set", "sequence"))
    assert bag.transform(column, bag.fit_meta(column, HERE), HERE).tolist() == [[0, 2, 1], [0, 0, 1], [0, 0, 0]]
    meta = members.fit_meta(column, HERE)
    assert members.transform(column, meta, HERE)[0].tolist() == [0, 1, 1]
    assert np.isnan(members.target(column, meta, HERE)[2]).all()
    assert members.transform(pd.Series(["z"]), meta, HERE).tolist() == [[1, 0, 0]]
    meta = sequence.fit_meta(column, HERE)
    assert sequence.transform(column, meta, HERE).tolist() == [[2, 3, 2], [3, 0, 0], [0, 0, 0]]
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 3] = logits[0, 1, 0] = logits[0, 2, 2] = 1
    assert sequence.postprocess("x", logits.flatten(1), meta)["x_prediction"].tolist() == ["b"]


def test_an_unseen_class_of_an_output_counts_as_wrong():
    kind = TYPES["category"]
    meta = kind.fit_meta(pd.Series(["a", "b"] * 3, name="x"), HERE)
    target = torch.from_numpy(kind.target(pd.Series(["a", "z"], name="x"), meta, HERE))
    assert target[:, 0].tolist() == [0, -1]
    assert kind.metrics(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), target, meta)["accuracy"] == 0.5


def test_series_of_any_length_end_in_the_mean():
    column = pd.Series([np.ones((2, 3)), np.full((2, 5), 3.0)], name="s")
    kind = TYPES["timeseries"]
    meta = kind.fit_meta(column, HERE)
    packed = kind.transform(column, meta, HERE).reshape(2, 2, 5)
    assert (packed[0, :, 3:] == 0).all() and packed[1].std() == 0
    strings = pd.Series(["1 1 1; 1 1 1", "[3,3,3,3,3; 3,3,3,3,3]"], name="s")
    np.testing.assert_array_equal(kind.transform(strings, meta, HERE).reshape(2, 2, 5), packed)


def test_cells_that_do_not_fit_are_named():
    with pytest.raises(PomonaError, match=r"column 'v', row 2: 'x y' is not a list of numbers"):
        TYPES["vector"].fit_meta(pd.Series(["1 2", "x y"], name="v"), HERE)
    with pytest.raises(PomonaError, match=r"needed is \(2, steps\)"):
        TYPES["timeseries"].fit_meta(pd.Series([np.ones((2, 3)), np.ones((1, 3))], name="s"), HERE)
    with pytest.raises(PomonaError, match="log1p' needs numbers above -1; use zscore"):
        TYPES["number"].fit_meta(pd.Series([-2.0, 3.0], name="x"), HERE, normalization="log1p")
