import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.recipe.ludwig.combiners import Concat, Encoded
from pomona.recipe.ludwig.config import Config
from pomona.recipe.ludwig.decoders import Generator, Projector, Tagger, masked_mean, squared
from pomona.recipe.ludwig.ecd import ECD, Output, ordered
from pomona.recipe.ludwig.schema import Packed, Schema

pd = pytest.importorskip("pandas")


def system(config, frame):
    parsed = Config.parse(config)
    schema = Schema.fit(parsed, frame, None)
    torch.manual_seed(0)
    return schema, schema.build(parsed).double()


def test_concat_of_one_number_with_identity_and_regressor_is_linear_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=generator, dtype=torch.float64)
    y = 3 * x - 1 + torch.randn(50, generator=generator, dtype=torch.float64)
    frame = pd.DataFrame({"x": x.numpy(), "y": y.numpy()})
    config = {
        "input_features": [{"name": "x", "type": "number", "preprocessing": {"normalization": "none"}}],
        "output_features": [{"name": "y", "type": "number", "preprocessing": {"normalization": "none"}}],
    }
    schema, net = system(config, frame)
    assert sum(p.numel() for p in net.parameters()) == 2
    inputs, targets = {"x": x[:, None]}, {"y": y[:, None]}
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, tolerance_grad=1e-14, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = schema.total(schema.losses(net(inputs), targets))
        loss.backward()
        return loss

    optimizer.step(closure)
    design = torch.stack([x, torch.ones_like(x)], 1)
    solution = torch.linalg.lstsq(design, y[:, None]).solution
    torch.testing.assert_close(net(inputs)["y"], design @ solution, rtol=1e-6, atol=1e-6)


def test_total_is_the_weighted_sum_of_losses_and_rows_without_target_are_masked_per_output():
    frame = pd.DataFrame({"x": [0.0, 1.0, 2.0, 4.0], "y": [1.0, None, 2.0, 3.0], "z": ["a", "b", None, "a"]})
    config = {
        "input_features": [{"name": "x", "type": "number"}],
        "output_features": [
            {"name": "y", "type": "number", "loss": {"weight": 0.25}},
            {"name": "z", "type": "category", "loss": {"type": "softmax_cross_entropy", "weight": 3}},
        ],
    }
    schema, net = system(config, frame)
    x = schema.pack_inputs(frame, None).double()
    target = schema.split_targets(schema.pack_targets(frame, None).double())
    output = net(schema.split_inputs(x))
    losses = schema.losses(output, target)
    torch.testing.assert_close(schema.total(losses), 0.25 * losses["y"] + 3 * losses["z"])
    there = [0, 2, 3]
    torch.testing.assert_close(losses["y"], (output["y"][there] - target["y"][there]).square().mean())
    classes = torch.tensor([0, 1, 0])
    torch.testing.assert_close(losses["z"], nn.functional.cross_entropy(output["z"][[0, 1, 3]], classes))
    schema.total(losses).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_all_targets_missing_gives_zero_loss_and_gradient():
    output = torch.zeros(3, 1, requires_grad=True)
    loss = masked_mean(squared, output, torch.full((3, 1), torch.nan))
    loss.backward()
    assert loss == 0
    assert (output.grad == 0).all()


def test_dependencies_are_sorted_and_pass_the_last_hidden_layer():
    assert ordered({"a": ["b"], "b": ["c"], "c": []}) == ["c", "b", "a"]
    torch.manual_seed(0)
    combiner = Concat({"x": Encoded(2)})
    first = Output(nn.Linear(2, 3), Projector(3, 1))
    second = Output(None, Projector(2 + 3, 4), ["first"])
    net = ECD({"x": nn.Identity()}, combiner, {"second": second, "first": first})
    x = torch.randn(5, 2)
    hidden = torch.cat([x, first.fc(x)], -1)
    out = net({"x": x})
    assert list(out) == ["second", "first"]
    torch.testing.assert_close(out["second"], second.decoder(hidden))


def test_circular_and_unknown_dependencies_are_named():
    with pytest.raises(PomonaError, match="outputs depend on each other in a circle: .* -> "):
        ordered({"a": ["b"], "b": ["a"]})
    with pytest.raises(PomonaError, match="dependencies of output 'a': 'bb' is not known; did you mean b?"):
        ordered({"a": ["bb"], "b": []})


def test_tied_inputs_share_one_encoder():
    frame = pd.DataFrame({"q": ["u", "v", "w"] * 4, "r": ["v", "w", "u"] * 4, "y": range(12)})
    config = {
        "input_features": [{"name": "q", "type": "category"}, {"name": "r", "type": "category", "tied": "q"}],
        "output_features": [{"name": "y", "type": "number"}],
    }
    _, net = system(config, frame)
    assert len(net.encoders) == 1
    a, b = torch.ones(1, 1), torch.full((1, 1), 2.0)
    encoder = net.encoders[0]
    torch.testing.assert_close(net.encoders[net.encoder_of["r"]](a), encoder(a))
    assert not torch.equal(encoder(a), encoder(b))


def test_generator_follows_the_target_only_while_training():
    torch.manual_seed(0)
    output = Output(None, Generator(4, 3 * 5, steps=3))
    h, target = torch.randn(2, 4), torch.tensor([[2.0, 3, 0], [4, 4, 4]])
    free = output.eval()(h)
    assert torch.equal(output(h, target), free)
    led = output.train()(h, target)
    torch.testing.assert_close(led[:, :5], free[:, :5])  # the first word comes before any target
    own = output.decoder(h, free.unflatten(1, (3, 5)).argmax(-1).float())
    torch.testing.assert_close(own, free)
    assert led.shape == (2, 15)


def test_tagger_labels_each_step_and_needs_a_sequence():
    frame = pd.DataFrame({"words": ["a b c", "b c a", "c a b"] * 4, "tags": ["X Y Z", "Y Z X", "Z X Y"] * 4})
    config = {
        "input_features": [{"name": "words", "type": "sequence", "encoder": "rnn:reduce=none,width=4"}],
        "output_features": [{"name": "tags", "type": "sequence", "decoder": "tagger"}],
        "combiner": "sequence_concat",
    }
    schema, net = system(config, frame)
    x = schema.pack_inputs(frame, None).double()
    assert Packed(net, schema)(x).shape == (12, 3 * 5)
    assert isinstance(net.outputs[0].decoder, Tagger)
    with pytest.raises(PomonaError, match="decoder 'tagger' needs a combiner that keeps a sequence"):
        system({**config, "combiner": "concat"}, frame)


def test_empty_batch_and_gradient():
    combiner = Concat({"x": Encoded(2)}, layers=[3], act="gelu")
    net = ECD({"x": nn.Identity()}, combiner, {"y": Output(nn.Linear(3, 3), Projector(3, 2))}).double()
    assert net({"x": torch.zeros(0, 2, dtype=torch.float64)})["y"].shape == (0, 2)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: net({"x": x})["y"], x)
