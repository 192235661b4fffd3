import pytest
import torch
from torch import nn

from pomona.data.task import tensors
from pomona.data.types import Numbers
from pomona.errors import PomonaError
from pomona.nn.selectable_kan import PrunedKANLayer, SelectableKANLayer
from pomona.train.budget import Budget
from pomona.train.selectable import fit_selectable
from pomona.train.settings import Training
