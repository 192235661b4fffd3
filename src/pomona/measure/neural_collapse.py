"""Neural collapse: how far class features have shrunk to points in a symmetric arrangement.

Source: "Prevalence of Neural Collapse during the terminal phase of deep learning training" (arXiv 2008.08186);
orthogonal frames and unequal lengths from "Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced
Data" (arXiv 2301.00437).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, unknown
from pomona.measure.reading import Reading

Batches = Iterable[tuple[Tensor, Tensor]]


def simplex_etf(classes: int, dim: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
    """Unit vectors of a simplex equiangular tight frame: pairwise cosine ``-1/(K-1)``.

    Args:
        classes: number of vectors K.
        dim: dimension, at least K (default K); a random rotation when ``generator`` is given.
        generator: of the rotation.

    Returns:
        ``(classes, dim)`` in float64.
    """
    dim = classes if dim is None else dim
    if classes < 2 or dim < classes:
        raise PomonaError(f"dim={dim} must be at least classes={classes}, and classes at least 2")
    frame = torch.eye(classes, dim, dtype=torch.float64)
    frame[:, :classes] = frame[:, :classes].sub(1 / classes).mul((classes / (classes - 1)) ** 0.5)
    if generator is None:
        return frame
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    return frame @ rotation


def class_means(features: Tensor, labels: Tensor, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean feature ``(classes, d)`` and number of examples ``(classes,)`` of each class.

    Raises:
        PomonaError: if a class has no example.
    """
    classes = int(labels.max()) + 1 if classes is None else classes
    counts = torch.bincount(labels, minlength=classes)
    if bool((counts == 0).any()):
        raise PomonaError(f"labels have no example of class {int((counts == 0).nonzero()[0])} of {classes}; give one")
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    return sums / counts[:, None], counts


def gram_distance(vectors: Tensor, target: Tensor) -> Tensor:
    """``|| G/||G|| - T/||T|| ||_F`` of the Gram matrix G of the rows against a target T: 0 when equal up to scale."""
    gram = vectors @ vectors.mT
    return torch.linalg.norm(gram / torch.linalg.norm(gram) - target / torch.linalg.norm(target))


def nc_metrics(
    features: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    predictions: Tensor | None = None,
    lengths: Tensor | None = None,
    classes: int | None = None,
) -> dict[str, float]:
    """Neural-collapse metrics of one layer, all 0 at perfect collapse.

    With class means ``mu_k``, their mean ``mu``, centred means ``M = (mu_k - mu)``, within- and between-class
    covariances ``S_W``, ``S_B = M^T M / K``::

        nc1      = tr(S_W pinv(S_B)) / K
        nc2_etf  = distance of the Gram of M from a simplex ETF        nc2_of  = ... of mu_k from the identity (OF)
        nc2_gof  = ... of mu_k from diag(lengths)
        nc3      = || W/||W|| - M/||M|| ||_F  (centred means)          nc3_of  = the same with mu_k
        nc4      = share of examples whose nearest class mean is not the predicted class

    Args:
        features: ``(n, d)``.
        labels: ``(n,)`` class indices.
        weight: classifier ``(classes, d)`` acting on these features; without it no ``nc3``.
        predictions: ``(n,)`` classes the network predicts; without them no ``nc4``.
        lengths: ``(classes,)`` predicted squared lengths of the class means, for ``nc2_gof``.
        classes: number of classes (default: largest label + 1).

    Source: arXiv 2008.08186 (nc1-nc4), arXiv 2301.00437 (orthogonal frames, lengths).
    """
    features = features.detach().double()
    means, _ = class_means(features, labels, classes)
    k = len(means)
    centred = means - means.mean(0)
    within = features - means[labels]
    # pinv(S_B) from the singular vectors of M: exact even when d is large; rank is at most K-1
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    keep = s > 1e-6 * s[0]
    projected = within @ vh[keep].mT
    eye = torch.eye(k, dtype=torch.float64, device=features.device)
    out = {
        "nc1": (projected.square().mean(0) * k / s[keep].square()).sum() / k,
        "nc2_etf": gram_distance(centred, eye - 1 / k),
        "nc2_of": gram_distance(means, eye),
    }
    if lengths is not None:
        out["nc2_gof"] = gram_distance(means, torch.diag(lengths.to(features)))
    if weight is not None:
        unit = weight.detach().to(features)
        unit = unit / torch.linalg.norm(unit)
        out["nc3"] = torch.linalg.norm(unit - centred / torch.linalg.norm(centred))
        out["nc3_of"] = torch.linalg.norm(unit - means / torch.linalg.norm(means))
    if predictions is not None:
        out["nc4"] = (torch.cdist(features, means).argmin(1) != predictions).double().mean()
    return {name: float(value) for name, value in out.items()}


def as_batches(data: Any, split: str = "train", batch_size: int = 1024) -> Batches:
    """Batches ``(x, y)`` of a task's split, of a pair of tensors, or of a loader as it is."""
    if hasattr(data, "splits"):
        if split not in data.splits:
            raise unknown("split", split, data.splits)
        data = data.splits[split]
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return list(zip(data[0].split(batch_size), data[1].split(batch_size), strict=True))
    return data


@torch.no_grad()
def layer_features(
    net: nn.Module, batches: Batches, layers: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """Features entering each layer, recorded by forward hooks in evaluation mode.

    Args:
        net: any network whose output is the logits ``(batch, classes)``.
        batches: pairs ``(x, y)``.
        layers: names of modules (default: every ``nn.Linear``).

    Returns:
        ``(features, weights, logits, labels)``: ``name -> (n, d)``; ``name -> (classes, d)`` product of the linear
        layers from that one to the output, only where nothing else stands between; ``(n, classes)``; ``(n,)``.
    """
    modules = dict(net.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    names = list(linears) if layers is None else list(layers)
    for name in names:
        if name not in modules:
            raise unknown("layers", name, modules)
    chunks: dict[str, list[Tensor]] = {name: [] for name in names}
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] = inputs[0], output
            if name in chunks:
                chunks[name].append(inputs[0].flatten(1).clone())

        return record

    handles = [modules[name].register_forward_hook(hook(name)) for name in {*names, *linears}]
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        logits, labels = [], []
        for x, y in batches:
            logits.append(net(x))
            labels.append(y)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not logits:
        raise PomonaError("batches is empty; neural collapse needs at least one example of each class")
    weights: dict[str, Tensor] = {}
    target, product = logits[-1], None
    while True:  # walk the chain of linear layers back from the output: output of one is the input of the next
        name = next((n for n in linears if n in calls and calls[n][1] is target and n not in weights), None)
        if name is None:
            break
        product = linears[name].weight if product is None else product @ linears[name].weight
        weights[name], target = product, calls[name][0]
    features = {name: torch.cat(parts) for name, parts in chunks.items() if parts}
    return features, weights, torch.cat(logits), torch.cat(labels)


def neural_collapse(
    net: nn.Module,
    task: Any,
    *,
    split: str = "train",
    layers: Sequence[str] | None = None,
    lengths: Tensor | None = None,
    batch_size: int = 1024,
) -> Reading:
    """Neural-collapse metrics of the features entering each layer.

    Args:
        net: a classifier; its output is the logits.
        task: a task, a pair ``(x, y)``, or a loader of such pairs.
        split: which split of a task; collapse is defined on the training examples.
        layers: names of modules (default: every ``nn.Linear``).
        lengths: ``(classes,)`` predicted squared lengths of class means (imbalanced data), see ``nc_metrics``.
        batch_size: examples at a time.

    Returns:
        ``values["nc1"]`` etc. of the last layer and ``values["nc1@name"]`` etc. of every layer, with a figure of the
        metrics over the layers.
    """
    from pomona.measure.reading import lines

    features, weights, logits, labels = layer_features(net, as_batches(task, split, batch_size), layers)
    if not features:
        raise PomonaError("layers: the network has no nn.Linear that was used; name the layers to read")
    classes, predictions = logits.shape[1], logits.argmax(1)
    table = {
        name: nc_metrics(h, labels, weights.get(name), predictions=predictions, lengths=lengths, classes=classes)
        for name, h in features.items()
    }
    last = next(name for name in reversed(table))
    values = dict(table[last]) | {f"{key}@{name}": v for name, row in table.items() for key, v in row.items()}
    names = list(table)
    series = {key: (names, [table[name].get(key) for name in names]) for key in table[last] if key != "nc4"}
    return Reading(values, lines(series, x_title="layer", y_title="distance from collapse", log_y=True))
