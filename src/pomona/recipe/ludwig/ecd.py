"""The encoder-combiner-decoder network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, unknown
from pomona.recipe.ludwig.decoders import Generator
from pomona.recipe.ludwig.reductions import reduce_steps


def ordered(dependencies: Mapping[str, Sequence[str]]) -> list[str]:
    """Outputs such that each comes after those that it depends on; otherwise as they stand.

    Raises:
        PomonaError: for an unknown name, or outputs that depend on each other in a circle.
    """
    for name, needed in dependencies.items():
        for other in needed:
            if other not in dependencies or other == name:
                raise unknown(f"dependencies of output {name!r}:", other, [n for n in dependencies if n != name])
    try:
        return list(TopologicalSorter(dependencies).static_order())
    except CycleError as error:
        raise PomonaError(f"outputs depend on each other in a circle: {' -> '.join(error.args[1])}") from error


class Output(nn.Module):
    """One output: fully connected layers on the combined inputs and its dependencies' hidden layers, then a decoder.

    Args:
        fc: layers from ``features`` of the combiner and the dependencies' hidden layers.
        decoder: from their result to the flat output.
        dependencies: names of outputs whose hidden layer is an input.
        reduce: how a sequence becomes a vector for a decoder of vectors.
        sequence: whether the decoder takes a sequence.
    """

    def __init__(
        self,
        fc: nn.Module | None = None,
        decoder: nn.Module | None = None,
        dependencies: Sequence[str] = (),
        reduce: str = "sum",
        sequence: bool = False,
    ) -> None:
        super().__init__()
        self.fc = nn.Identity() if fc is None else fc
        self.decoder = nn.Identity() if decoder is None else decoder
        self.dependencies, self.reduce, self.sequence = tuple(dependencies), reduce, sequence

    def hidden(self, combined: Tensor, needed: Sequence[Tensor]) -> Tensor:
        """The last hidden layer, (B, features) or, for a decoder of sequences, (B, tokens, features)."""
        parts = [combined, *needed]
        if self.sequence:
            steps = combined.shape[1]
            parts = [part if part.ndim == 3 else part.unsqueeze(1).expand(-1, steps, -1) for part in parts]
        else:
            parts = [reduce_steps(part, self.reduce) if part.ndim == 3 else part for part in parts]
        return self.fc(torch.cat(parts, -1))

    def forward(self, hidden: Tensor, target: Tensor | None = None) -> Tensor:
        """Flat outputs (B, size); a generator in training is led by ``target``, where there is one."""
        if isinstance(self.decoder, Generator):
            return self.decoder(hidden, target if self.training else None)
        return self.decoder(hidden)


class ECD(nn.Module):
    """Encoders, one an input; a combiner; outputs, one each, in an order in which dependencies come first.

        e_i = encoder_i(x_i),  c = combiner(e_1, ..., e_k),
        h_j = FC_j([c, h_l for l in dependencies_j]),  y_j = decoder_j(h_j)

    Args:
        encoders: input name -> module; the same module under several names is tied.
        combiner: {name: (B, features) or (B, T, features)} -> (B, features) or (B, T, features).
        outputs: output name -> :class:`Output`.

    Shapes:
        {input: (B, width)} -> {output: (B, size)}

    Raises:
        PomonaError: for dependencies that are unknown or run in a circle.

    Source: Ludwig: a type-based declarative deep learning toolbox, arXiv 1909.07930.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], combiner: nn.Module, outputs: Mapping[str, Output]) -> None:
        super().__init__()
        unique = list({id(module): module for module in encoders.values()}.values())
        self.encoders = nn.ModuleList(unique)  # lists, since a column's name may be no attribute's
        self.combiner = combiner
        self.outputs = nn.ModuleList(outputs.values())
        place = {id(module): position for position, module in enumerate(unique)}
        self.encoder_of = {name: place[id(module)] for name, module in encoders.items()}
        self.output_of = {name: position for position, name in enumerate(outputs)}
        self.order = ordered({name: output.dependencies for name, output in outputs.items()})

    def forward(self, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """See the class; ``targets`` lead generators while training."""
        encoded = {name: self.encoders[place](inputs[name]) for name, place in self.encoder_of.items()}
        combined = self.combiner(encoded)
        hidden: dict[str, Tensor] = {}
        made: dict[str, Tensor] = {}
        for name in self.order:
            output = self.outputs[self.output_of[name]]
            assert isinstance(output, Output)
            hidden[name] = output.hidden(combined, [hidden[other] for other in output.dependencies])
            made[name] = output(hidden[name], (targets or {}).get(name))
        return {name: made[name] for name in self.output_of}


__all__ = ["ECD", "Output", "ordered"]
