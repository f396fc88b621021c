"""Greedy generations of variants on the splits, on the engine that serves, kept as traces in the cache.

They are kept in blocks, so that a run which is killed goes on at the block where it was. A block's name is the hash of
its prompts, and its folder's that of all else that its texts depend on. What answers are read from them does not matter
here, so another `--answer` finds them there already.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fettle.config import TextConfig
from fettle.errors import DataError
from fettle.family import TOKENIZER_FILE, variant_directory
from fettle.manifest import VariantManifest
from fettle.rows import Row
from fettle.text_trace import Trace, read_traces
from optimize import measure
from optimize.text_trial import (
    GREEDILY,
    REQUEST_FILE,
    RESULT_FILE,
    ROWS_FILE,
    Block,
    Drawing,
    TextTrialRequest,
    TextTrialResult,
)
from optimize.text_work import TextWork
from optimize.trial import save_rows
from optimize.workspace import fingerprint_of

FOLDER = "texts"
BLOCK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Span:
    """Some rows of a split."""

    split: str
    first: int
    last: int


def trace(
    work: TextWork,
    variant: VariantManifest,
    split: str,
    rows: int | None = None,
    *,
    drawing: Drawing = GREEDILY,
    report: measure.Report | None = None,
) -> list[Trace]:
    """The variant's generations on the first rows of a split (all if None), whole blocks at least; greedy unless said.

    Raises:
        PassError: its process failed or crashed.
    """
    total = len(work.rows(split))
    wanted = total if rows is None else min(rows, total)
    missing = [span for span in spans(split, wanted, total) if _kept(work, variant, span, drawing) is None]
    if missing:
        step = trace_step(variant.id, split, drawing)
        if report is not None:
            run(work, variant, missing, report, drawing)
        else:
            with work.progress.step(step) as mine:
                run(work, variant, missing, mine, drawing)
    found: list[Trace] = []
    for span in spans(split, wanted, total):
        found += _kept(work, variant, span, drawing) or []
    return found[: wanted * drawing.choices]


def spans(split: str, wanted: int, total: int) -> list[Span]:
    """The blocks that hold the first rows."""
    starts = range(0, wanted, BLOCK_ROWS)
    return [Span(split, start, min(start + BLOCK_ROWS, total)) for start in starts]


def run(
    work: TextWork,
    variant: VariantManifest,
    missing: Sequence[Span],
    report: measure.Report,
    drawing: Drawing = GREEDILY,
) -> None:
    """Generate these blocks in a process of its own."""
    rows: list[Row] = []
    blocks = []
    for span in missing:
        blocks.append(
            Block(path=path_of(work, variant, span, drawing), first=len(rows), last=len(rows) + span.last - span.first)
        )
        rows += work.rows(span.split)[span.first : span.last]
    try_texts(request_for(work, variant).model_copy(update={"blocks": blocks, "drawing": drawing}), rows, report)


def request_for(work: TextWork, variant: VariantManifest) -> TextTrialRequest:
    """The variant as it will be served."""
    served = TextConfig()
    return TextTrialRequest(
        variant=variant_directory(work.config.out, variant.id).resolve(),
        tokenizer=(work.config.out / TOKENIZER_FILE).resolve(),
        device="cpu",
        threads=work.config.threads,
        slots=served.slots,
        cache_bytes=served.cache_bytes,
        max_tokens=work.max_tokens,
    )


def try_texts(request: TextTrialRequest, rows: list[Row], report: measure.Report) -> TextTrialResult:
    """Run a trial in a process of its own.

    Raises:
        PassError: the process failed or crashed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / REQUEST_FILE).write_text(request.model_dump_json())
        save_rows(folder / ROWS_FILE, rows)
        measure.run_child("optimize.text_trial", folder, report)
        return TextTrialResult.model_validate_json((folder / RESULT_FILE).read_bytes())


def path_of(work: TextWork, variant: VariantManifest, span: Span, drawing: Drawing = GREEDILY) -> Path:
    """Where a block's traces are."""
    digest = hashlib.sha256(b"" if drawing == GREEDILY else drawing.model_dump_json().encode())
    for row in work.rows(span.split)[span.first : span.last]:
        digest.update(len(row).to_bytes(4, "little") + row.ids.tobytes())
    return folder_of(work, variant) / f"{digest.hexdigest()[:24]}.npz"


def folder_of(work: TextWork, variant: VariantManifest) -> Path:
    """Where a variant's traces are; those of what had its name before are deleted when the folder is made."""
    above = work.cache.path(f"{FOLDER}/{variant.id}")
    folder = above / _fingerprint(work, variant)[:16]
    if not folder.exists():
        shutil.rmtree(above, ignore_errors=True)
        folder.mkdir(parents=True)
    return folder


def trace_step(variant: str, split: str, drawing: Drawing = GREEDILY) -> str:
    times = f", {drawing.choices} times" if drawing.choices > 1 else ""
    return f"generate with {variant} on {split}{times}"


def _kept(work: TextWork, variant: VariantManifest, span: Span, drawing: Drawing) -> list[Trace] | None:
    """A block's traces; None where there are none, or damaged ones."""
    path = path_of(work, variant, span, drawing)
    if not path.exists():
        return None
    try:
        found = read_traces(path)
    except DataError as error:
        work.progress.warn(f"{error.message}: made again")
        path.unlink()
        return None
    return found if len(found) == (span.last - span.first) * drawing.choices else None


def _fingerprint(work: TextWork, variant: VariantManifest) -> str:
    return fingerprint_of(
        files=[record.sha256 for record in variant.files],
        runtime=variant.runtime.value,
        end_ids=variant.task.end_ids,
        tokenizer=work.reference.source.sha256,
        max_tokens=work.max_tokens,
        threads=work.config.threads,
        hardware=work.hardware.model_dump(mode="json"),
    )
