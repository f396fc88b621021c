"""The child process that lets one text generator work: greedy texts as traces, costs, latencies, perplexity, memory.

`python -m optimize.text_trial FOLDER` reads `request.json` and `rows.npz` there, writes blocks of traces where the
request says, whole or not at all, and `result.json`; on standard output it says how far it is, one number from 0 to 1 a
line. As `optimize.trial` it imports no torch unless the variant's engine does, and it compares nothing.
"""

from __future__ import annotations

import io
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer as FastTokenizer

from fettle.detokenize import Detokenizer
from fettle.generation import Prompt, Sampling
from fettle.manifest import LatencyCell, Strict, VariantManifest
from fettle.store import write_atomic
from fettle.text_trace import Recorder, Trace, write_traces
from optimize.trial import load_rows, peak_memory_bytes
from workers.decoder import Floats, Ids, Runner
from workers.engine import Device, EngineOptions, open_runner
from workers.generator import Generator

REQUEST_FILE, ROWS_FILE, RESULT_FILE = "request.json", "rows.npz", "result.json"
# What tells how sure a text is: each token's log-probability, and of ending there instead.
GREEDY = Sampling(temperature=0.0, logprobs=0)
# A detokenizer looks no further back in the prompt than this, in the service neither.
BEFORE = 32
# Logits of so many positions at a time, where all of a text's are wanted.
SCORED_TOKENS = 64
MINIMUM_CALLS, MAXIMUM_CALLS = 3, 30
# How far each part brings the progress; only for the eye.
LOADED = 0.05

Report = Callable[[float], None]


class Block(Strict):
    """Rows `first` to `last` (exclusive), whose traces go into `path`."""

    path: Path
    first: int = Field(ge=0)
    last: int = Field(ge=1)


class Exam(Strict):
    """What is measured beside the blocks. Rows are numbered as in the request's.

    `alone`: so many rows generate by themselves, with nothing known beforehand, into this block. `cost_rows`: rows that
    processor time is taken over, in full slots. `texts_from`: from this row on rows are whole texts, for perplexity.
    Latencies are those of `batches` by `contexts` (decoding), and of `prompts` tokens (a prompt), `seconds` for each of
    the two tables.
    """

    alone: Block
    cost_rows: int = Field(ge=1)
    texts_from: int = Field(ge=0)
    batches: list[int]
    contexts: list[int]
    prompts: list[int]
    seconds: float = Field(gt=0)


class Drawing(Strict):
    """How blocks are drawn: greedy, or `choices` sampled texts of each row, one after the other in its block."""

    choices: int = Field(default=1, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    seed: int = 0

    def sampling(self, row: Ids) -> Sampling:
        """A row's draws depend on its tokens alone, wherever it stands."""
        if not self.temperature:
            return GREEDY
        return Sampling(self.temperature, seed=(self.seed << 32) + zlib.crc32(row.tobytes()), logprobs=0)


GREEDILY = Drawing()


class TextTrialRequest(Strict):
    variant: Path
    tokenizer: Path
    device: Device
    threads: int = Field(ge=1)
    slots: int = Field(ge=1)
    cache_bytes: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    blocks: list[Block] = []
    drawing: Drawing = GREEDILY
    exam: Exam | None = None


class TextCosts(Strict):
    """Processor milliseconds of rows in full slots: feeding prompts, all else, and how many tokens there were."""

    rows: int
    feed_ms: float
    decode_ms: float
    prompt_tokens: int
    drawn_tokens: int


class Examined(Strict):
    """What the exam found. `nll` is summed over `scored` tokens; NaN where a logit was none."""

    costs: TextCosts
    steps: list[LatencyCell]
    prompts: list[LatencyCell]
    nll: float | None
    scored: int


class TextTrialResult(Strict):
    load_seconds: float
    peak_memory_bytes: int
    examined: Examined | None = None


def run_text_trial(folder: Path, report: Report) -> None:
    request = TextTrialRequest.model_validate_json((folder / REQUEST_FILE).read_bytes())
    prompts = [row.ids for row in load_rows(folder / ROWS_FILE)]
    started = time.perf_counter()
    # Hashes were checked when the variant was written or taken over.
    options = EngineOptions(device=request.device, threads=request.threads, verify=False)
    runner = open_runner(request.variant, options)
    runner.warm_up()
    load_seconds = time.perf_counter() - started
    writer = Texts(runner, request, Detokenizer(FastTokenizer.from_file(str(request.tokenizer))))
    blocks = [*request.blocks, *([request.exam.alone] if request.exam else [])]
    total = sum(block.last - block.first for block in blocks) + (request.exam.cost_rows if request.exam else 0)
    report(LOADED)
    done = 0
    for block in request.blocks:
        rows = prompts[block.first : block.last]
        part = _part(report, LOADED + (1 - LOADED) * done / total, (1 - LOADED) * len(rows) / total)
        _write(block.path, writer.together(rows, part, request.drawing))
        done += len(rows)
    examined = None
    if request.exam is not None:
        rest = _part(report, LOADED + (1 - LOADED) * done / total, (1 - LOADED) * (total - done) / total)
        examined = _examine(writer, prompts, request.exam, rest)
    result = TextTrialResult(load_seconds=load_seconds, peak_memory_bytes=peak_memory_bytes(), examined=examined)
    (folder / RESULT_FILE).write_text(result.model_dump_json())
    runner.close()


@dataclass
class Texts:
    """Lets a runner generate as it will be served."""

    runner: Runner
    request: TextTrialRequest
    detokenizer: Detokenizer

    @property
    def manifest(self) -> VariantManifest:
        return self.runner.manifest

    def together(self, rows: Sequence[Ids], report: Report, drawing: Drawing = GREEDILY) -> list[Trace]:
        """All at once, in as many slots as there are; of each row its choices."""
        generator = Generator(self.runner, self.request.cache_bytes, self.request.slots)
        return self._traces(generator, rows, report, drawing)

    def alone(self, rows: Sequence[Ids], report: Report) -> list[Trace]:
        """One after the other, nothing known beforehand."""
        found = []
        for number, row in enumerate(rows):
            found += self._traces(Generator(self.runner, self.request.cache_bytes, 1), [row], lambda _: None)
            report((number + 1) / len(rows))
        return found

    def costs(self, rows: Sequence[Ids]) -> TextCosts:
        """Processor time of these rows in full slots; what is neither feeding nor decoding counts as decoding."""
        timed = _TimedRunner(self.runner)
        generator = Generator(timed, self.request.cache_bytes, self.request.slots)
        started = time.process_time()
        traces = self._traces(generator, rows, lambda _: None)
        total = (time.process_time() - started) * 1000
        return TextCosts(
            rows=len(rows),
            feed_ms=timed.feed_ms,
            decode_ms=max(0.0, total - timed.feed_ms),
            prompt_tokens=sum(map(len, rows)),
            drawn_tokens=sum(trace.drawn for trace in traces),
        )

    def score(self, texts: Iterable[Ids]) -> tuple[float, int]:
        """The negative log-probability of all tokens but the first of each text, and how many these are."""
        total, tokens = 0.0, 0
        for ids in texts:
            self.runner.allocate(1, max(2, len(ids)))
            for start in range(0, len(ids) - 1, SCORED_TOKENS):
                following = ids[start + 1 : start + SCORED_TOKENS + 1]
                fed = ids[start : start + len(following)]
                total += _nll(self.runner.feed(0, fed, start, len(fed)), following)
                tokens += len(following)
        return total, tokens

    def _traces(
        self, generator: Generator, rows: Sequence[Ids], report: Report, drawing: Drawing = GREEDILY
    ) -> list[Trace]:
        """In the order of the rows, and of a row in that of its choices.

        Raises:
            FettleError: a generation failed.
        """
        ends, context = frozenset(self.manifest.task.end_ids), generator.context
        recorders: dict[str, Recorder] = {}
        for ids in rows:
            sampling, most = drawing.sampling(ids), min(self.request.max_tokens, context - len(ids))
            for choice in range(drawing.choices):
                name = str(len(recorders))
                recorders[name] = Recorder(len(ids), self.detokenizer.stream(before=ids[-BEFORE:].tolist()))
                generator.submit(Prompt(name, ids, most, sampling, end_ids=ends, choice=choice, want_end=True))
        traces: dict[str, Trace] = {}
        while generator.busy:
            for step in generator.step():
                trace = recorders[step.id].add(step)
                if trace is not None:
                    traces[step.id] = trace
                    report(len(traces) / len(recorders))
        return [traces[name] for name in recorders]


@dataclass
class _TimedRunner:
    """A runner that adds up the processor time of feeding."""

    inner: Runner
    manifest: VariantManifest = field(init=False)
    feed_ms: float = 0.0

    def __post_init__(self) -> None:
        self.manifest = self.inner.manifest

    @property
    def slots(self) -> int:
        return self.inner.slots

    @property
    def context(self) -> int:
        return self.inner.context

    @property
    def bytes_per_token(self) -> int:
        return self.inner.bytes_per_token

    def warm_up(self) -> None:
        self.inner.warm_up()

    def allocate(self, slots: int, context: int) -> None:
        self.inner.allocate(slots, context)

    def feed(self, slot: int, ids: Ids, start: int, logits: int) -> Floats:
        started = time.process_time()
        found = self.inner.feed(slot, ids, start, logits)
        self.feed_ms += (time.process_time() - started) * 1000
        return found

    def decode(self, ids: Ids, lengths: Ids) -> Floats:
        return self.inner.decode(ids, lengths)

    def copy(self, source: int, target: int, length: int) -> None:
        self.inner.copy(source, target, length)

    def close(self) -> None:
        self.inner.close()


def _examine(texts: Texts, prompts: list[Ids], exam: Exam, report: Report) -> Examined:
    block = exam.alone
    _write(block.path, texts.alone(prompts[block.first : block.last], _part(report, 0.0, 0.5)))
    costs = texts.costs(prompts[: exam.cost_rows])
    report(0.7)
    nll, scored = texts.score(prompts[exam.texts_from :])
    report(0.8)
    steps = _step_cells(texts.runner, exam)
    report(0.9)
    cells = _prompt_cells(texts.runner, exam)
    report(1.0)
    known = nll if math.isfinite(nll) else None
    return Examined(costs=costs, steps=steps, prompts=cells, nll=known, scored=scored)


def _nll(logits: Floats, following: Ids) -> float:
    """Summed negative log-probability of the tokens that follow, from logits float32 [tokens, vocabulary]."""
    values = logits.astype(np.float64)
    top = values.max(axis=1, keepdims=True)
    total = top[:, 0] + np.log(np.exp(values - top).sum(axis=1))
    return float((total - values[np.arange(len(following)), following]).sum())


# Latencies. What is in the slots does not matter for how long a step takes.


def _step_cells(runner: Runner, exam: Exam) -> list[LatencyCell]:
    """One step of decoding by (rows, tokens before it): every batch at the shortest context, the others in time."""
    width = runner.manifest.task.width
    chance = np.random.default_rng(0)
    shapes = [(batch, length) for length in sorted(exam.contexts) for batch in sorted(exam.batches)]
    deadline = time.perf_counter() + exam.seconds
    cells: list[LatencyCell] = []
    for number, (batch, length) in enumerate(shapes):
        if number >= len(exam.batches) and _left_out(cells[-1], deadline):
            break
        runner.allocate(batch, length + 1)
        ids, lengths = chance.integers(0, width, batch).astype(np.int32), np.full(batch, length, np.int32)
        budget = (deadline - time.perf_counter()) / (len(shapes) - number)
        cells.append(_timed(lambda: runner.decode(ids, lengths), batch, length, budget))  # noqa: B023
    return cells


def _prompt_cells(runner: Runner, exam: Exam) -> list[LatencyCell]:
    """Feeding one prompt by its tokens."""
    width = runner.manifest.task.width
    chance = np.random.default_rng(0)
    runner.allocate(1, max(exam.prompts))
    deadline = time.perf_counter() + exam.seconds
    cells: list[LatencyCell] = []
    for number, length in enumerate(exam.prompts):
        if cells and _left_out(cells[-1], deadline):
            break
        ids = chance.integers(0, width, length).astype(np.int32)
        budget = (deadline - time.perf_counter()) / (len(exam.prompts) - number)
        cells.append(_timed(lambda: runner.feed(0, ids, 0, 1), 1, length, budget))  # noqa: B023
    return cells


def _left_out(last: LatencyCell, deadline: float) -> bool:
    """Whether a cell larger than the last cannot be timed in what is left."""
    return last.median_ms / 1000 * (MINIMUM_CALLS + 1) > deadline - time.perf_counter()


def _timed(call: Callable[[], object], batch: int, length: int, seconds: float) -> LatencyCell:
    """One call to warm up, then as many as fit, within bounds."""
    first = _call_ms(call)
    calls = int(np.clip(seconds * 1000 / max(first, 1e-3), MINIMUM_CALLS, MAXIMUM_CALLS))
    median, p95 = np.percentile([_call_ms(call) for _ in range(calls)], (50, 95))
    return LatencyCell(batch=batch, length=length, median_ms=float(median), p95_ms=float(p95))


def _call_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def _write(path: Path, traces: Sequence[Trace]) -> None:
    content = io.BytesIO()
    write_traces(content, traces)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.getvalue())


def _part(report: Report, start: float, share: float) -> Report:
    return lambda done: report(start + share * done)


def _say(done: float) -> None:
    # A closed pipe means that the parent is gone: the error then ends this process as well.
    print(f"{done:.3f}", flush=True)


if __name__ == "__main__":
    run_text_trial(Path(sys.argv[1]), _say)
