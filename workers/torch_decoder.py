"""The torch text generator: any causal language model of transformers over slots, on CPU or CUDA.

It runs the model's own forward pass on a cache of slots (`workers/slot_cache.py`), so that it is the reference, and the
engine of what has no ONNX graph. Sampling, stopping, scheduling, prefix reuse and speculation are
`workers/generator.py`'s, as for every runner. On CUDA decode steps are replayed as graphs (`workers/decode_graphs.py`).

transformers' own continuous batching (`ContinuousBatchingManager`, 5.24) is not used, since it cannot keep the contract
of `workers/generator.py`. It draws on the device from one stream of random numbers for all requests, so that a draw
depends on who shares the batch. Whether tokens are drawn or greedy is one setting for all. A request may set
temperature, top-k and top-p; what looks at a request's text (penalties, grammars) is dropped, or sees its last token
only. It tells the drawn token's log-probability only, after temperature. Its loop is a thread of its own, which hears
of an end that we see in a text a step late where steps overlap. To take the drawing out of it is to replace private
parts, and to lose the graphs and the overlap that it is fast by, since both include the drawing.

A row's logits do not depend on the texts beside it but for rounding: torch's products and sums are made in another
order for another number of rows. Of random weights in a shape of 135M parameters on CPU, logits with a spread of 1.2
moved by 3e-5 in float32 and by 0.17 in bfloat16, at most.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fettle.errors import EngineError, FamilyError, first_line
from fettle.manifest import DecoderSpec, VariantManifest
from workers.decode_graphs import CudaRecorder, DecodeGraphs, Recorder, RecordingError
from workers.decoder import Floats, Ids
from workers.engine import EngineOptions
from workers.slot_cache import ATTENTION, Call, SlotCache, register
from workers.torch_encoder import LOADING_ERRORS, read_pretrained, torch_place

# What a pass may fail with; the last two where a model's own code does not expect what `workers/slot_cache.py` gives.
TORCH_ERRORS = (RuntimeError, IndexError, ValueError, TypeError, AttributeError)
WARM_UP_TOKENS = 32
WARM_UP_SLOTS = 8
# Tokens of the check at opening, and how far logits may be off there, as a share of the largest.
PROBE = 5
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
# Rotary embeddings whose angles depend on the longest text of a pass, where that is longer than this.
BOUNDED_ROTARY = {"longrope": "original_max_position_embeddings"}
# transformers' word for a cache among a model's arguments, the newer one first.
CACHE_NAMES = ("cache", "past_key_values")
NOTHING = np.empty(0, np.int32)


class TorchDecoder:
    """One variant in torch, with room for nothing until `allocate`."""

    def __init__(
        self,
        directory: Path,
        manifest: VariantManifest,
        options: EngineOptions,
        recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        """Load the weights. `recorder` makes what records decode steps; by default CUDA graphs, on CUDA only.

        Raises:
            UsageError: CUDA was asked for and is not there, or the precision is none of torch's.
            FamilyError: the manifest describes no text generator, the files do not load as the model that they claim to
                be, or its attention does not work over slots.
        """
        if manifest.decoder is None:
            raise FamilyError(f"variant {manifest.id!r} has no `decoder` in its manifest, so it generates no text")
        self.manifest = manifest
        self._spec = manifest.decoder
        self._device, dtype = torch_place(manifest, options)
        model = _read(directory, self._spec, dtype).to(self._device)
        self._model: Any = model
        arguments = inspect.signature(model.forward).parameters
        self._cache_name = next((name for name in CACHE_NAMES if name in arguments), CACHE_NAMES[0])
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._cache = SlotCache(self._spec, dtype, self._device)
        self._slots = 0
        self._recorder: Callable[[], Recorder] | None = None
        self._graphs: DecodeGraphs | None = None
        _check_attention(self, model, self._spec, TOLERANCES[dtype])
        if recorder is None and self._device.type == "cuda" and _never_waits(model):
            recorder = CudaRecorder
        self._recorder = recorder

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def context(self) -> int:
        return self._cache.context

    @property
    def bytes_per_token(self) -> int:
        return self._cache.bytes_per_token

    def warm_up(self) -> None:
        """Leaves the room as it was; what lies in its first slots is overwritten."""
        slots, context = self.slots, self.context
        if not slots:
            self.allocate(WARM_UP_SLOTS, min(2 * WARM_UP_TOKENS, self._spec.context))
        tokens = min(WARM_UP_TOKENS, self.context - 1)
        self.feed(0, np.zeros(tokens, np.int32), 0, 1)
        for rows in (1, min(WARM_UP_SLOTS, self.slots)):
            self.decode(np.zeros(rows, np.int32), np.full(rows, tokens, np.int32))
        if not slots:
            self.allocate(slots, context)

    def allocate(self, slots: int, context: int) -> None:
        if context > self._spec.context:
            raise EngineError(f"a slot of {context} tokens was asked for; this model's context is {self._spec.context}")
        self._graphs = None
        # Rows that fill up a recorded step write into one slot more.
        spare = int(self._recorder is not None and slots > 0)
        try:
            self._cache.resize(slots + spare, context)
            if self._recorder is not None and slots:
                width = self.manifest.task.width
                self._graphs = DecodeGraphs(self._forward, self._recorder(), slots, context, width, self._device)
        except TORCH_ERRORS as error:
            raise EngineError(f"torch has no memory for {slots} slots of {context} tokens") from error
        self._slots = slots

    def feed(self, slot: int, ids: Ids, start: int, logits: int) -> Floats:
        tokens = len(ids)
        self._check(slot + 1, start + tokens, ids)
        places = self._tensor(np.arange(start, start + tokens))[None]
        call = Call(slot, 1, start + tokens, self._tensor(np.array([slot])), places)
        wanted = self._tensor(np.arange(tokens - logits, tokens))
        return self._run(lambda: self._forward(self._tensor(ids)[None], call, wanted), call)

    def decode(self, ids: Ids, lengths: Ids) -> Floats:
        rows, longest = len(ids), int(lengths.max(initial=0)) + 1
        self._check(rows, longest, ids)
        call = Call(0, rows, longest, self._tensor(np.arange(rows)), self._tensor(lengths)[:, None])
        if self._graphs is not None:
            graphs = self._graphs
            try:
                return self._run(lambda: graphs.run(ids, lengths), call)
            except RecordingError as error:
                warnings.warn(f"decode steps run unrecorded, and take longer: {first_line(error)}", stacklevel=2)
                self._graphs = self._recorder = None
        return self._run(lambda: self._forward(self._tensor(ids)[:, None], call), call)

    def copy(self, source: int, target: int, length: int) -> None:
        self._check(max(source, target) + 1, length)
        self._cache.copy(source, target, length)

    def close(self) -> None:
        self._graphs = self._model = None
        self._cache.resize(0, 0)
        self._slots = 0
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _check(self, slots: int, tokens: int, ids: Ids = NOTHING) -> None:
        """On CUDA an index out of bounds would cost the process."""
        if slots > self.slots or tokens > self.context:
            raise EngineError(
                f"{slots} slots of {tokens} tokens are needed, and {self.slots} of {self.context} are allocated"
            )
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocabulary:
            raise EngineError(f"tokens are 0 to {self._vocabulary - 1}, and {ids.min()} to {ids.max()} were given")

    def _tensor(self, array: NDArray[np.integer[Any]]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._device)

    def _forward(self, ids: Tensor, call: Call, wanted: Tensor | int = 0) -> tuple[Tensor, Tensor]:
        """float32 [wanted, vocabulary] of int64 [rows, tokens]; and which rows are sound, bool [rows]."""
        self._cache.aim(call)
        output = self._model(
            input_ids=ids,
            position_ids=call.positions,
            use_cache=True,
            logits_to_keep=wanted,
            **{self._cache_name: self._cache},
        )
        return output.logits.flatten(0, 1).float(), self._cache.sound

    def _run(self, step: Callable[[], tuple[Tensor, Tensor]], call: Call) -> Floats:
        if self._model is None:
            raise EngineError("the engine is closed")
        try:
            with torch.inference_mode():
                logits, sound = step()
                array = _on_host(logits)
                if not bool(sound.all()):
                    self._cache.wipe(call, ~sound)
        except TORCH_ERRORS as error:
            rows, tokens = call.positions.shape
            raise EngineError(f"torch failed on {rows} rows of {tokens} new tokens ({first_line(error)})") from error
        return array


def _read(directory: Path, spec: DecoderSpec, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its own attention."""
    try:
        model, report = read_pretrained(AutoModelForCausalLM, directory, dtype, attn_implementation="eager")
    except LOADING_ERRORS as error:
        raise FamilyError(
            f"{directory}: transformers cannot load this variant ({first_line(error)}); run `fettle optimize` again"
        ) from error
    if report["missing_keys"]:
        raise FamilyError(f"{directory}: weights are missing: {', '.join(sorted(report['missing_keys'])[:3])}")
    longest = min(exact_lengths(model.config), default=spec.context)
    if spec.context > longest:
        raise FamilyError(
            f"{directory}: the manifest has a context of {spec.context} tokens, and beyond {longest} a text's tokens "
            "would depend on the texts beside it; run `fettle optimize` again"
        )
    return model.eval().requires_grad_(False)


def exact_lengths(config: PreTrainedConfig) -> list[int]:
    """Up to which lengths a position means the same whatever else is in a pass."""
    rotary = getattr(config, "rope_parameters", None) or {}
    settings = list(rotary.values()) if all(isinstance(each, dict) for each in rotary.values()) else [rotary]
    bounds = [each[BOUNDED_ROTARY[each["rope_type"]]] for each in settings if each.get("rope_type") in BOUNDED_ROTARY]
    # What has no such setting has no positions that end, or is refused for other reasons.
    return [each for each in (getattr(config, "max_position_embeddings", None), *bounds) if each is not None]


def _never_waits(model: PreTrainedModel) -> bool:
    """Whether transformers says that a pass can be recorded as a whole."""
    return bool(getattr(model, "_can_compile_fullgraph", False))


def _check_attention(runner: TorchDecoder, model: PreTrainedModel, spec: DecoderSpec, tolerance: float) -> None:
    """Let the model read slots from now on, once it has given the same logits over them as by itself.

    Raises:
        FamilyError: it does not: an architecture whose past is not keys and values, or which reads it in its own way.
    """
    size = min(PROBE, spec.context)
    ids = np.arange(size, dtype=np.int32)
    try:
        with torch.inference_mode():
            plain = model(torch.from_numpy(ids)[None].long().to(model.device), use_cache=False).logits[0].float()
        expected = plain.cpu().numpy()
        register()
        model.set_attn_implementation(ATTENTION)
        runner.allocate(2, size)
        first = runner.feed(0, ids[:-1], 0, size - 1)
        runner.feed(1, ids[:1], 0, 0)
        last, second = runner.decode(ids[[-1, 1]], np.array([size - 1, 1], np.int32))
        runner.allocate(0, 0)
    except Exception as error:  # models are many, and so are their ways to fail
        raise FamilyError(f"{type(model).__name__} does not run over slots ({first_line(error)})") from error
    off = np.abs(np.stack([*first, last, second]) - expected[[*range(size), 1]]).max() / np.abs(expected).max()
    if not off <= tolerance:
        raise FamilyError(
            f"{type(model).__name__} gives other logits over slots than by itself, by {off:.1%} of the largest"
        )


def _on_host(logits: Tensor) -> Floats:
    """Memory of its own, on a device through memory that it writes to directly."""
    if logits.device.type == "cpu":
        return logits.numpy()
    held = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
    held.copy_(logits, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return held.numpy()
