"""Traces: on disk, and replayed; a replay decides what the step loop did with the same gates."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.errors import DataError, EngineError
from fettle.findings import AnswerGate, EndGate, Floor, Gate, Step, TextGates, TextScore
from fettle.generation import Finish, Prompt, Sampling
from fettle.generation import Step as Told
from fettle.stopping import watch_step
from fettle.text_scores import score_of, tally
from fettle.text_trace import Recorder, Trace, read_traces, replay, replay_steps, text_after, write_traces
from tests.fake_text import fake_manifest
from tests.unit.random_traces import EXTRACT, PIECES, random_trace, trace_of
from workers.fake_decoder import FakeRunner
from workers.generator import Generator

seeds = st.integers(0, 2**32 - 1)
VOCABULARY = 10
END = 9
SCORES = [
    TextScore(weights={"sum": 1.0}, raw=[-12.0, -2.0, 0.0], agreed=[0.0, 0.6, 1.0], rows=1),
    TextScore(weights={"mean": 1.0, "length": -0.1}, raw=[-3.0, 0.0], agreed=[0.0, 1.0], rows=1),
]


class Words:
    """What the tokens say, as `fettle.detokenize.TextStream` gives it; `held` keeps the last piece back."""

    def __init__(self, held: bool = False) -> None:
        self._held, self._waiting = held, ""

    def push(self, token: int) -> str:
        waiting, self._waiting = self._waiting, PIECES[token] if self._held else ""
        return waiting if self._held else PIECES[token]

    def finish(self) -> str:
        return self._waiting


def same(left: Trace, right: Trace) -> bool:
    return (left.text, left.finish, left.prompt) == (right.text, right.finish, right.prompt) and all(
        np.array_equal(getattr(left, name), getattr(right, name), equal_nan=name in ("logprob", "end"))
        and getattr(left, name).dtype == getattr(right, name).dtype
        for name in ("ids", "logprob", "end", "ends")
    )


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(0, 6))
def test_traces_survive_the_disk(tmp_path_factory: pytest.TempPathFactory, seed: int, count: int):
    rng = np.random.default_rng(seed)
    traces = [random_trace(rng) for _ in range(count)]
    path = tmp_path_factory.mktemp("traces") / "traces.npz"
    write_traces(path, traces)
    again = read_traces(path)
    assert len(again) == count
    assert all(same(left, right) for left, right in zip(traces, again, strict=True))


def test_texts_of_all_kinds_survive_the_disk(tmp_path: Path):
    texts = ["grün 🧵", "", "half a pair \ud83e", "\x00"]
    traces = [trace_of([0], [text], [-0.5], [0.1, 0.9]) for text in texts]
    write_traces(tmp_path / "t.npz", traces)
    assert [trace.text for trace in read_traces(tmp_path / "t.npz")] == texts


def test_traces_are_compact(tmp_path: Path):
    rng = np.random.default_rng(0)
    traces = [random_trace(rng, 100) for _ in range(200)]
    write_traces(tmp_path / "t.npz", traces)
    assert (tmp_path / "t.npz").stat().st_size < 16 * sum(len(trace.ids) for trace in traces) + 4000


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut off", None])
def test_a_damaged_file_is_said_to_be_one(tmp_path: Path, content: bytes | None):
    path = tmp_path / "t.npz"
    if content is None:
        np.savez(path, ids=np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"t\.npz"):
        read_traces(path)


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path):
    path = tmp_path / "t.npz"
    write_traces(path, [trace_of([0, 1], ["a", "b"], [-1.0, -1.0], [0.0, 0.0, 1.0])])
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **(arrays | {"ids": arrays["ids"][:1]}))
    with pytest.raises(DataError):
        read_traces(path)


def prompt_of(seed: int, max_tokens: int, **terms: object) -> Prompt:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, 5).astype(np.int32)
    terms = {"sampling": Sampling(temperature=0.0, logprobs=0), "end_ids": frozenset({END}), "want_end": True} | terms
    return Prompt(str(seed), ids, max_tokens, **terms)  # type: ignore[arg-type]


def steps_of(prompts: list[Prompt]) -> dict[str, list[Told]]:
    """What a step loop says, with all of them in one batch."""
    runner = FakeRunner(fake_manifest(vocabulary=VOCABULARY, context=64))
    engine = Generator(runner, memory_bytes=4096 * runner.bytes_per_token)
    told: dict[str, list[Told]] = {prompt.id: [] for prompt in prompts}
    for prompt in prompts:
        engine.submit(prompt)
    while engine.busy:
        for step in engine.step():
            told[step.id].append(step)
    return told


def recorded(steps: list[Told], prompt: Prompt, held: bool = False) -> Trace:
    recorder = Recorder(len(prompt.ids), Words(held))
    traces = [recorder.add(step) for step in steps]
    assert all(trace is None for trace in traces[:-1])
    assert traces[-1] is not None
    return traces[-1]


def random_step(rng: np.random.Generator) -> Step:
    """With some of the ways to stop, at thresholds that are sometimes reached."""
    score = SCORES[int(rng.integers(len(SCORES)))]
    text = TextGates(
        end=EndGate(threshold=float(rng.uniform(0.05, 0.5))) if rng.random() < 0.5 else None,
        answer=AnswerGate(
            threshold=float(rng.uniform(0, 0.9)),
            measure="product" if rng.random() < 0.5 else "lowest",
            stable=int(rng.integers(1, 4)),
            first=int(rng.integers(1, 4)),
            every=int(rng.integers(1, 3)),
        )
        if rng.random() < 0.5
        else None,
        score=score if rng.random() < 0.7 else None,
        floors=[Floor(after=int(rng.integers(1, 5)), score=float(rng.random()))] if rng.random() < 0.5 else [],
    )
    return Step(variant="a", gates=[Gate(threshold=float(rng.random()))], text=text)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_a_replay_is_what_the_step_loop_does(seed: int):
    """Full generations are recorded; then the same prompts run with the gates at work."""
    rng = np.random.default_rng(seed)
    last = bool(rng.integers(2))
    step = random_step(rng)
    prompts = [prompt_of(seed % 2**31 + number, int(rng.integers(1, 16))) for number in range(6)]
    full = steps_of(prompts)
    watches = {each.id: watch_step(step, Words().push, EXTRACT, last=last) for each in prompts}
    live = steps_of(
        [
            prompt_of(int(each.id), each.max_tokens, watch=watch.see if (watch := watches[each.id]) else None)
            for each in prompts
        ]
    )
    for each in prompts:
        replayed = replay(recorded(full[each.id], each), step, EXTRACT, last=last)
        told, watch = live[each.id], watches[each.id]
        tokens = [token for one in told for token in one.tokens]
        finish, end = told[-1].finish, told[-1].end
        kept = watch.kept if watch is not None and watch.finish is not None else len(tokens)
        text = "".join(PIECES[token.id] for token in tokens[:kept])
        assert (replayed.finish, replayed.kept, replayed.text) == (finish, kept, text)
        assert replayed.drawn == len(tokens) + (end is not None)
        assert replayed.answer == EXTRACT(text)
        if step.text is not None and step.text.score is not None and finish is not Finish.ESCALATED:
            ending = tokens[kept].end if finish is Finish.EARLY_END else math.nan if end is None else end.end
            scored = score_of(step.text.score, tally([token.logprob for token in tokens[:kept]], ending))
            assert replayed.score == scored


def test_early_stops_do_occur_in_these_tests():
    """Otherwise the test above says nothing."""
    seen = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        step = random_step(rng)
        seen |= {replay(random_trace(rng), step, EXTRACT, last=False).finish for _ in range(5)}
    assert seen == {Finish.STOP, Finish.LENGTH, Finish.EARLY_END, Finish.EARLY_ANSWER, Finish.ESCALATED}


def test_what_the_detokenizer_holds_back_is_part_of_a_whole_text():
    prompt = prompt_of(3, 8)
    steps = steps_of([prompt])[prompt.id]
    plain, held = recorded(steps, prompt), recorded(steps, prompt, held=True)
    assert plain.text == held.text != ""
    assert held.ends.tolist() == [0, *plain.ends.tolist()[:-1]]


def test_a_generation_that_failed_leaves_no_trace():
    recorder = Recorder(3, Words())
    with pytest.raises(EngineError):
        recorder.add(Told("a", (), error=EngineError("it broke")))


def test_the_probability_of_the_end_that_was_drawn_is_kept():
    prompts = [prompt_of(number, 16) for number in range(20)]
    told = steps_of(prompts)
    finishes = set()
    for prompt in prompts:
        trace = recorded(told[prompt.id], prompt)
        finishes.add(trace.finish)
        assert np.isfinite(trace.end[:-1]).all()
        assert math.isnan(trace.end[-1]) == (trace.finish is Finish.LENGTH)
        assert trace.drawn == len(trace.ids) + (trace.finish is Finish.STOP)
    assert finishes == {Finish.STOP, Finish.LENGTH}


@pytest.mark.parametrize(("kept", "expected"), [(0, ""), (1, "red"), (2, "red wine"), (3, "red wine and")])
def test_the_text_of_the_first_tokens(kept: int, expected: str):
    trace = trace_of([0, 1, 2], ["red", " wine", " and"], [0.0] * 3, [0.0] * 4)
    trace = Trace(trace.ids, trace.logprob, trace.end, trace.text + " the rest", trace.ends, trace.finish, 7)
    assert text_after(trace, kept) == expected


def test_a_request_goes_on_until_an_answer_is_taken():
    unsure = trace_of([0], ["red"], [math.log(0.3)], [0.1, 1.0])
    sure = trace_of([3], [" blue"], [math.log(0.9)], [0.1, 1.0])
    line = TextScore(weights={"sum": 1.0}, raw=[math.log(0.1), 0.0], agreed=[0.1, 1.0], rows=1)
    cheap = Step(variant="cheap", gates=[Gate(threshold=0.8)], text=TextGates(score=line))
    dear = Step(variant="dear", gates=[Gate(threshold=0.0)])
    attempts = replay_steps([unsure, sure], [cheap, dear], EXTRACT)
    assert [(each.finish, each.answer.value, each.drawn) for each in attempts] == [
        (Finish.ESCALATED, "red", 1),
        (Finish.STOP, "blue", 2),
    ]
    attempts = replay_steps([sure, unsure], [cheap, dear], EXTRACT)
    assert [(each.finish, each.answer.value) for each in attempts] == [(Finish.STOP, "blue")]
    # The last step has no gate to pass.
    alone = replay_steps([unsure], [cheap], EXTRACT)
    assert [(each.finish, each.score < 0.8) for each in alone] == [(Finish.STOP, True)]
