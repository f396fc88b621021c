"""A reference as files that the torch engine loads: `config.json` and `model.safetensors`, never pickle."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import torch
from pydantic import JsonValue
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from optimize.load import Reference


def save_checkpoint(reference: Reference, directory: Path, dtype: torch.dtype) -> dict[str, JsonValue]:
    """Write `config.json` and `model.safetensors` with every weight in `dtype`; the reference stays as it is.

    Returns the number of parameters.
    """
    directory.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    model = cast(PreTrainedModel, copy.deepcopy(reference.model.model).to(dtype=dtype))
    model.save_pretrained(directory)
    for path in directory.iterdir():
        if path.name != "config.json" and path.suffix != ".safetensors":
            path.unlink()
    return {"parameters": sum(weight.numel() for weight in model.parameters())}
