"""How much the layers, heads and neurons of an encoder matter on the user's data.

Reads a scorer and batches; changes nothing. Layers by the influence of ShortGPT (Men et al. 2024), heads and neurons
by the first-order Taylor expansion of Michel et al. (2019).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from fettle.errors import PassError
from fettle.manifest import Head, Task
from optimize.anatomy import Anatomy, Batch, dissect
from workers.torch_encoder import Scorer

Loss = Callable[[Tensor], Tensor]


def layer_influence(scorer: Scorer, batches: Iterable[Batch]) -> list[float]:
    """`1 - mean cos(x_l, x_l+1)` for each layer: 0 for one that changes no direction. Mean over real tokens.

    Args:
        batches: int64 [rows, length] ids, mask and, where the model reads them, segments; padded.

    Raises:
        PassError: no batch, or an architecture that is not known.
    """
    layers = dissect(scorer).layers
    sums, tokens = torch.zeros(len(layers), dtype=torch.float64), 0
    for batch in batches:
        inside = batch[1].bool()
        sums += torch.stack(cosine_sums(scorer, [layer.module for layer in layers], batch, inside))
        tokens += int(inside.sum())
    if not tokens:
        raise PassError("no text to measure the layers on")
    return (1.0 - sums / tokens).tolist()


def head_and_neuron_importance(
    scorer: Scorer, batches: Iterable[Batch], loss: Loss
) -> tuple[list[Tensor], list[Tensor]]:
    """The expected change of the loss without a head or a neuron: `sum over rows |d loss / d mask|`.

    The mask of ones multiplies a head's or a neuron's activation, so its derivative is the sum over the row's tokens
    of gradient times activation. Each row has its own mask, and rows do not meet inside an encoder, so one backward
    pass gives every row's derivative by itself.

    Args:
        batches: as for `layer_influence`.
        loss: float32 [rows, width] to a scalar, a sum over the rows; of a mean, small batches would count for more.
            It must not have its minimum at the scorer's own answers, where all derivatives are 0 (a divergence from
            itself has): `own_answer_loss` has not.

    Returns:
        float64 [heads] and float64 [neurons] for each layer, per row of data. Layers that share their weights share
        their importance, summed over all uses.
    """
    anatomy = dissect(scorer)
    heads = {id(layer.output): torch.zeros(layer.heads, dtype=torch.float64) for layer in anatomy.layers}
    neurons = {id(layer.down): torch.zeros(layer.neurons, dtype=torch.float64) for layer in anatomy.layers}
    rows = 0
    for batch in batches:
        count = len(batch[0])
        with torch.enable_grad(), _masks(anatomy, count, batch[0].device) as masks:
            gradients = torch.autograd.grad(loss(scorer(*batch)), list(masks.values()))
        for key, gradient in zip(masks, gradients, strict=True):
            totals = heads if key in heads else neurons
            totals[key] += gradient.double().abs().sum(dim=(0, 1)).cpu()
        rows += count
    if not rows:
        raise PassError("no text to measure heads and neurons on")
    return (
        [heads[id(layer.output)] / rows for layer in anatomy.layers],
        [neurons[id(layer.down)] / rows for layer in anatomy.layers],
    )


def own_answer_loss(task: Task, seed: int = 0) -> Loss:
    """A loss for `head_and_neuron_importance` that needs no labels.

    Classes: cross-entropy to the model's own answers, so that rows near a boundary weigh most. Vectors and numbers
    have no boundary: a random direction for each row, whose expected squared derivative is that of the whole vector
    (Hutchinson 1990).
    """
    if task.head is Head.SINGLE_LABEL and task.width > 1:
        return _own_class
    if task.head is Head.MULTI_LABEL:
        return _own_labels
    generator = torch.Generator().manual_seed(seed)

    def along_random_directions(values: Tensor) -> Tensor:
        signs = torch.randint(0, 2, values.shape, generator=generator).to(values) * 2 - 1
        return (values * signs).sum()

    return along_random_directions


def _own_class(values: Tensor) -> Tensor:
    return functional.cross_entropy(values, values.detach().argmax(dim=1), reduction="sum")


def _own_labels(values: Tensor) -> Tensor:
    decided = (values.detach() > 0).to(values)
    return functional.binary_cross_entropy_with_logits(values, decided, reduction="sum")


def cosine_sums(model: nn.Module, layers: Iterable[nn.Module], batch: Batch, inside: Tensor) -> list[Tensor]:
    """The sum of `cos(input, output)` over the tokens `inside`, for each layer's run, in the order of the forward pass.

    One float64 for each run, since a shared module runs several times.
    """
    sums: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        cosines = functional.cosine_similarity(inputs[0].double(), after.double(), dim=-1)
        sums.append(cosines[inside].sum().cpu())

    modules = {id(layer): layer for layer in layers}
    handles = [module.register_forward_hook(record) for module in modules.values()]
    with hooks(handles), torch.no_grad():
        model(*batch)
    return sums


@contextlib.contextmanager
def hooks(handles: list[RemovableHandle]) -> Iterator[None]:
    """Take these hooks away at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _masks(anatomy: Anatomy, rows: int, device: torch.device) -> Iterator[dict[int, Tensor]]:
    """Masks of ones, [rows, 1, heads] or [rows, 1, neurons], by the id of the linear layer behind them."""
    masks: dict[int, Tensor] = {}
    handles: list[RemovableHandle] = []
    for layer in anatomy.distinct():
        for module, units, size in ((layer.output, layer.heads, layer.head_size), (layer.down, layer.neurons, 1)):
            mask = torch.ones(rows, 1, units, device=device, requires_grad=True)
            masks[id(module)] = mask
            handles.append(module.register_forward_pre_hook(_multiply_by(mask, size)))
    with hooks(handles):
        yield masks


def _multiply_by(mask: Tensor, size: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    def multiply(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0] * mask.repeat_interleave(size, dim=-1).to(inputs[0].dtype),)

    return multiply
