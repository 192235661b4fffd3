"""What an invertible network does to its input: how classes contract with depth, and how a small step is stretched.

Source: i-RevNet: Deep Invertible Networks, arXiv 1802.07088.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pomona.data.task import Split
from pomona.errors import PomonaError
from pomona.measure.reading import Reading, lines
from pomona.nets.irevnet import IRevNet


@torch.no_grad()
def contraction(net: IRevNet, train: Split, test: Split, *, share: float = 0.95, seed: int = 0) -> Reading:
    """How well classes can be told apart, and in how many directions they vary, at every depth.

    Args:
        net: in evaluation mode.
        train: images and classes that the classifiers are fitted on.
        test: others, that they are scored on.
        share: of the variance that principal components must explain.
        seed: of the linear classifier.

    Returns:
        Lists over depths, the input first: ``linear`` accuracy of a linear support vector machine, ``nearest`` of the
        nearest neighbour, ``components`` needed for the share of variance within a class, mean over classes.

    Raises:
        PomonaError: if a class has fewer than two examples.
    """
    classes, counts = np.unique(train.y.numpy(), return_counts=True)
    if counts.min() < 2:
        raise PomonaError(
            f"train holds {counts.min()} example of class {classes[counts.argmin()]}; it needs two or more"
        )
    values: dict[str, list[float]] = {"linear": [], "nearest": [], "components": []}
    for fitted, judged in zip(net.states(train.x), net.states(test.x), strict=True):
        x, z = (state.flatten(1).double().numpy() for state in (fitted, judged))
        linear = make_pipeline(StandardScaler(), LinearSVC(C=0.01, random_state=seed))
        for name, model in (("linear", linear), ("nearest", KNeighborsClassifier(1))):
            values[name].append(float(model.fit(x, train.y.numpy()).score(z, test.y.numpy())))
        needed = [
            1 + int(np.searchsorted(PCA().fit(x[train.y.numpy() == c]).explained_variance_ratio_.cumsum(), share))
            for c in classes
        ]
        values["components"].append(float(np.mean(needed)))
    depth = list(range(len(values["linear"])))
    figure = lines({name: (depth, values[name]) for name in ("linear", "nearest")}, x_title="block", y_title="accuracy")
    return Reading(dict(values), figure)


def jacobian_spectrum(net: IRevNet, x: Tensor) -> Tensor:
    """Singular values of the derivative of the features by the pixels of one image (C, H, W), largest first.

    The sum of their logarithms is 0 for the bijective network.
    """
    jacobian = torch.func.jacrev(lambda image: net.forward_features(image[None]).flatten())(x)
    return torch.linalg.svdvals(jacobian.detach().flatten(1))


def saved_activations(net: nn.Module, x: Tensor) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    return sum(sizes.values())
