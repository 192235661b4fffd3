"""``pomona trace``: the axes of any network, what is fixed and why, and the proof."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pomona.errors import PomonaError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("trace")(trace)


def trace(
    maker: Annotated[str, typer.Argument(help="module:function that returns the network, as in mypackage:make_model.")],
    input: Annotated[
        list[str], typer.Option("--input", "-i", help="Shape of an input, as in 1,3,224,224; once for each argument.")
    ],
    dtype: Annotated[
        str, typer.Option(help="float32 or float64, or int64 for token numbers, for all inputs.")
    ] = "float32",
    below: Annotated[
        int, typer.Option("--int", help="Token inputs: whole numbers below this; sets --dtype int64.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the random inputs and permutations.")] = 0,
    check: Annotated[bool, typer.Option(help="Permute every axis in float64 and compare the outputs.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Axes of exchangeable units, bundles, what is fixed and why, and the check that all of it is right."""
    from pomona.trace import axes

    net = _made(maker)
    found = axes(net, *_example(input, dtype, below, seed))
    result = found.check(seed) if check else None
    rows = found.table()
    if as_json:
        proof = None if result is None else {"worst": result.worst, "errors": result.errors, "passed": bool(result)}
        print(json.dumps({"rows": rows, "unknown": list(found.unknown), "check": proof}, indent=1))
    else:
        _print(rows, found.unknown)
        if result is not None:
            verdict = "every axis is right" if result else "WRONG"
            print(f"check: largest difference in float64 {result.worst:.2g}, {verdict}")
            for name, error in result.errors.items():
                if error > 1e-9:
                    print(f"  {name}: {error:.2g}")
    if result is not None and not result:
        raise typer.Exit(1)


def _made(maker: str) -> Any:
    from torch import nn

    module, colon, name = maker.partition(":")
    if not colon:
        raise PomonaError(f"maker={maker!r} is not module:function, as in mypackage:make_model")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise PomonaError(f"maker={maker!r}: there is no module {error.name!r} here or installed") from error
    except AttributeError as error:
        raise PomonaError(f"maker={maker!r}: {module} has no {name!r}") from error
    finally:
        sys.path.pop(0)
    net = made if isinstance(made, nn.Module) else made()
    if not isinstance(net, nn.Module):
        raise PomonaError(f"maker={maker!r} returned {type(net).__name__}, not a torch.nn.Module")
    return net


def _example(shapes: list[str], dtype: str, below: int, seed: int) -> list[Any]:
    import torch

    if dtype not in {"float32", "float64", "int64"}:
        raise PomonaError(f"dtype={dtype!r} is not known; choose one of float32, float64, int64")
    generator = torch.Generator().manual_seed(seed)
    example: list[Any] = []
    for text in shapes:
        try:
            shape = [int(size) for size in text.split(",")]
        except ValueError as error:
            raise PomonaError(f"input={text!r} is not a shape; write whole numbers, as in 1,3,224,224") from error
        if min(shape) < 1:
            raise PomonaError(f"input={text!r} has a size below 1")
        if below or dtype == "int64":
            example.append(torch.randint(below or 2, shape, generator=generator))
        else:
            example.append(torch.randn(shape, generator=generator, dtype=getattr(torch, dtype)))
    return example


def _print(rows: list[dict[str, Any]], unknown: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, kinds in (("Axes", ("unit", "block")), ("Fixed", ("fixed",))):
        shown = [row for row in rows if row["kind"] in kinds]
        columns = (
            ("axis", "kind", "units", "groups", "places", "note") if title == "Axes" else ("axis", "places", "note")
        )
        table = Table(*columns, title=f"{title} ({len(shown)})", title_justify="left")
        for row in shown:
            table.add_row(*(str(row[column]) for column in columns))
        console.print(table)
    if unknown:
        print(f"operations without a rule, whose inputs and outputs are fixed: {', '.join(unknown)}")
