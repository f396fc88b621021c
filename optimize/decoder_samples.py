"""What a language model answers to prompts, in torch: to learn from, and to compare with while developing.

By transformers' own `generate`, in left-padded batches; what is certified comes from the engine that serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from optimize.batches import by_length
from optimize.decoder_examples import Ids
from optimize.objective import autocast, device_of


@torch.no_grad()
def generated(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    *,
    end_ids: Sequence[int],
    pad_id: int,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_rows: int = 64,
    bf16: bool = False,
    report: Callable[[float], None] | None = None,
) -> list[Ids]:
    """int32 [tokens] of each answer, with the end token where it ended before `max_tokens`.

    Greedy at temperature 0; otherwise drawn from the model's whole distribution, the same for the same seed, prompts
    and `batch_rows`. The checkpoint's own settings of `generate` (penalties, top-k) do not count.
    """
    settings = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=temperature > 0,
        eos_token_id=list(end_ids) or None,
        pad_token_id=pad_id,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
    )
    answers: list[Ids] = [np.zeros(0, np.int32)] * len(prompts)
    device, done = device_of(model), 0
    with _only(model, settings), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for chosen in by_length([len(prompt) for prompt in prompts], batch_rows):
            rows = [prompts[index] for index in chosen]
            ids, mask = _left_padded(rows, pad_id)
            with autocast(device, bf16):
                output = cast(Any, model).generate(
                    torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device)
                )
            for index, tokens in zip(chosen, output[:, ids.shape[1] :].cpu().numpy(), strict=True):
                answers[index] = _to_its_end(tokens.astype(np.int32), end_ids)
            done += len(chosen)
            if report is not None:
                report(done / len(prompts))
    return answers


@contextmanager
def _only(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Generate by these settings, with none of the checkpoint's filled in."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


def _left_padded(rows: Sequence[Ids], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, longest - len(row) :] = row
        mask[place, longest - len(row) :] = 1
    return ids, mask


def _to_its_end(tokens: Ids, end_ids: Sequence[int]) -> Ids:
    """Without the padding after the first end token, which stays."""
    ends = np.flatnonzero(np.isin(tokens, list(end_ids)))
    return tokens[: ends[0] + 1] if len(ends) else tokens
