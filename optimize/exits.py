"""Exit heads: small classifiers after chosen layers of a frozen encoder, taught to give the last layer's answer.

The backbone never changes, so that its last answer stays the reference's own. One pass over the rows caches what every
layer hands to its head; the heads then train on the cache alone, in seconds.

A head reads what costs little. Where the reference answers from the first token, that is the first token of its layer's
output and the mean over what enters the layer: the layer itself is computed for one token only (`optimize.first_token`)
and what enters it is there in full anyway. Otherwise it is the mean over its layer's output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fettle.answers import Floats, disagreements
from fettle.errors import PassError
from fettle.manifest import Head, Task, TokenizerSpec
from fettle.rows import Row
from optimize.batches import by_length, tensors
from optimize.losses import soft_multi_label, soft_single_label
from workers.torch_encoder import Scorer, pooled

HEADS_FILE = "exits.safetensors"
LAYERS_FILE = "exits.json"
INNER = 256
# Rows of one pass through the backbone while its states are cached.
CACHED_ROWS = 32
# Features that vary less than this are not blown up further: in the lower layers that is what 8 bits do to the first
# token's state (deviation 0.002 in layer 3 of MiniLM, where int8 made the head's disagreement 65 % instead of 18 %).
SMALLEST_DEVIATION = 0.1
# Deviation of the noise that heads are trained with, in units of a state's own: what 8-bit arithmetic does (measured
# on MiniLM: 0.01 to 0.02). Without it heads read differences that int8 wipes out: 60 % other answers in layer 1.
NOISE = 0.02

Report = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How heads are trained: AdamW, until the loss on the tuning rows has not fallen for `patience` epochs."""

    epochs: int = 30
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    patience: int = 3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Lesson:
    """Rows and the values float32 [rows, width] that the teacher gives them."""

    rows: Sequence[Row]
    values: Floats


class ExitHead(nn.Module):
    """What a head reads, [rows, features], to logits float32 [rows, width]."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.inner = nn.Linear(features, INNER)
        self.outer = nn.Linear(INNER, width)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.outer(torch.tanh(self.inner(self.norm(features.float()))))
        return logits


@dataclass(frozen=True, slots=True)
class Heads:
    """Trained heads by layer (1-based, ascending), and whether they read the first token, as the module says.

    `disagreement` by layer: share of the tuning rows that the head answers otherwise than the teacher.
    """

    by_layer: dict[int, ExitHead]
    first_token: bool
    disagreement: dict[int, float]

    def only(self, layers: Sequence[int]) -> Heads:
        """The heads after these layers.

        Raises:
            PassError: there is none after one of them.
        """
        missing = sorted(set(layers) - set(self.by_layer))
        if missing:
            raise PassError(f"no exit head was trained after layer {missing[0]}; there are {sorted(self.by_layer)}")
        kept = sorted(set(layers))
        return Heads(
            {layer: self.by_layer[layer] for layer in kept},
            self.first_token,
            {layer: self.disagreement[layer] for layer in kept},
        )


class MultiExit(nn.Module):
    """A classifier that answers after chosen layers as well as at its end.

    `forward` takes int64 [rows, length] arrays and returns float32 [rows, width] for each exit, then for the end.
    """

    def __init__(self, scorer: Scorer, heads: Heads) -> None:
        super().__init__()
        self.scorer = scorer
        self.layers = sorted(heads.by_layer)
        self.heads = nn.ModuleList(heads.by_layer[layer] for layer in self.layers)
        self.first_token = heads.first_token

    def _trained(self) -> bool:
        return any(weight.requires_grad for weight in self.heads.parameters())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> list[Tensor]:
        return self.answers_and_states(input_ids, attention_mask, token_type_ids)[0]

    def answers_and_states(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The answers, and the hidden states [rows, length, hidden]: the embeddings', then every layer's."""
        logits, states = _with_states(self.scorer, input_ids, attention_mask, token_type_ids)
        read = [features(states, layer, attention_mask, self.first_token) for layer in self.layers]
        if torch.is_grad_enabled() and self._trained():
            read = [noised(part) for part in read]
        exits = [head(part) for head, part in zip(self.heads, read, strict=True)]
        return [*exits, logits], states


def features(states: Sequence[Tensor], layer: int, mask: Tensor, first_token: bool) -> Tensor:
    """What the head after `layer` reads: float32 [rows, 2 hidden] with the first token, else [rows, hidden].

    Args:
        states: [rows, length, hidden] of the embeddings and of every layer; `mask` is 0/1 [rows, length].
    """
    if not first_token:
        return pooled(states[layer].float(), mask, "mean")
    entering = pooled(states[layer - 1].float(), mask, "mean")
    return torch.cat([states[layer][:, 0].float(), entering], dim=-1)


def noised(states: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Features [rows, features] as quantized arithmetic might have left them."""
    noise = torch.randn(states.shape, generator=generator, dtype=states.dtype, device=states.device)
    return states + NOISE * states.std(dim=-1, keepdim=True) * noise


def layer_count(scorer: Scorer) -> int:
    """How many layers the encoder runs, shared ones counted each time."""
    ids = torch.zeros((1, 2), dtype=torch.int64, device=_device(scorer))
    with torch.no_grad():
        return len(_with_states(scorer, ids, torch.ones_like(ids), None)[1]) - 1


def reads_first_token(scorer: Scorer, batch: Sequence[Tensor]) -> bool:
    """Whether the answer reads the last hidden state of the first token alone, by the gradient of the logits.

    Args:
        batch: input_ids, attention_mask and, where the model reads them, token_type_ids; rows of several tokens.
    """
    embeddings = cast(Any, scorer.model).get_input_embeddings()
    # The weights are frozen, so a gradient has to start at the embeddings.
    hook = embeddings.register_forward_hook(lambda _module, _inputs, output: output.detach().requires_grad_())
    try:
        with torch.enable_grad():
            logits, states = _with_states(scorer, *batch)
            (slope,) = torch.autograd.grad(logits.square().sum(), states[-1], allow_unused=True)
    finally:
        hook.remove()
    return slope is not None and not slope[:, 1:].any().item()


def train_frozen_heads(
    scorer: Scorer,
    layers: Sequence[int],
    train: Lesson,
    tuning: Lesson,
    spec: TokenizerSpec,
    settings: HeadSettings,
    report: Report,
) -> Heads:
    """Train a head after each of `layers` (1-based) to give the teacher's answer. The same seed gives the same heads.

    Raises:
        PassError: the model has no such layer before its last, or its answers have no confidence to exit on.
    """
    task, total = scorer.task, layer_count(scorer)
    if task.head not in (Head.SINGLE_LABEL, Head.MULTI_LABEL):
        raise PassError(f"answers of kind {task.head or task.kind} have no confidence, so nothing can exit early")
    if not layers or any(not 1 <= layer < total for layer in layers):
        raise PassError(f"exits after layers {list(layers)} of a model of {total}; give layers from 1 to {total - 1}")
    layers = sorted(set(layers))
    first = reads_first_token(scorer, tensors(train.rows[:4], spec, _device(scorer)))
    rows = [*train.rows, *tuning.rows]
    states = _cached(scorer, rows, layers, spec, first, lambda done: report(0.8 * done))
    learning = _Learning(task, settings, states[:, : len(train.rows)], torch.from_numpy(train.values))
    examined = states[:, len(train.rows) :]
    heads = learning.run(examined, torch.from_numpy(tuning.values), lambda done: report(0.8 + 0.2 * done))
    with torch.no_grad():
        answers = [head(part).numpy() for head, part in zip(heads, examined, strict=True)]
    wrong = [float(disagreements(values, tuning.values, task).mean()) for values in answers]
    return Heads(dict(zip(layers, heads, strict=True)), first, dict(zip(layers, wrong, strict=True)))


def save_heads(heads: Heads, directory: Path) -> None:
    """Write `exits.safetensors` and `exits.json`."""
    tensors = {
        f"{layer}.{name}": tensor.contiguous()
        for layer, head in heads.by_layer.items()
        for name, tensor in head.state_dict().items()
    }
    save_file(tensors, directory / HEADS_FILE)
    content = {"first_token": heads.first_token, "disagreement": heads.disagreement}
    (directory / LAYERS_FILE).write_text(json.dumps(content), encoding="utf-8")


def load_heads(directory: Path) -> Heads:
    """Read what `save_heads` wrote.

    Raises:
        PassError: the files are missing or are not what they should be.
    """
    try:
        content = json.loads((directory / LAYERS_FILE).read_text(encoding="utf-8"))
        tensors = load_file(directory / HEADS_FILE)
        disagreement = {int(layer): float(share) for layer, share in content["disagreement"].items()}
        heads = {layer: _head_of(tensors, layer) for layer in sorted(disagreement)}
        return Heads(heads, bool(content["first_token"]), disagreement)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise PassError(f"{directory}: the exit heads cannot be read ({error}); train them again") from error


def _head_of(tensors: Mapping[str, Tensor], layer: int) -> ExitHead:
    own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}
    head = ExitHead(own["norm.weight"].shape[0], own["outer.bias"].shape[0])
    head.load_state_dict(own)
    return head.eval().requires_grad_(False)


class _Learning:
    """Training of one head for each layer of `states` [layers, rows, features], side by side."""

    def __init__(self, task: Task, settings: HeadSettings, states: Tensor, targets: Tensor) -> None:
        self._task, self._settings = task, settings
        self._states, self._targets = states, targets
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self._heads = [ExitHead(states.shape[2], task.width) for _ in range(states.shape[0])]
        for head, state in self._pairs(states):
            _standardize(head, state)
        parameters = [weight for head in self._heads for weight in head.parameters()]
        self._optimizer = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=True
        )
        self._order = torch.Generator().manual_seed(settings.seed)

    def run(self, examined: Tensor, targets: Tensor, report: Report) -> list[ExitHead]:
        """Each head as it was at its own best epoch on the tuning states `examined` [layers, rows, features]."""
        best = [float("inf")] * len(self._heads)
        kept: list[dict[str, Tensor]] = [{} for _ in self._heads]
        idle = 0
        for epoch in range(self._settings.epochs):
            self._epoch()
            losses = self._losses(examined, targets)
            better = [index for index, loss in enumerate(losses) if not kept[index] or loss < best[index]]
            for index in better:
                best[index] = losses[index]
                kept[index] = {name: value.clone() for name, value in self._heads[index].state_dict().items()}
            idle = 0 if better else idle + 1
            report((epoch + 1) / self._settings.epochs)
            if idle == self._settings.patience:
                break
        report(1.0)
        for head, state in zip(self._heads, kept, strict=True):
            head.load_state_dict(state)
            head.eval().requires_grad_(False)
        return self._heads

    def _epoch(self) -> None:
        order = torch.randperm(self._states.shape[1], generator=self._order)
        for chosen in torch.split(order, self._settings.batch):
            targets = self._targets[chosen]
            # The heads share no weight, so the sum's gradient is each one's own.
            noisy = ((head, noised(state[chosen], self._order)) for head, state in self._pairs(self._states))
            parts = (_loss(head(state), targets, self._task) for head, state in noisy)
            total = torch.stack(list(parts)).sum()
            self._optimizer.zero_grad()
            torch.autograd.backward(total)
            self._optimizer.step()

    def _losses(self, states: Tensor, targets: Tensor) -> list[float]:
        with torch.no_grad():
            return [float(_loss(head(state), targets, self._task)) for head, state in self._pairs(states)]

    def _pairs(self, states: Tensor) -> list[tuple[ExitHead, Tensor]]:
        return list(zip(self._heads, states, strict=True))


def _standardize(head: ExitHead, states: Tensor) -> None:
    """Start the norm so that every feature has mean 0 and deviation 1 over the rows.

    Much of a state is the same for all texts in the lower layers; a head that starts at the identity needs several
    times as many epochs there, and ends worse.
    """
    normed = nn.functional.layer_norm(states, states.shape[-1:])
    deviation = normed.std(dim=0, correction=0).clamp(min=SMALLEST_DEVIATION)
    with torch.no_grad():
        head.norm.weight.copy_(1 / deviation)
        head.norm.bias.copy_(-normed.mean(dim=0) / deviation)


def _loss(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    if task.head is Head.MULTI_LABEL:
        return soft_multi_label(logits, targets, 1.0)
    return soft_single_label(logits, targets, 1.0)


def _cached(
    scorer: Scorer, rows: Sequence[Row], layers: Sequence[int], spec: TokenizerSpec, first: bool, report: Report
) -> Tensor:
    """What each layer's head would read: float32 [layers, rows, features], from one pass in bfloat16."""
    states: Tensor | None = None
    done = 0
    for chosen in by_length([len(row) for row in rows], CACHED_ROWS):
        batch = tensors([rows[index] for index in chosen], spec, _device(scorer))
        with torch.no_grad(), torch.autocast(batch[0].device.type, torch.bfloat16):
            every = _with_states(scorer, *batch)[1]
            part = torch.stack([features(every, layer, batch[1], first) for layer in layers]).float().cpu()
        if states is None:
            states = torch.empty((len(layers), len(rows), part.shape[2]))
        states[:, torch.from_numpy(chosen)] = part
        done += len(chosen)
        report(done / len(rows))
    if states is None:
        raise PassError("there are no rows to train exit heads on")
    return states


def _with_states(scorer: Scorer, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    inputs = {"input_ids": ids, "attention_mask": mask}
    if types is not None:
        inputs["token_type_ids"] = types
    output = scorer.model(**inputs, output_hidden_states=True)
    return output.logits.float(), list(output.hidden_states)


def _device(scorer: Scorer) -> torch.device:
    return next(scorer.parameters()).device
