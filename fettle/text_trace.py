"""What full greedy generations of one variant leave, and what an operating point would have made of them.

A trace has all that the stopping policy looks at, so `replay` makes the decisions of the serving path, with the same
state machines, without a model or a tokenizer. Traces are made once, with nothing stopped; thresholds are searched and
certified on them (`optimize.text_certify`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fettle import generation
from fettle.detokenize import TextStream
from fettle.errors import DataError
from fettle.extract import Answer, Extract
from fettle.findings import Step
from fettle.generation import Finish, Token
from fettle.stopping import Piece, takes, watch_step
from fettle.text_scores import Tally, score_of, tally

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]
FINISHES = tuple(Finish)


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """One generation that ran to its own end.

    Attributes:
        ids: int32 [tokens], without the end token; `logprob` float32 [tokens].
        end: float32 [tokens + 1], the probability of ending before each token, and at last of ending where it ended;
            NaN there unless an end token did so.
        ends: int32 [tokens], how long the text is with each token, in characters.
        prompt: tokens of the prompt.
    """

    ids: Ids
    logprob: Floats
    end: Floats
    text: str
    ends: Ids
    finish: Finish
    prompt: int

    @property
    def drawn(self) -> int:
        """Tokens drawn, an end token included."""
        return len(self.ids) + (self.finish is Finish.STOP and not math.isnan(self.end[-1]))

    def tokens(self) -> Iterator[Token]:
        columns = (self.ids.tolist(), self.logprob.tolist(), self.end.tolist())
        for number, logprob, end in zip(*columns, strict=False):
            yield Token(number, logprob, end=end)

    def pieces(self) -> Piece:
        """What each token adds to the text, in order, as an incremental detokenizer of this generation gave it."""
        bounds = iter([0, *self.ends.tolist()])
        at = next(bounds)

        def piece(_: int) -> str:
            nonlocal at
            before, at = at, next(bounds)
            return self.text[before:at]

        return piece


class Recorder:
    """Makes the trace of one generation from an engine's steps. Nothing may stop it early; `stream` is its own."""

    def __init__(self, prompt: int, stream: TextStream) -> None:
        self._prompt, self._stream = prompt, stream
        self._tokens: list[Token] = []
        self._pieces: list[str] = []

    def add(self, step: generation.Step) -> Trace | None:
        """The trace, once the generation is over.

        Raises:
            FettleError: what the step says, where the generation failed.
        """
        if step.error is not None:
            raise step.error
        for token in step.tokens:
            self._tokens.append(token)
            self._pieces.append(self._stream.push(token.id))
        return None if step.finish is None else self._whole(step.finish, step.end)

    def _whole(self, finish: Finish, end: Token | None) -> Trace:
        return Trace(
            ids=np.array([token.id for token in self._tokens], np.int32),
            logprob=np.array([token.logprob for token in self._tokens], np.float32),
            end=np.array([*(token.end for token in self._tokens), math.nan if end is None else end.end], np.float32),
            text="".join(self._pieces) + self._stream.finish(),
            ends=np.cumsum([len(piece) for piece in self._pieces], dtype=np.int32),
            finish=finish,
            prompt=self._prompt,
        )


@dataclass(frozen=True, slots=True)
class Replayed:
    """What one step makes of a generation.

    `drawn` tokens were paid for, of which the first `kept` are the text; `score` is NaN where the step has none.
    """

    text: str
    answer: Answer
    finish: Finish
    drawn: int
    kept: int
    score: float


def replay(trace: Trace, step: Step, extract: Extract, *, last: bool) -> Replayed:
    """The generation as it would have gone with the step's gates; `last`: no other step follows."""
    watch = watch_step(step, trace.pieces(), extract, last=last)
    finish = watch.see(list(trace.tokens())) if watch is not None else None
    if watch is None or finish is None:
        text, kept, drawn, finish = trace.text, len(trace.ids), trace.drawn, trace.finish
    else:
        kept, drawn = watch.kept, watch.tokens
        text = text_after(trace, kept)
    score = math.nan
    if step.text is not None and step.text.score is not None:
        score = score_of(step.text.score, features_of(trace, kept, finish))
    return Replayed(text, extract(text), finish, drawn, kept, score)


def replay_steps(traces: Sequence[Trace], steps: Sequence[Step], extract: Extract) -> list[Replayed]:
    """One request through an operating point, from each step's full trace of it: all attempts; the last was taken."""
    attempts: list[Replayed] = []
    for number, (trace, step) in enumerate(zip(traces, steps, strict=True)):
        last = number == len(steps) - 1
        attempts.append(replay(trace, step, extract, last=last))
        if takes(attempts[-1].finish, attempts[-1].score, step, last=last):
            break
    return attempts


def text_after(trace: Trace, kept: int) -> str:
    """The text that was stopped early after `kept` tokens: whole characters only, as the service shows it."""
    return trace.text[: int(trace.ends[kept - 1])] if kept else ""


def features_of(trace: Trace, kept: int, finish: Finish) -> Tally:
    """The features of the first `kept` tokens; where the text ended itself or by its end, that counts as one more."""
    ended = finish in (Finish.EARLY_END, trace.finish)
    return tally(trace.logprob[:kept].tolist(), float(trace.end[kept]) if ended else math.nan)


def write_traces(path: Path | BinaryIO, traces: Sequence[Trace]) -> None:
    """One compressed npz for many traces: flat arrays, and the texts as one run of UTF-8."""
    texts = [trace.text.encode("utf-8", "surrogatepass") for trace in traces]
    np.savez_compressed(
        path,
        ids=_joined([trace.ids for trace in traces], np.int32),
        logprob=_joined([trace.logprob for trace in traces], np.float32),
        end=_joined([trace.end for trace in traces], np.float32),
        ends=_joined([trace.ends for trace in traces], np.int32),
        text=np.frombuffer(b"".join(texts), np.uint8),
        text_bytes=np.array([len(text) for text in texts], np.int32),
        tokens=np.array([len(trace.ids) for trace in traces], np.int32),
        finish=np.array([FINISHES.index(trace.finish) for trace in traces], np.int8),
        finishes=np.array(FINISHES),
        prompt=np.array([trace.prompt for trace in traces], np.int32),
    )


def read_traces(path: Path) -> list[Trace]:
    """What `write_traces` wrote.

    Raises:
        DataError: the file is damaged or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays: Mapping[str, NDArray[np.generic]] = {name: stored[name] for name in stored.files}
        return _split(arrays)
    except (OSError, EOFError, ValueError, LookupError, BadZipFile, zlib.error) as error:
        raise DataError(f"{path.name} holds no traces of texts ({error}); delete it and run again") from None


def _split(arrays: Mapping[str, NDArray[np.generic]]) -> list[Trace]:
    counts, sizes = arrays["tokens"].astype(np.intp), arrays["text_bytes"].astype(np.intp)
    text = arrays["text"].tobytes()
    if len(arrays["ids"]) != counts.sum() or len(text) != sizes.sum():
        raise ValueError("its arrays do not fit together")
    names = [Finish(str(name)) for name in arrays["finishes"]]
    stops, cuts = np.cumsum(sizes).tolist(), np.cumsum(counts)[:-1]
    columns = zip(
        np.split(arrays["ids"].astype(np.int32), cuts),
        np.split(arrays["logprob"].astype(np.float32), cuts),
        np.split(arrays["end"].astype(np.float32), np.cumsum(counts + 1)[:-1]),
        [text[at:stop].decode("utf-8", "surrogatepass") for at, stop in pairwise([0, *stops])],
        np.split(arrays["ends"].astype(np.int32), cuts),
        [names[int(number)] for number in arrays["finish"].tolist()],
        [int(number) for number in arrays["prompt"].tolist()],
        # Of no traces, numpy still makes one empty part.
        strict=len(counts) > 0,
    )
    return [Trace(*values) for values in columns]


def _joined(arrays: Sequence[NDArray[np.generic]], kind: type[np.generic]) -> NDArray[np.generic]:
    return np.concatenate(arrays) if arrays else np.zeros(0, kind)
