from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pomona.data import Split, Task, load
from pomona.edit.lottery_ticket import LotteryTicket, fitting, linear_barrier, stability
from pomona.edit.masks import Masks, prunable
from pomona.errors import PomonaError
from pomona.train import Training
from pomona.train import fit
