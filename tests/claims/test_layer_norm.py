import numpy as np
import torch

from pomona.claims.layer_norm import SIZES, CharacterLSTM, layer_norm


def test_both_networks_start_with_forget_bias_one():
    plain, normed = CharacterLSTM("plain", 7, 4), CharacterLSTM("layer", 7, 4)
    assert plain.lstm.bias_ih_l0.tolist() == [0] * 4 + [1] * 4 + [0] * 8
    assert normed.lstm.cells[0].bias.tolist() == [1] * 4 + [0] * 12
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert plain(ids).shape == normed(ids).shape == (2, 5, 7)


def test_smoke():
    evidence = layer_norm("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert all(0 < value <= SIZES["smoke"]["steps"] for value in (*evidence.method, *evidence.baseline))
    assert set(evidence.details) == {"plain", "layer", "mlp"}
    assert set(evidence.details["mlp"]["batch 4"]) == {"none", "batch", "layer"}
