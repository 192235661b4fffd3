"""The study as one HTML file that opens anywhere, without a network."""

from pomona.report.build import write

__all__ = ["write"]
