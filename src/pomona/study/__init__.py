"""The fair protocol: compare candidates on data, with classical references, intervals and costs."""

from pomona.study.comparison import compare
from pomona.study.result import Study

__all__ = ["Study", "compare"]
