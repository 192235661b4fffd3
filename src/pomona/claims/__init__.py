"""Executable headline claims, one function a paper, and the ledger of our own runs."""

from pomona.claims.run import Verdict, claim, read_ledger
from pomona.claims.verdict import Bound, Comparison, Prediction

__all__ = ["Bound", "Comparison", "Prediction", "Verdict", "claim", "read_ledger"]
