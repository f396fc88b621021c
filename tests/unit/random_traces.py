"""Random generations that look like answers: words of which some are labels, and how sure the model was of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fettle.extract import Extract, LabelAnswer, extractor
from fettle.generation import Finish
from fettle.text_trace import Trace

LABELS = ["red", "green", "red wine", "blue"]
# Tokens; some of them make a label only together, and one adds nothing to the text.
PIECES = ["red", " wine", " gre", "en", " blue", " so", ".", " it is", "", " Red"]
EXTRACT: Extract = extractor(LabelAnswer(labels=LABELS))


def random_trace(rng: np.random.Generator, most: int = 12, *, coarse: bool = False) -> Trace:
    """`coarse`: of few different probabilities, so that ties occur."""
    count = int(rng.integers(0, most + 1))
    ids = rng.integers(0, len(PIECES), count).astype(np.int32)
    sure, end = rng.uniform(0.05, 1, count) ** 0.5, rng.uniform(0, 0.6, count + 1)
    if coarse:
        sure, end = np.ceil(sure * 4) / 4, np.round(end * 5) / 5
    logprob = np.log(sure).astype(np.float32)
    logprob[rng.random(count) < 0.02] = np.nan
    finish = Finish.STOP if rng.random() < 0.7 else Finish.LENGTH
    if finish is Finish.LENGTH:
        end[-1] = np.nan
    pieces = [PIECES[number] for number in ids]
    return trace_of(ids.tolist(), pieces, logprob.tolist(), end.tolist(), finish)


def trace_of(
    ids: Sequence[int],
    pieces: Sequence[str],
    logprob: Sequence[float],
    end: Sequence[float],
    finish: Finish = Finish.STOP,
    prompt: int = 7,
) -> Trace:
    return Trace(
        ids=np.array(ids, np.int32),
        logprob=np.array(logprob, np.float32),
        end=np.array(end, np.float32),
        text="".join(pieces),
        ends=np.cumsum([len(piece) for piece in pieces], dtype=np.int32),
        finish=finish,
        prompt=prompt,
    )
