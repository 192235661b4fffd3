"""Write the generated pages: the catalogue, the slots, the layers, the claims, and the counts in the README.

    python docs/generate.py            writes them
    python docs/generate.py --check    exits with 1 when one of them is stale

Everything comes from catalog.toml, slots.toml and claims/ledger.json of the source tree beside this file, and from what
``bench`` left in docs/measured.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pomona import catalog

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LEDGER = ROOT / "src" / "pomona" / "claims" / "ledger.json"
MARKERS = ("<!-- catalogue -->", "<!-- /catalogue -->")
NOTICE = "<!-- written by docs/generate.py; change the data, not this page -->\n\n"

SLOT_TEXT = {
    "linear": "In place of a linear layer: `(*, in) -> (*, out)`. In `mlp`, `mixer`, `sequence`.",
    "act": "Activations. In every backbone.",
    "norm": "Normalisation, before the activation or, in `mixer` and `sequence`, before each branch.",
    "pool": "Pooling between the stages of `convnet`.",
    "conv": "In place of a convolution, in `convnet` and `resnet`.",
    "residual": "How a block's input and output are joined: called as `module(x, branch)`.",
    "mixer": "What mixes tokens with one another, `(B, N, D) -> (B, N, D)`, in `mixer` and `sequence`.",
    "ffn": "The feed-forward part of a token block, in `mixer` and `sequence`.",
    "memory": "A layer between the last block and the head, in every backbone.",
    "head": "The last layer, in every backbone.",
    "init": "Initialisation of the whole network: the key `init=` of a candidate.",
    "weights": "What generates the network's weights: the key `weights=`.",
    "edit": "What is done to the trained network: the key `edit=`.",
    "rule": "The learning rule: the key `rule=`.",
    "schedule": "The learning-rate schedule: the key `schedule=`.",
    "loss": "A loss in place of the task's own: the key `loss=`.",
    "transform": "A change of the gradients before the optimiser: the key `transform=`.",
}


def escape(text: str) -> str:
    """Text inside a cell of a table."""
    return re.sub(r"([|*_<>\[\]])", r"\\\1", " ".join(str(text).split()))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are Markdown already."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def arxiv(identity: str) -> str:
    """A link to the paper, or nothing."""
    return f"[{identity}](https://arxiv.org/abs/{identity})" if identity else ""


def verdicts() -> list[dict[str, Any]]:
    """The entries of the ledger, in the catalogue's order."""
    order = {key: i for i, key in enumerate(catalog.papers())}
    entries = json.loads(LEDGER.read_text(encoding="utf-8"))
    return sorted(entries, key=lambda e: (order.get(e["key"], len(order)), e["scale"]))


def counts() -> str:
    """Done and all papers, family by family."""
    papers = list(catalog.papers().values())
    families = list(dict.fromkeys(p.family for p in papers))
    rows = []
    for family in families:
        own = [p for p in papers if p.family == family]
        rows.append((family, str(sum(p.status == "done" for p in own)), str(len(own))))
    rows.append(("**all**", f"**{sum(p.status == 'done' for p in papers)}**", f"**{len(papers)}**"))
    return table(("family", "done", "papers"), rows)


def catalogue_page() -> str:
    """Every paper, family by family."""
    papers = list(catalog.papers().values())
    parts = [
        "# Catalogue\n",
        f"All {len(papers)} papers. *Done* means: the method is there, the facts of the paper are tests, and its "
        "headline is a claim that can be run. *Part* means some of these. *Open* means that it is still to come: the "
        "row says what, not when.\n",
        "`pomona list` prints this table, `pomona show KEY` tells more of one row.\n",
        counts(),
    ]
    for family in dict.fromkeys(p.family for p in papers):
        rows = []
        for p in (p for p in papers if p.family == family):
            link = arxiv(p.arxiv)
            slots = ", ".join(f"`{slot}={name}`" for slot, names in p.slots.items() for name in names)
            rows.append((f"`{p.key}`", f"{escape(p.title)} ({p.year}){', ' if link else ''}{link}", p.status, slots))
        parts += [f"## {family}\n", table(("key", "paper", "status", "slots"), rows)]
    return NOTICE + "\n".join(parts)


def options_of(make: str) -> str:
    """The options that a person may set, with their defaults, from the signature."""
    from pomona.options import SIZES, parameters

    try:
        named, _ = parameters(catalog.load(make))
    except (ImportError, AttributeError):
        return ""
    shown = [p for name, p in named.items() if name not in SIZES and name != "self"]
    if make.startswith("torch."):  # PyTorch's own layers keep their defaults
        return ""
    # a default that is no plain value has no text that stays the same from run to run
    plain = (str, int, float, bool, tuple, type(None))
    return ", ".join(f"`{p.name}={p.default}`" if isinstance(p.default, plain) else f"`{p.name}`" for p in shown)


def slots_page() -> str:
    """Slot -> names."""
    parts = [
        "# Slots\n",
        "A candidate puts a name into a slot: `mlp act=gelu`. A name may have options: `mlp linear=kan:grid=8`. "
        "`pomona list --slot act` prints one of these tables. "
        "How candidates are written is said in [Candidates](candidates.md).\n",
    ]
    for slot, options in catalog.slots().items():
        parts.append(f"## {slot}\n")
        parts.append(SLOT_TEXT.get(slot, "") + "\n")
        if not options:
            parts.append("No names yet.\n")
            continue
        rows = []
        for name, entry in options.items():
            paper = catalog.papers().get(entry.paper)
            title = f"{escape(paper.title)}, {arxiv(paper.arxiv)}" if paper else ""
            rows.append(
                (f"`{name}`", f"`{entry.make.replace(':', '.')}`", escape_options(options_of(entry.make)), title)
            )
        parts.append(table(("name", "made by", "options", "paper"), rows))
    parts.append("## Short names\n")
    parts.append(
        "A short name stands for a whole candidate. Options after a colon go to the first name in it: `kan:grid=8`.\n"
    )
    parts.append(table(("name", "candidate"), [(f"`{k}`", f"`{v}`") for k, v in catalog.short_names().items()]))
    return NOTICE + "\n".join(parts)


def measured(name: str) -> Any:
    """What a benchmark left, or nothing."""
    path = DOCS / "measured" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def first_equation(paper: catalog.Paper) -> str:
    """The first line of a part's docstring that holds an equation."""
    for part in paper.parts:
        doc = inspect.getdoc(catalog.load(part)) or ""
        text = re.split(r"\n(?:Args|Shape|Raises|Returns|Source|Attributes)s?:", doc)[0]
        sentences = [line.strip() for line in re.split(r"\n|: (?=\S+ = )", text)]
        found = next((line for line in sentences if " = " in line or " <- " in line), "")
        if found:
            return found.rstrip(".:;,")
    return ""


def cost_ratios() -> dict[tuple[str, str], float]:
    """(slot, name) -> time of a training step over that of the plain layer of the same shape."""
    rows = (measured("layer_costs") or {}).get("rows", [])
    return {(r["slot"], r["name"]): r["step"]["layer"] / r["step"]["same shape"] for r in rows if "step" in r}


def helped() -> dict[tuple[str, str], str]:
    """(slot, name) -> the data sets on which it was surely better, or worse, than the plain choice."""
    found: dict[tuple[str, str], list[str]] = {}
    for study in measured("layer_comparisons") or []:
        for row in study["rows"]:
            words = found.setdefault((study["slot"], row["name"]), [])
            if row["sure"]:
                words.append(f"{'better' if row['difference'] > 0 else 'worse'} on {study['data']}")
    return {key: ", ".join(words) or "no sure difference" for key, words in found.items()}


def layers_page() -> str:
    """Every paper of the family layers: slot, equation, cost, verdict, and where it helped."""
    ratios, where = cost_ratios(), helped()
    verdict = {entry["key"]: entry["verdict"] for entry in verdicts()}
    rows = []
    for p in (p for p in catalog.papers().values() if p.family == "layers"):
        names = [(slot, name) for slot, own in p.slots.items() for name in own]
        slots = ", ".join(f"`{slot}={name}`" for slot, name in names)
        costs = ", ".join(dict.fromkeys(f"{ratios[key]:.2g}" for key in names if key in ratios))
        data = "; ".join(f"{name}: {where[slot, name]}" for slot, name in names if (slot, name) in where)
        equation = first_equation(p)
        equation = f"`{escape_options(equation)}`" if equation else ""
        link = f"[{verdict[p.key]}](claims.md#{p.key})" if p.key in verdict else p.status
        rows.append((f"[`{p.key}`](catalogue.md)", slots, equation, costs, link, data))
    parts = [
        "# Layers\n",
        "All papers on layers. *Cost* is the time of a training step over that of `nn.Linear` (or `nn.Conv2d`) of the "
        "same shape, one number for each name; [Performance](performance.md) says how it was measured. *Verdict* is "
        "that of the paper's claim at our scale. *Data* is where a name was surely better or worse than the plain "
        "choice in an MLP, below.\n",
        table(("paper", "slots", "equation", "cost", "verdict", "data"), rows),
        "Any of them goes into your own network: after `from pomona.nn.swap import swap`, "
        '`swap(net, "linear", "kan:grid=8").net` is a copy with another layer in the place of every linear one; its '
        "table says what that changes in parameters and FLOPs. "
        "`pomona compare data.csv --slot act=all` asks which one helps on your data, and "
        "`--slot linear=all --match params` does so at equal parameters. `pomona plot ID` draws what the layers of a "
        "kept network have learned.\n",
    ]
    return NOTICE + "\n".join(parts + comparisons())


def comparisons() -> list[str]:
    """Which activation, norm and linear layer helped on real data."""
    studies = measured("layer_comparisons") or []
    if not studies:
        return []
    first = studies[0]
    parts = [
        "## Which one helps?\n",
        f"`python bench/layer_comparisons.py`: an MLP, {first['seeds']} seeds, {first['trials']} tuning trials, "
        f"{first['epochs']:g} epochs each; linear layers at equal parameters. Mean test metric; **bold** where surely "
        "better than the plain choice (first line), *italic* where surely worse, by a 95% interval paired over seeds. "
        "With so many names a few sure ones are to be expected by chance.\n",
    ]
    notes: dict[str, None] = {}
    for slot in dict.fromkeys(study["slot"] for study in studies):
        own = [study for study in studies if study["slot"] == slot]
        head = [f"{study['data']}, {study['metric']}" for study in own]
        means: dict[str, dict[int, str]] = {}
        plain = ""
        for column, study in enumerate(own):
            for row in study["rows"]:
                if row["difference"] is None and row["mean"] is not None:
                    plain = row["name"]
                text = "" if row["mean"] is None else f"{row['mean']:.3g}"
                mark = ("**" if row["difference"] > 0 else "*") if row["sure"] else ""
                means.setdefault(row["name"], {})[column] = f"{mark}{text}{mark}"
            notes |= dict.fromkeys(note for note in study["notes"] if "left out" in note)
        order = [plain, *(name for name in means if name != plain)]
        table_rows = [(f"`{name}`", *(means[name].get(i, "") for i in range(len(own)))) for name in order]
        parts += [f"### {slot}\n", table((slot, *head), table_rows)]
    text = DOCS / "measured" / "layer_comparisons.md"
    taught = [text.read_text(encoding="utf-8")] if text.exists() else []
    return [*parts, *(f"- {escape(note)}" for note in notes), "", *taught]


def escape_options(text: str) -> str:
    """Inside backticks only the bar must be escaped."""
    return text.replace("|", "\\|")


def number(value: float | None) -> str:
    """Three digits, with a sign."""
    return "" if value is None else f"{value:+.3g}"


def claims_page() -> str:
    """The ledger: verdict, our figure, the paper's, what was run, and notes."""
    entries = verdicts()
    papers = catalog.papers()
    waiting = [p.key for p in papers.values() if p.claim and p.key not in {e["key"] for e in entries}]
    parts = [
        "# Claims\n",
        "A paper's headline, run by us at a scale that fits a small machine, method and baseline at equal budget and "
        "tuned alike. `pomona claim KEY` runs one; `pomona claims` prints this ledger. A claim that fails is kept and "
        "shown.\n",
        "How a verdict is reached:\n",
        "- *comparison*: method minus baseline, paired over seeds, positive where the method is better, with a 95% "
        "Student-t interval. It **holds** when the whole interval lies beyond the margin (0 unless said), **fails** "
        "when the whole interval lies on the other side, and is **undecided** otherwise.",
        "- *prediction*: a theory's curve against measurements. The figure is the worst deviation in standard errors "
        "(or in the stated tolerance, where that is wider). It holds when no point is beyond the limit for that many "
        "points.",
        "- *bound*: measured values against a bound. The figure is the smallest room left. It holds without any "
        "violation.\n",
    ]
    if entries:
        tally = {word: sum(e["verdict"] == word for e in entries) for word in ("holds", "fails", "undecided")}
        parts.append(f"{len(entries)} verdicts: " + ", ".join(f"{n} {word}" for word, n in tally.items()) + ".\n")
        rows = []
        for e in entries:
            interval = f" [{number(e['interval'][0])}, {number(e['interval'][1])}]" if e["interval"] else ""
            margin = f", margin {e['margin']:.3g}" if e.get("margin") else ""
            ours = f"{number(e['effect'])}{interval}{margin}"
            link = f"[`{e['key']}`](#{e['key']})"
            rows.append((link, f"**{e['verdict']}**", ours, escape(e["metric"]), escape(e["paper"])))
        parts.append(table(("paper", "verdict", "ours", "in", "the paper's figure"), rows))
    else:
        parts.append("No claim has been run at full scale yet.\n")
    for e in entries:
        paper = papers[e["key"]]
        parts.append(f"## {e['key']} {{ #{e['key']} }}\n")
        against = f"{escape(e['method'])} against {escape(e['baseline'])}"
        parts.append(f"{escape(paper.title)}, {arxiv(paper.arxiv)}. {against}: **{e['verdict']}** ({e['kind']}).\n")
        commit = f", commit `{e['commit']}`" if e["commit"] else ""
        run = f"{len(e['seeds'])} seeds, {e['scale']} scale, {e['seconds']:.0f} s, {escape(e['machine'])}, {e['date']}"
        parts.append(f"{run}{commit}.\n")
        if e["censored"]:
            parts.append("Censored: some run ended at its budget before it gave its number.\n")
        if e["note"]:
            parts.append(escape(e["note"]) + "\n")
    if waiting:
        parts.append("## Not run at full scale yet\n")
        parts.append(", ".join(f"`{key}`" for key in waiting) + "\n")
    return NOTICE + "\n".join(parts)


def readme() -> str:
    """The README with its table renewed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, start, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not start or not end:
        raise SystemExit(f"README.md needs the lines {MARKERS[0]} and {MARKERS[1]}")
    return f"{before}{start}\n{counts()}{end}{after}"


def pages() -> dict[Path, str]:
    """Path -> what it should hold."""
    return {
        DOCS / "catalogue.md": catalogue_page(),
        DOCS / "slots.md": slots_page(),
        DOCS / "layers.md": layers_page(),
        DOCS / "claims.md": claims_page(),
        ROOT / "README.md": readme(),
    }


def stale() -> list[Path]:
    """The files that do not hold what they should."""
    return [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def main(arguments: list[str]) -> int:
    """Write what is stale, or with ``--check`` say what is."""
    if arguments not in ([], ["--check"]):
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    old = stale()
    for path in old:
        shown = path.relative_to(ROOT)
        if arguments:
            print(f"{shown} is stale; run python docs/generate.py", file=sys.stderr)
        else:
            path.write_text(pages()[path], encoding="utf-8")
            print(f"wrote {shown}")
    return 1 if arguments and old else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
