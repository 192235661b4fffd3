"""Run claims at full scale into the ledger: ``python -m pomona.claims.all [KEY ...]``; without keys, every claim
there is.
"""

from __future__ import annotations

import logging
import sys

from pomona import catalog
from pomona.claims.run import claim, write_ledger


def main(keys: list[str]) -> None:
    """Run the claims one after the other; each verdict is kept before the next begins."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("pomona.claims").setLevel(logging.INFO)
    chosen = keys or [paper.key for paper in catalog.papers().values() if paper.claim]
    for key in chosen:
        verdict = claim(key, "full")
        write_ledger(verdict)
        print(f"{verdict.sentence()} ({verdict.seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
