"""Embedded Reber strings: a small grammar whose last but one letter must repeat the second, however long ago it was.

Source: Investigating Sparsity in Recurrent Neural Networks (arXiv 2407.20601).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from pomona.data.splits import stratified
from pomona.data.task import Split, Task
from pomona.errors import PomonaError, check_positive
from pomona.nets.specs import Inputs, Outputs

SYMBOLS = "BTPSXVE"
REBER: tuple[dict[str, int], ...] = (
    {"B": 1},
    {"T": 2, "P": 3},
    {"S": 2, "X": 4},
    {"T": 3, "V": 5},
    {"X": 3, "S": 6},
    {"P": 4, "V": 6},
    {"E": 7},
    {},
)
"""State -> letter -> next state; a string is done in the last state."""


def accepts(string: str, embedded: bool = True) -> bool:
    """Whether the string is ``B c R c E``, ``c`` T or P and ``R`` a string the automaton takes, or is ``R`` alone."""
    if embedded:
        frame = string[:2] + string[-2:]
        return frame in ("BTTE", "BPPE") and len(string) > 4 and accepts(string[2:-2], embedded=False)
    state = 0
    for letter in string:
        if letter not in REBER[state]:
            return False
        state = REBER[state][letter]
    return state == len(REBER) - 1


def reber_string(rng: random.Random, embedded: bool = True) -> str:
    """One string; each way out of a state is as likely as the other."""
    if embedded:
        frame = rng.choice("TP")
        return f"B{frame}{reber_string(rng, embedded=False)}{frame}E"
    letters, state = [], 0
    while REBER[state]:
        letter = rng.choice(list(REBER[state]))
        letters.append(letter)
        state = REBER[state][letter]
    return "".join(letters)


def embedded_reber(
    n: int,
    min_len: int = 10,
    max_len: int = 30,
    corrupt: float = 0.5,
    long_range: float = 0.0,
    embedded: bool = True,
    seed: int = 0,
) -> tuple[list[str], Tensor]:
    """Strings of the grammar and strings that miss it by one letter; synthetic.

    Args:
        n: strings.
        min_len, max_len: letters of each; longer and shorter ones are drawn anew.
        corrupt: share that is invalid: one letter of a valid string is exchanged so that the automaton rejects it.
        long_range: share of the invalid ones whose exchanged letter is the last but one, which only the second letter
            gives away (embedded strings only).
        embedded: with the outer frame.
        seed: of all draws.

    Returns:
        The strings in random order, and whether each is valid, (n,) int64.

    Raises:
        PomonaError: for a share outside [0, 1], or lengths that no string has.

    Source: Implicit learning of artificial grammars (Reber 1967); embedded: Long Short-Term Memory (Hochreiter and
    Schmidhuber 1997).
    """
    check_positive(n=n)
    for name, share in (("corrupt", corrupt), ("long_range", long_range)):
        if not 0 <= share <= 1:
            raise PomonaError(f"{name}={share} must lie in [0, 1]")
    shortest = 9 if embedded else 5
    if not max(min_len, shortest) < max_len:
        raise PomonaError(f"min_len={min_len} and max_len={max_len} leave too few strings; max_len must be above "
                          f"{max(min_len, shortest)}")  # fmt: skip
    rng = random.Random(seed)
    invalid = round(corrupt * n)
    far = round(long_range * invalid) if embedded else 0
    rows: list[tuple[str, int]] = []
    while len(rows) < n:
        string = reber_string(rng, embedded)
        if min_len <= len(string) <= max_len:
            bad = len(rows) < invalid
            rows.append((_corrupted(string, rng, embedded, len(rows) < far) if bad else string, int(not bad)))
    rng.shuffle(rows)
    return [string for string, _ in rows], torch.tensor([label for _, label in rows])


def _corrupted(string: str, rng: random.Random, embedded: bool, far: bool) -> str:
    while True:
        at = len(string) - 2 if far else rng.randrange(len(string))
        letter = "TP"[string[at] == "T"] if far else rng.choice(SYMBOLS)
        changed = string[:at] + letter + string[at + 1 :]
        if not accepts(changed, embedded):
            return changed


def encode(strings: Sequence[str], length: int | None = None) -> Tensor:
    """One-hot letters (n, 7, length), float32; shorter strings are preceded by zeros, so that all end together."""
    length = length or max(map(len, strings))
    x = torch.zeros(len(strings), len(SYMBOLS), length)
    for row, string in zip(x, strings, strict=True):
        codes = torch.tensor([SYMBOLS.index(letter) for letter in string])
        row[codes, torch.arange(length - len(string), length)] = 1
    return x


def reber_task(n: int = 3000, *, seed: int = 0, max_len: int = 30, **options: float) -> Task:
    """Valid or not: a task of series with 7 channels over :func:`embedded_reber`, split 64 : 16 : 20. Synthetic."""
    strings, y = embedded_reber(n, max_len=max_len, seed=seed, **options)  # type: ignore[arg-type]
    x = encode(strings, max_len)
    rows = stratified(y.numpy(), seed)
    return Task(
        "embedded Reber strings",
        Inputs("series", (len(SYMBOLS), max_len)),
        Outputs("classes", 2, ("invalid", "valid")),
        {name: Split(x[torch.as_tensor(i)], y[torch.as_tensor(i)]) for name, i in rows.items()},
    )
