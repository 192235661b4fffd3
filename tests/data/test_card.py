import json

import numpy as np
import pandas as pd
from rich.console import Console

from pomona.data import DataCard, load


def card():
    frame = pd.DataFrame(
        {"age": [1.5, np.nan] * 20, "[red]city": ["rome", "oslo", "bonn", "ulm"] * 10, "y": ["a", "b"] * 20}
    )
    return load(frame, "y").card


def test_json_round_trip():
    first = card()
    assert DataCard.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_the_card_says_what_was_found_and_done():
    text = str(card())
    for part in ("a DataFrame", "y (classes)", "40: ", "train", "stratified", "a 20, b 20", "number", "indicator"):
        assert part in text
    assert "[red]city" in text  # a name is never read as markup


def test_the_card_renders_in_a_narrow_terminal():
    console = Console(width=40, record=True, file=None)
    with console.capture() as capture:
        console.print(card().render())
    assert "age" in capture.get()


def test_many_classes_are_cut_short():
    x = np.random.default_rng(0).normal(size=(200, 2))
    text = str(load((x, np.array([f"c{i:02}" for i in range(20)] * 10))).card)
    assert "(20 in all)" in text and "c19" not in text
