"""What a bilinear layer computes, read from its weights alone.

Every output direction u of a bilinear layer is a quadratic form, u.y = x^T Q_u x, whose eigenvectors are the
features it looks for and whose eigenvalues say how they count. Source: arXiv 2410.08417.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.bilinear import Bilinear, BilinearNet


class Eigen(NamedTuple):
    """Eigenpairs of one or more quadratic forms, by falling magnitude of the eigenvalue.

    values: (*, pairs). vectors: (*, pairs, layer inputs), one eigenvector a row. features: (*, pairs, net
        inputs),
    the eigenvectors seen through the embedding, so that the form is sum_k values_k (features_k . x)^2.
    """

    values: Tensor
    vectors: Tensor
    features: Tensor


def interaction_tensor(layer: Bilinear, symmetric: bool = True) -> Tensor:
    """B[a, i, j] = W[a, i] V[a, j], symmetrised in i and j unless told: y_a = x^T B_a x.

    Returns:
        (out_features, in_features, in_features)

    Raises:
        PomonaError: if the layer has a gate or a bias, which make it other than a quadratic form.
    """
    _check_exact(layer)
    tensor = torch.einsum("ai,aj->aij", layer.w, layer.v)
    return _symmetric(tensor) if symmetric else tensor


def interaction_matrix(layer: Bilinear, direction: Tensor) -> Tensor:
    """Q_u = sum_a u_a B_a, symmetric, with u.y = x^T Q_u x.

    Args:
        layer: without gate and bias.
        direction: u, (*, out_features).

    Returns:
        (*, in_features, in_features)
    """
    _check_exact(layer)
    return _symmetric(torch.einsum("...a,ai,aj->...ij", direction, layer.w, layer.v))


def eig(layer: Bilinear, direction: Tensor, embed: Tensor | None = None) -> Eigen:
    """The eigenpairs of Q_u, by falling magnitude.

    Args:
        layer: without gate and bias.
        direction: u, (*, out_features).
        embed: E (in_features, net inputs), to see the eigenvectors in the net's input; without it
            `features` are the eigenvectors.
    """
    values, vectors = torch.linalg.eigh(interaction_matrix(layer, direction))
    order = values.abs().argsort(dim=-1, descending=True)
    values = values.gather(-1, order)
    rows = vectors.mT.gather(-2, order[..., None].expand_as(vectors))
    return Eigen(values, rows, rows if embed is None else rows @ embed)


@torch.no_grad()
def eig_features(net: BilinearNet, layer: int = -1) -> Eigen:
    """The eigenpairs of every logit, (classes, pairs, ...).

    For a net of one layer the features live in its input. For a deeper one the forms are those of the chosen
    layer, whose inputs are the outputs of earlier layers; only for the first are they seen through E. In a
    residual net the logits have a further term U h, which is not part of the form.

    Args:
        net: without gates.
        layer: which bilinear layer; the last by default.
    """
    first = layer in (0, -len(net.layers))
    return eig(_layer(net, layer), net.head.weight, net.embed.weight if first else None)


class QuadraticForms(nn.Module):
    """A logit each from weighted squares, y_c = sum_k values[c, k] (features[c, k] . x)^2.

    Args:
        values: (classes, pairs).
        features: (classes, pairs, inputs).

    Shape:
        (batch, *) -> (batch, classes)
    """

    def __init__(self, values: Tensor, features: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.features = nn.Parameter(features)

    def forward(self, x: Tensor) -> Tensor:
        """sum_k values_k (features_k . x)^2."""
        activations = torch.einsum("cki,bi->bck", self.features, x.flatten(1))
        return torch.einsum("ck,bck->bc", self.values, activations.square())


@torch.no_grad()
def truncate(net: BilinearNet, k: int, by: str = "sign") -> QuadraticForms:
    """The net with a few eigenvectors for each class.

    Args:
        net: one bilinear layer, no gate, no residual connection.
        k: how many to keep.
        by: 'sign' keeps the k largest positive and the k largest negative ones, 'magnitude' the k largest.

    Raises:
        PomonaError: if the net is not one plain bilinear layer or ``by`` is unknown.
    """
    check_positive(k=k)
    _check_one_layer(net)
    pairs = eig_features(net)
    if by == "magnitude":
        return QuadraticForms(pairs.values[:, :k], pairs.features[:, :k])
    if by != "sign":
        raise unknown("by", by, ("sign", "magnitude"))
    k = min(k, pairs.values.shape[1])
    kept = torch.cat([(sign * pairs.values).topk(k, dim=1).indices for sign in (1, -1)], dim=1)
    signs = torch.tensor([1.0, -1.0], device=kept.device).repeat_interleave(k)
    values = pairs.values.gather(1, kept)
    values = torch.where(values * signs > 0, values, 0.0)  # fewer than k may have the sign
    return QuadraticForms(values, pairs.features.gather(1, kept[..., None].expand(-1, -1, pairs.features.shape[2])))


class TensorSVD(NamedTuple):
    """B[a] = sum_r outputs[r, a] values[r] forms[r], with orthonormal outputs and forms.

    outputs: (rank, out_features). values: (rank,). forms: (rank, in_features, in_features), symmetric.
    """

    outputs: Tensor
    values: Tensor
    forms: Tensor


@torch.no_grad()
def svd_tensor(layer: Bilinear) -> TensorSVD:
    """The most important output directions and quadratic forms of a layer, when no direction is given.

    A singular value decomposition of B flattened to (out_features, in_features^2).
    """
    tensor = interaction_tensor(layer)
    u, s, vh = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
    return TensorSVD(u.mT, s, vh.unflatten(1, tensor.shape[1:]))


@torch.no_grad()
def adversarial_mask(net: BilinearNet, source: int, target: int, reference: Tensor | None = None) -> Tensor:
    """The input of unit norm that most raises the target's logit over the source's, from the weights.

    m maximises m^T E^T (Q_target - Q_source) E m: the leading eigenvector of that form in the input. The form
    gives m and -m the same value; added to an input x they differ by 4 x^T (...) m, so a reference settles
    the sign.

    Args:
        net: one bilinear layer, no gate, no residual connection.
        source, target: classes.
        reference: an input, such as the mean of the source class, for which the sign is chosen; without it
            the sum of the mask is made positive.

    Returns:
        (inputs,)
    """
    _check_one_layer(net)
    embed = net.embed.weight
    form = interaction_matrix(_layer(net, 0), net.head.weight[target] - net.head.weight[source])
    form = embed.mT @ form @ embed
    mask = torch.linalg.eigh(form).eigenvectors[:, -1]
    side = mask.sum() if reference is None else reference.flatten() @ form @ mask
    return torch.where(side < 0, -mask, mask)


@torch.no_grad()
def similarity(net: BilinearNet, other: BilinearNet, k: int = 1) -> Tensor:
    """|cosine| between the k top positive features of two nets, matched within each class.

    Args:
        net, other: nets of one bilinear layer and the same inputs and classes.
        k: features of each class.

    Returns:
        (classes, k): for each feature of ``net``, the best match among the k of ``other``.
    """
    tops = []
    for each in (net, other):
        pairs = eig_features(each, 0)
        index = pairs.values.topk(k, dim=1).indices
        top = pairs.features.gather(1, index[..., None].expand(-1, -1, pairs.features.shape[2]))
        tops.append(nn.functional.normalize(top, dim=-1))
    return (tops[0] @ tops[1].mT).abs().amax(dim=-1)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _layer(net: BilinearNet, index: int) -> Bilinear:
    layer = net.layers[index]
    assert isinstance(layer, Bilinear)
    return layer


def _check_exact(layer: Bilinear) -> None:
    if layer.gate is not None:
        raise PomonaError(f"gate={layer.gate!r} makes the layer no quadratic form; analysis needs gate=None")
    if layer.both.bias is not None:
        raise PomonaError("bias=True makes the layer no pure quadratic form; analysis needs bias=False")


def _check_one_layer(net: BilinearNet) -> None:
    if len(net.layers) != 1 or net.residual:
        raise PomonaError(
            f"depth={len(net.layers)}, residual={net.residual} cannot be taken apart; use depth=1, residual=False"
        )
