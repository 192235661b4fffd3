"""Weight spaces, generated weights and hypernetworks."""

from pomona.weights.hyper_rnn import (
    HyperGRU,
    HyperLSTM,
    HyperRNN,
)
from pomona.weights.hypernetworks import (
    HyperConv2d,
    KernelHyperNet,
    hyperize,
)
from pomona.weights.mip import (
    MIPHyperNet,
    mip_convert,
)
from pomona.weights.reparametrized import (
    Reparametrized,
)
from pomona.weights.space import (
    ParamSpec,
    WeightSpace,
)

__all__ = [
    "HyperConv2d",
    "HyperGRU",
    "HyperLSTM",
    "HyperRNN",
    "KernelHyperNet",
    "MIPHyperNet",
    "ParamSpec",
    "Reparametrized",
    "WeightSpace",
    "hyperize",
    "mip_convert",
]
