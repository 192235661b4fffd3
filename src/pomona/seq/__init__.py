"""Recurrent layers."""

from pomona.seq.norm_rnn import (
    LayerNormGRU,
    LayerNormLSTM,
    LayerNormRNN,
)

__all__ = [
    "LayerNormGRU",
    "LayerNormLSTM",
    "LayerNormRNN",
]
