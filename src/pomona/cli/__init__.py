"""The command line."""

from pomona.cli.app import main

__all__ = ["main"]
