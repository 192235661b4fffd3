"""A declaration of typed inputs and outputs, trained: the full encoder-combiner-decoder form."""

from pomona.recipe.ludwig import cell_features  # noqa: F401  # registers its types
from pomona.recipe.ludwig.combiners import COMBINERS
from pomona.recipe.ludwig.config import Config
from pomona.recipe.ludwig.ecd import ECD, Output
from pomona.recipe.ludwig.encoders import ENCODERS
from pomona.recipe.ludwig.features import TYPES, FeatureType, feature
from pomona.recipe.ludwig.fit import Fitted, fit
from pomona.recipe.ludwig.infer import infer

__all__ = [
    "COMBINERS",
    "ECD",
    "ENCODERS",
    "TYPES",
    "Config",
    "FeatureType",
    "Fitted",
    "Output",
    "feature",
    "fit",
    "infer",
]
