"""The torch engine: a Hugging Face encoder from `config.json` and `model.safetensors`, on CPU or CUDA.

Only the torch engines import torch and transformers, so that an ONNX worker starts without them. They run classes that
transformers ships and never code that came with a checkpoint.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from fettle.errors import EngineError, FamilyError, UsageError, first_line
from fettle.manifest import Precision, Task, TaskKind, VariantManifest
from fettle.rows import Exits, Outputs, Rows
from workers.engine import EngineOptions, warm_up_rows

# What transformers raises for files that it cannot load.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


class Scorer(nn.Module):
    """A transformers model reduced to what its task answers: logits, or one vector a row.

    `forward` takes int64 [rows, length] arrays and returns float32 [rows, width], whatever the model's own dtype.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        output = self.model(**inputs)
        if self.task.kind is TaskKind.CLASSIFY:
            logits: Tensor = output.logits
            return logits.float()
        # Pooled in float32: a mean over a few hundred half-precision terms loses digits.
        vectors = pooled(output.last_hidden_state.float(), attention_mask, self.task.pooling or "mean")
        return nn.functional.normalize(vectors, dim=-1) if self.task.normalized else vectors


def pooled(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """[rows, length, width] and a 0/1 mask [rows, length] to [rows, width], as sentence-transformers pools."""
    if how == "cls":
        return hidden[:, 0]
    inside = mask.unsqueeze(-1).to(hidden.dtype)
    if how == "max":
        return (hidden - (1.0 - inside) * 1e9).amax(dim=1)
    return (hidden * inside).sum(dim=1) / inside.sum(dim=1).clamp(min=1e-9)


def read_pretrained(
    factory: Any, directory: Path, dtype: torch.dtype, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load `config.json` and safetensors of a local directory with one of transformers' Auto classes.

    Returns the model and transformers' loading report (`missing_keys` and so on). Raises what transformers raises.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    # What it would log is in the report, which the caller reads.
    transformers_logging.set_verbosity_error()
    try:
        model, report = factory.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **settings,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    return model, report


def build_scorer(directory: Path, task: Task, dtype: torch.dtype) -> tuple[Scorer, dict[str, Any]]:
    """An encoder of a local directory in eval mode, and transformers' loading report.

    The pooler of a bare encoder is dropped, since no pooling mode reads it. Raises what transformers raises.
    """
    factory = AutoModelForSequenceClassification if task.kind is TaskKind.CLASSIFY else AutoModel
    model, report = read_pretrained(factory, directory, dtype)
    if task.kind is TaskKind.EMBED and getattr(model, "pooler", None) is not None:
        model.pooler = None
    return Scorer(model, task).eval().requires_grad_(False), report


def torch_place(manifest: VariantManifest, options: EngineOptions) -> tuple[torch.device, torch.dtype]:
    """Where a variant runs and in which numbers; on CPU the threads are set, for the whole process.

    Raises:
        UsageError: CUDA was asked for and is not there, or the precision is none of torch's.
    """
    if manifest.precision not in DTYPES:
        raise UsageError(f"variant {manifest.id!r}: torch does not run precision {manifest.precision.value}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device is visible to torch; install a CUDA build of torch or set device to cpu")
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    return torch.device(options.device), DTYPES[manifest.precision]


class TorchEncoder:
    """One variant in torch. `run` pads a batch to its longest row."""

    def __init__(self, directory: Path, manifest: VariantManifest, options: EngineOptions) -> None:
        """Load the weights.

        Raises:
            UsageError: CUDA was asked for and is not there, or the precision is none of torch's.
            FamilyError: the files do not load as the model that they claim to be.
        """
        self._device, dtype = torch_place(manifest, options)
        self.manifest = manifest
        try:
            scorer, _ = build_scorer(directory, manifest.task, dtype)
        except LOADING_ERRORS as error:
            raise FamilyError(
                f"{directory}: transformers cannot load this variant ({first_line(error)}); run `fettle optimize` again"
            ) from error
        self._scorer: Scorer | None = scorer.to(self._device)

    def warm_up(self) -> None:
        for rows in warm_up_rows(self.manifest.tokenizer.max_length):
            self.run(rows)

    def run(self, rows: Rows, exits: Exits | None = None) -> Outputs:
        """float32 [rows, width].

        Raises:
            EngineError: torch failed on this batch, out of memory included.
        """
        del exits  # one stage only, so there is nothing to leave by
        if self._scorer is None:
            raise EngineError("the engine is closed")
        started = time.perf_counter()
        ids, mask, types = rows.padded(self.manifest.tokenizer.pad_id)
        arrays = [ids, mask, types] if self.manifest.tokenizer.segments else [ids, mask]
        try:
            with torch.inference_mode():
                values = self._scorer(*(torch.from_numpy(array).to(self._device) for array in arrays))
                array = values.cpu().numpy()
        except (RuntimeError, IndexError, ValueError) as error:
            raise EngineError(f"torch failed on a batch of {len(rows)} rows of up to {rows.longest} tokens") from error
        return Outputs(array, (time.perf_counter() - started) * 1e3)

    def close(self) -> None:
        self._scorer = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
