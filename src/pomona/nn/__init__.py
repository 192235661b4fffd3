"""Layers: plain ``nn.Module``s that drop into any network and fill the slots of Pomona's backbones."""

from pomona.nn.activation import (
    CELU,
    ELU,
    GCU,
    GEGLU,
    GELU,
    GLU,
    SELU,
    CReLU,
    Hardswish,
    Identity,
    LeakyReLU,
    Maxout,
    MetaActivation,
    Mish,
    Polynomial,
    PReLU,
    Rational,
    ReGLU,
    ReLU,
    ReLUSquared,
    RReLU,
    Sigmoid,
    SiLU,
    Sine,
    Snake,
    Softplus,
    Spline,
    Squareplus,
    StochasticGELU,
    SwiGLU,
    Swish,
    Tanh,
    act,
)
from pomona.nn.activation_table import (
    ACTIVATIONS,
    calibrate_gain,
    curve,
    swap_activation,
)
from pomona.nn.adafnn import AdaFNN, BasisLayer
from pomona.nn.af_kan import AFKANLayer, ReLUKANLayer
from pomona.nn.algebra import (
    algebra,
)
from pomona.nn.basis import (
    BSpline,
    Chebyshev,
    Fourier,
    GaussianRBF,
)
from pomona.nn.bilinear import (
    GLUMLP,
    Bilinear,
    BilinearNet,
)
from pomona.nn.block_linear import BlockDiagonalLinear, MonarchLinear
from pomona.nn.coord_kernel import CoordKernel
from pomona.nn.evonorm import EvoNormB0, EvoNormS0
from pomona.nn.experts import ExpertBank
from pomona.nn.feedforward import (
    FeedForward,
)
from pomona.nn.fnet import (
    DCTMixer,
    FNet,
    FNetBlock,
    FourierMixer,
    HartleyMixer,
)
from pomona.nn.fourier_head import FourierHead, GMMHead
from pomona.nn.gain import (
    derivative_second_moment,
    gain,
    second_moment,
)
from pomona.nn.gaudi_gblr import GaudiGBLR
from pomona.nn.hash_layer import BaseLayer, HashFFN, MultiHashFFN, SwitchFFN
from pomona.nn.hypermixer import HyperMixing
from pomona.nn.hyperzzw import HyperZZWLocal
from pomona.nn.init import (
    FixupBranch,
    deep_plain,
    init_,
    signal_report,
)
from pomona.nn.kan import (
    KANLayer,
)
from pomona.nn.kan_attention import KArAt
from pomona.nn.kan_net import (
    KAN,
)
from pomona.nn.lambda_layer import LambdaConv2d, LambdaLayer
from pomona.nn.laurel import Laurel, LaurelResidual
from pomona.nn.matrix_activation import BandTMAF
from pomona.nn.memory_layer import MemoryLayer
from pomona.nn.mixing import (
    AttentionMixer,
    ConvMixer1d,
    GatingMixer,
    LinearTokenMixer,
    MixerBlock,
    MixerNet,
    MLPTokenMixer,
    NoMix,
    PoolMixer,
    TokenMixer,
)
from pomona.nn.mlp_mixer import (
    MixerLayer,
    MLPMixer,
    resize_tokens,
)
from pomona.nn.mu_layer import MuLayer
from pomona.nn.neural_arithmetic import NAU, NMU
from pomona.nn.norm import (
    BatchNorm,
    DyT,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Norm,
    RMSNorm,
    ScaleNorm,
    WeightNorm,
)
from pomona.nn.norm_analysis import (
    fisher_scale,
    fold_into_linear,
    invariance_table,
    norm_stats,
)
from pomona.nn.parameter_free import PFBottleneck
from pomona.nn.parametric_spans import ParametricSpan
from pomona.nn.phc_conv import PHConv1d, PHConv2d
from pomona.nn.phm import (
    PHMAttention,
    PHMLinear,
    PHMLSTMCell,
    QuaternionLinear,
    learned_rules,
    phm_transformer,
)
from pomona.nn.point_cloud_linear import PointCloudLinear
from pomona.nn.pool import (
    GatedPool2d,
    GeMPool2d,
    LpPool2d,
    MixedPool2d,
    Pool2d,
    PowerPool2d,
    SoftPool2d,
    StochasticPool2d,
    TreePool2d,
)
from pomona.nn.prelu import (
    LearnableLeaky,
    absorb,
)
from pomona.nn.quadratic import (
    QuadActivation,
    QuadraticConv2d,
    QuadraticLinear,
    ReLinear,
    count_pieces_1d,
    quadratize,
)
from pomona.nn.raft_mlp import RaftMixer, RaftTokenMixer
from pomona.nn.replace_pooling import (
    invariance,
    replace_pooling,
    tree_gated_max_avg,
)
from pomona.nn.residual import (
    Add,
    ReZero,
)
from pomona.nn.reversible import RevSequential
from pomona.nn.selectable_kan import SelectableKANConv2d, SelectableKANLayer
from pomona.nn.smpconv import SMPConv1d, SMPConv2d, SMPMixer
from pomona.nn.snnk import SNNK
from pomona.nn.structured import (
    LowRankLinear,
    StructuredConv2d,
    StructuredLinear,
)

__all__ = [
    "ACTIVATIONS",
    "AFKANLayer",
    "AdaFNN",
    "Add",
    "AttentionMixer",
    "BSpline",
    "BandTMAF",
    "BaseLayer",
    "BasisLayer",
    "BatchNorm",
    "Bilinear",
    "BilinearNet",
    "BlockDiagonalLinear",
    "CELU",
    "CReLU",
    "Chebyshev",
    "ConvMixer1d",
    "CoordKernel",
    "DCTMixer",
    "DyT",
    "ELU",
    "EvoNormB0",
    "EvoNormS0",
    "ExpertBank",
    "FNet",
    "FNetBlock",
    "FeedForward",
    "FixupBranch",
    "Fourier",
    "FourierHead",
    "FourierMixer",
    "GCU",
    "GEGLU",
    "GELU",
    "GLU",
    "GLUMLP",
    "GMMHead",
    "GatedPool2d",
    "GatingMixer",
    "GaudiGBLR",
    "GaussianRBF",
    "GeMPool2d",
    "GroupNorm",
    "Hardswish",
    "HartleyMixer",
    "HashFFN",
    "HyperMixing",
    "HyperZZWLocal",
    "Identity",
    "InstanceNorm",
    "KAN",
    "KANLayer",
    "KArAt",
    "LambdaConv2d",
    "LambdaLayer",
    "Laurel",
    "LaurelResidual",
    "LayerNorm",
    "LeakyReLU",
    "LearnableLeaky",
    "LinearTokenMixer",
    "LowRankLinear",
    "LpPool2d",
    "MLPMixer",
    "MLPTokenMixer",
    "Maxout",
    "MemoryLayer",
    "MetaActivation",
    "Mish",
    "MixedPool2d",
    "MixerBlock",
    "MixerLayer",
    "MixerNet",
    "MonarchLinear",
    "MuLayer",
    "MultiHashFFN",
    "NAU",
    "NMU",
    "NoMix",
    "Norm",
    "PFBottleneck",
    "PHConv1d",
    "PHConv2d",
    "PHMAttention",
    "PHMLSTMCell",
    "PHMLinear",
    "PReLU",
    "ParametricSpan",
    "PointCloudLinear",
    "Polynomial",
    "Pool2d",
    "PoolMixer",
    "PowerPool2d",
    "QuadActivation",
    "QuadraticConv2d",
    "QuadraticLinear",
    "QuaternionLinear",
    "RMSNorm",
    "RReLU",
    "RaftMixer",
    "RaftTokenMixer",
    "Rational",
    "ReGLU",
    "ReLU",
    "ReLUKANLayer",
    "ReLUSquared",
    "ReLinear",
    "ReZero",
    "RevSequential",
    "SELU",
    "SMPConv1d",
    "SMPConv2d",
    "SMPMixer",
    "SNNK",
    "ScaleNorm",
    "SelectableKANConv2d",
    "SelectableKANLayer",
    "SiLU",
    "Sigmoid",
    "Sine",
    "Snake",
    "SoftPool2d",
    "Softplus",
    "Spline",
    "Squareplus",
    "StochasticGELU",
    "StochasticPool2d",
    "StructuredConv2d",
    "StructuredLinear",
    "SwiGLU",
    "Swish",
    "SwitchFFN",
    "Tanh",
    "TokenMixer",
    "TreePool2d",
    "WeightNorm",
    "absorb",
    "act",
    "algebra",
    "calibrate_gain",
    "count_pieces_1d",
    "curve",
    "deep_plain",
    "derivative_second_moment",
    "fisher_scale",
    "fold_into_linear",
    "gain",
    "init_",
    "invariance",
    "invariance_table",
    "learned_rules",
    "norm_stats",
    "phm_transformer",
    "quadratize",
    "replace_pooling",
    "resize_tokens",
    "second_moment",
    "signal_report",
    "swap_activation",
    "tree_gated_max_avg",
]
