"""Functions from network to network."""

from pomona.edit.allocation import (
    allocate,
)
from pomona.edit.batchnorm import (
    fold_batch_norms,
)
from pomona.edit.depth import (
    drop_block,
    insert_identity,
)
from pomona.edit.dynamic_sparse import (
    DST,
)
from pomona.edit.edit import (
    Edit,
)
from pomona.edit.git_rebasin import (
    interpolation,
    match,
    merge_models,
    repair,
)
from pomona.edit.ifm import (
    complexity_curve,
    feature_complexity,
    iterative_feature_merging,
)
from pomona.edit.jei_dnn import (
    EarlyExit,
    JEITrainer,
)
from pomona.edit.learngene_pool import (
    LearngenePool,
)
from pomona.edit.lottery_ticket import (
    LotteryTicket,
    Ticket,
    fitting,
    linear_barrier,
    stability,
)
from pomona.edit.masks import (
    Mask,
    Masks,
    prune,
)
from pomona.edit.nonlinear_advantage import (
    ChannelGate,
    Linearize,
    average_path_length,
    collapse,
    core_network,
    linearize_units,
)
from pomona.edit.operations import (
    drop,
    duplicate,
    grow,
    mask,
    merge,
    permute,
    rescale,
    take,
    unit_scores,
)
from pomona.edit.rewriting import (
    Rewriter,
    locality,
)
from pomona.edit.rnn_sparsity import (
    prune_rnn,
)
from pomona.edit.sortednet import (
    Size,
    SortedNet,
)
from pomona.edit.sparseland import (
    sparsify,
)
from pomona.edit.spectrum_prune import (
    spectral_prune,
    spectral_sparsify,
    spectrum,
)
from pomona.edit.stitch import (
    StitchNet,
    train_stitches,
)
from pomona.edit.transport import (
    transport,
    transport_masks,
)

__all__ = [
    "ChannelGate",
    "DST",
    "EarlyExit",
    "Edit",
    "JEITrainer",
    "LearngenePool",
    "Linearize",
    "LotteryTicket",
    "Mask",
    "Masks",
    "Rewriter",
    "Size",
    "SortedNet",
    "StitchNet",
    "Ticket",
    "allocate",
    "average_path_length",
    "collapse",
    "complexity_curve",
    "core_network",
    "drop",
    "drop_block",
    "duplicate",
    "feature_complexity",
    "fitting",
    "fold_batch_norms",
    "grow",
    "insert_identity",
    "interpolation",
    "iterative_feature_merging",
    "linear_barrier",
    "linearize_units",
    "locality",
    "mask",
    "match",
    "merge",
    "merge_models",
    "permute",
    "prune",
    "prune_rnn",
    "repair",
    "rescale",
    "sparsify",
    "spectral_prune",
    "spectral_sparsify",
    "spectrum",
    "stability",
    "take",
    "train_stitches",
    "transport",
    "transport_masks",
    "unit_scores",
]
