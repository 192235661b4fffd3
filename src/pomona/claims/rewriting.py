"""Does a change of low rank, weighed by the second moment of the keys, disturb a generator less than fine-tuning?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log as ln
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.claims.lab import log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import load
from pomona.edit.rewriting import Rewrite, Rewriter, locality
from pomona.trace.chain import chain
from pomona.train import batches

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"data": 600, "steps": 40, "edit": 30, "channels": 8, "rates": 1},
    "full": {"data": 10_000, "steps": 800, "edit": 400, "channels": 32, "rates": 3},
    "gpu": {"data": 60_000, "steps": 10_000, "edit": 2001, "channels": 64, "rates": 3},
}
EXAMPLES, ROWS, RANK = 5, 10, 1
"""Bags that show the rule; rows at the top of the picture where a handle is to vanish; directions of the edit."""
GOAL = 0.1
"""Share of the examples' loss at which every method stops."""
RATES: dict[str, tuple[float, ...]] = {
    "rewriting": (1e-2, 3e-3, 1e-3),
    "rewriting, C = I": (1e-2, 3e-3, 1e-3),
    "fine-tuned layer": (1e-3, 3e-4, 1e-4),
    "fine-tuned network": (1e-3, 3e-4, 1e-4),
}


def rewriting(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """At equal error on the examples, rewriting changes pictures of other classes less than fine-tuning.

    A convolutional autoencoder of Fashion-MNIST; in its decoder the rule is written that bags have no handle: the ten
    upper rows are blank, shown on five bags. Every method stops at a tenth of the examples' first loss (or where
    rewriting ended, if that is more) and has its learning rate chosen by its change of validation pictures of other
    classes; the change is then taken on test pictures of other classes. The baseline is the better of fine-tuning
    the same layer's weight and fine-tuning the decoder. In the details: C = I, what is left of the handles of test
    bags, the change of their lower rows, and an associative memory of correlated keys of which one is overwritten.
    """
    size = SIZES[scale]
    task = load("fashion_mnist", limit=size["data"])
    assert task.pipeline is not None
    bag = task.pipeline.target.names.index("Bag")
    low, high = (float(getattr(task.splits["train"].x, end)()) for end in ("min", "max"))
    pixels = {part: ((x - low) / (high - low), y == bag) for part, (x, y) in task.splits.items()}
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        net = _autoencoder(pixels["train"][0], size, seed)
        rows.append({**_edits(net, pixels, size), "memory": _memory(seed)})
        changes = {name: round(rows[-1][name]["change of other classes"], 4) for name in RATES}
        log.info("rewriting seed %d: %s", seed, changes)
    method = [ln(row["rewriting"]["change of other classes"]) for row in rows]
    tuned = [name for name in RATES if name.startswith("fine-tuned")]
    baseline = [ln(min(row[name]["change of other classes"] for name in tuned)) for row in rows]
    return Comparison(
        method=method,
        baseline=baseline,
        metric="logarithm of the relative change of test pictures of other classes",
        method_name=f"rank-{RANK} change weighed by the second moment of the keys",
        baseline_name="the better of fine-tuning the layer and fine-tuning the decoder",
        paper="Edits generalise to other pictures with fewer unwanted changes than fine-tuning.",
        better="lower",
        note="A small autoencoder's decoder in the place of StyleGAN.",
        censored=any(row[name]["loss"] > row["rewriting"]["loss"] + 1e-6 for row in rows for name in tuned),
        details=_mean(rows),
    )


def _autoencoder(x: Tensor, size: dict[str, Any], seed: int) -> nn.ModuleDict:
    c = size["channels"]

    def make() -> nn.Module:
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 32))
        decoder = nn.Sequential(
            *(nn.Linear(32, c * 49), nn.ReLU(), nn.Unflatten(1, (c, 7, 7)), nn.Upsample(scale_factor=2)),
            *(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2)),
            *(nn.Conv2d(c, c // 2, 3, padding=1), nn.ReLU(), nn.Conv2d(c // 2, 1, 3, padding=1)),
        )
        return nn.ModuleDict({"encoder": encoder, "decoder": decoder})

    net: Any = seeded(make, seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _, index in zip(range(size["steps"]), batches(len(x), 64, seed), strict=False):
        optimizer.zero_grad()
        F.mse_loss(net["decoder"](net["encoder"](x[index])), x[index]).backward()
        optimizer.step()
    return net.requires_grad_(False).eval()


def _edits(net: nn.ModuleDict, pixels: dict[str, tuple[Tensor, Tensor]], size: dict[str, Any]) -> dict[str, Any]:
    decoder = net["decoder"]
    codes = {part: net["encoder"](x) for part, (x, _) in pixels.items()}
    bags = {part: codes[part][is_bag] for part, (_, is_bag) in pixels.items()}
    handle = decoder(bags["train"])[:, :, :ROWS].mean((1, 2, 3))
    chosen = bags["train"][handle.topk(EXAMPLES).indices]
    goal = decoder(chosen)
    goal[:, :, :ROWS] = 0
    region = torch.zeros(EXAMPLES, 1, 28, 28)
    region[:, :, :ROWS] = 1
    others = {part: codes[part][~pixels[part][1]] for part in ("valid", "test")}
    given = chosen, goal, region
    rewriter = Rewriter(decoder, "4", codes["train"][:2000], blocks=chain(decoder, codes["train"][:2]))
    start = float((decoder(chosen) - goal)[:, :, :ROWS].abs().mean())
    common = {"steps": size["edit"], "tolerance": GOAL * start}
    methods: dict[str, Callable[[dict[str, Any]], Rewrite]] = {
        "rewriting": lambda kw: rewriter.insert(*given, rank=RANK, project_every=None, **kw),
        "rewriting, C = I": lambda kw: rewriter.insert(*given, rank=RANK, whiten=False, project_every=None, **kw),
        "fine-tuned layer": lambda kw: rewriter.fine_tune(*given, scope="layer", **kw),
        "fine-tuned network": lambda kw: rewriter.fine_tune(*given, scope="all", **kw),
    }
    before = decoder(bags["test"])
    bright = before[:, :, :ROWS].mean((1, 2, 3)) > handle.median()  # bags that have a handle to lose
    out: dict[str, Any] = {"first loss": start}
    for name, run in methods.items():
        tried = [run({**common, "lr": lr}) for lr in RATES[name][: size["rates"]]]
        reached = [done for done in tried if done.losses[-1] <= common["tolerance"]]
        if reached:
            best = min(reached, key=lambda done: locality(decoder, done.net, others["valid"])["mean"])
        else:
            best = min(tried, key=lambda done: float(done.losses[-1]))
        if name == "rewriting":  # the others need not do better
            common["tolerance"] = max(common["tolerance"], float(best.losses[-1]))
        after = best.net(bags["test"])
        out[name] = {
            "change of other classes": locality(decoder, best.net, others["test"])["mean"],
            "loss": float(best.losses[-1]),
            "steps": float(len(best.losses)),
            "brightness left where test bags had a handle": float(
                after[bright][:, :, :ROWS].abs().mean() / before[bright][:, :, :ROWS].abs().mean()
            ),
            "change of the lower rows of test bags": float(
                (after - before)[:, :, ROWS:].norm() / before[:, :, ROWS:].norm()
            ),
        }
    return out


def _memory(seed: int, d: int = 64, pairs: int = 40) -> dict[str, float]:
    """Relative change of the other pairs of an associative memory when one of its correlated keys is overwritten."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    mixing = rotation * torch.logspace(0, -1.3, d)  # of condition 20
    population = torch.randn(100 * d, d, generator=generator) @ mixing.mT
    keys = population[:pairs]
    values = torch.randn(pairs, d, generator=generator)
    layer = nn.Linear(d, d, bias=False)
    layer.weight.data = torch.linalg.lstsq(keys, values).solution.mT
    rewriter, value = Rewriter(layer, "", population), torch.randn(1, d, generator=generator)
    edited = {
        "C": rewriter.closed_form(keys[:1], value),
        "C = I": rewriter.closed_form(keys[:1], value, whiten=False),
        "fine-tuned layer": rewriter.fine_tune(keys[:1], value, steps=2000, lr=1e-2, tolerance=1e-2).net,
    }
    return {name: locality(layer, net, keys[1:])["mean"] for name, net in edited.items()}


def _mean(rows: Sequence[Any]) -> Any:
    """Mean over seeds, through nested dicts."""
    if isinstance(rows[0], dict):
        return {key: _mean([row[key] for row in rows]) for key in rows[0]}
    return sum(rows) / len(rows)
