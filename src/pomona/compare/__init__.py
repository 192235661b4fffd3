"""The fair protocol: compare candidates on data, with classical references, intervals and costs."""

from pomona.compare.compare import compare
from pomona.compare.study import Study

__all__ = ["Study", "compare"]
