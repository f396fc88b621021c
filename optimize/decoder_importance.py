"""How much the layers, neurons and groups of heads of a language model matter on the user's data.

Reads a model and batches; changes nothing, and needs no gradient. Layers by the influence of ShortGPT (Men et al.
2024), neurons and heads by what their activations add to the residual stream, in the spirit of Minitron (Muralidharan
et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fettle.errors import PassError
from optimize.anatomy import Batch
from optimize.decoder_anatomy import DecoderAnatomy, dissect_decoder
from optimize.importance import cosine_sums, hooks


@dataclass(frozen=True)
class DecoderImportance:
    """Of each layer: `influence`, and float64 [neurons] and [groups]: root mean square of what each one adds."""

    influence: list[float]
    neurons: list[Tensor]
    groups: list[Tensor]


@torch.no_grad()
def decoder_importance(model: PreTrainedModel, batches: Iterable[Batch]) -> DecoderImportance:
    """Measure all three in one pass over the data, over real tokens alone.

    A unit's activations a (one of a neuron, several of a group's query heads) add W a to the residual stream, with W
    its columns of the projection behind them. So its importance is sqrt(mean |W a|^2) = sqrt(trace(W' W C)), with C
    the second moment of its activations. Within a layer these compare; between layers they need not.

    Args:
        batches: int64 [rows, length] ids and mask, right-padded.

    Raises:
        PassError: no text, or an architecture that is not known.
    """
    anatomy = dissect_decoder(model)
    width = anatomy.queries * anatomy.head_size
    cosines = torch.zeros(len(anatomy.blocks), dtype=torch.float64)
    heads = [_Moments(block.output, anatomy.groups, width) for block in anatomy.blocks]
    neurons = [_Moments(block.down, anatomy.neurons, 1) for block in anatomy.blocks]
    tokens = 0
    for batch in batches:
        inside = batch[1].bool()
        handles = [each.module.register_forward_pre_hook(each.watch(inside)) for each in (*heads, *neurons)]
        with hooks(handles):
            # Causal: no token sees the padding after it, so the model needs no mask.
            cosines += torch.stack(cosine_sums(model, [block.module for block in anatomy.blocks], batch[:1], inside))
        tokens += int(inside.sum())
    if not tokens:
        raise PassError("no text to measure the layers on")
    return DecoderImportance(
        influence=(1.0 - cosines / tokens).tolist(),
        neurons=[each.added(_columns(anatomy, each.module), tokens) for each in neurons],
        groups=[each.added(_columns(anatomy, each.module), tokens) for each in heads],
    )


class _Moments:
    """Second moments of what goes into a projection, of each unit by itself: float64 [units, size, size]."""

    def __init__(self, module: nn.Module, units: int, size: int) -> None:
        self.module = module
        self._sums = torch.zeros(units, size, size, dtype=torch.float64)

    def watch(self, inside: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            units, size = self._sums.shape[:2]
            seen = inputs[0][inside].double().view(-1, units, size)
            if size == 1:
                self._sums += seen.square().sum(dim=0).view(units, 1, 1).cpu()
            else:
                self._sums += torch.einsum("nui,nuj->uij", seen, seen).cpu()

        return record

    def added(self, columns: Tensor, tokens: int) -> Tensor:
        """float64 [units], from the projection's weight [outputs, inputs]."""
        units, size = self._sums.shape[:2]
        own = columns.double().cpu().view(-1, units, size)
        gram = own.square().sum(dim=0).view(units, 1, 1) if size == 1 else torch.einsum("oui,ouj->uij", own, own)
        return ((gram * self._sums).sum(dim=(1, 2)) / tokens).clamp(min=0).sqrt()


def _columns(anatomy: DecoderAnatomy, module: nn.Module) -> Tensor:
    """The weight as [outputs, inputs]."""
    weight = cast(Tensor, module.weight).detach()
    return weight.T if anatomy.plan.transposed else weight
