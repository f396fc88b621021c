"""Text without a server: the same texts as the generator's, the same decisions as the replica's and the replay's."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import fettle
from deployments.text_work import Bit, TextWork
from deployments.text_writer import Writer
from fettle.config import TextConfig
from fettle.errors import DataError, EngineError, FamilyError, RequestError, UsageError
from fettle.extract import AnswerSpec, extractor
from fettle.family import FAMILY_FILE, Family, write_manifest
from fettle.findings import AnswerGate, EndGate, Floor, Gate, TextGates, TextScore
from fettle.generation import GREEDY, Finish, Prompt, Sampling
from fettle.local import predict_lines
from fettle.local_text import BEFORE, Generation, LocalTexts
from fettle.manifest import Certificate, OperatingPoint, Step
from fettle.stopping import takes
from fettle.text_scores import score_of, tally
from fettle.text_trace import Recorder, Trace, replay, replay_steps
from fettle.tokenizer import Tokenizer
from tests.unit.tiny_decoders import save_decoder
from tests.unit.tiny_texts import config_for, run, settle
from workers.engine import open_runner
from workers.generator import Generator

TEXTS = ["abc", "hello there", "g", "d e f a b", "the inn", "ab ab ab", "fffff", "the the"]
TOKENS = 8
SCORE = TextScore(weights={"sum": 1.0}, raw=[-30.0, 0.0], agreed=[0.0, 1.0], rows=100)
MEAN = TextScore(weights={"mean": 1.0, "length": 0.1}, raw=[-4.0, 0.5], agreed=[0.0, 1.0], rows=100)
STOPS: dict[str, TextGates | None] = {
    "whole": None,
    "end": TextGates(end=EndGate(threshold=1e-4)),
    "answer": TextGates(answer=AnswerGate(threshold=0.02)),
    "stable": TextGates(answer=AnswerGate(threshold=0.02, measure="lowest", stable=3)),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    with pytest.MonkeyPatch.context() as patch:
        settle(patch)
        directory = tmp_path_factory.mktemp("family")
        config = config_for(save_decoder(directory / "model"), directory, max_tokens=TOKENS)
        return run(config.model_copy(update={"recipes": ["onnx-int8"]}))


def point(name: str, *steps: Step, alpha: float = 0.1) -> OperatingPoint:
    proof = Certificate(alpha=alpha, delta=0.05, rows=1000, errors=1, p_value=0.01, upper_bound=alpha * 0.9)
    return OperatingPoint(id=name, steps=list(steps), certificate=proof, expected_cpu_ms=1.0, tuned_disagreement=0.0)


def one(variant: str, gates: TextGates | None = None, accept: float = 0.0) -> Step:
    return Step(variant=variant, gates=[Gate(threshold=accept)], text=gates)


# What stops the first attempt of a cascade, and how it is scored.
CASCADES = {
    "falling": TextGates(score=SCORE),
    "stopping": TextGates(score=SCORE, answer=AnswerGate(threshold=0.05)),
    "ending": TextGates(score=SCORE, end=EndGate(threshold=1e-3)),
    "floors": TextGates(score=MEAN, floors=[Floor(after=2, score=0), Floor(after=5, score=0)]),
}


def cascade(family: Family, gates: TextGates) -> tuple[Step, Step]:
    """One that takes about half of the first attempts, and gives up about a fifth at each floor."""
    answer, traces = extractor(answer_of(family)), traces_of(family, "onnx-int8")
    free = one("onnx-int8", gates.model_copy(update={"floors": []}))
    scores = [replay(trace, free, answer, last=False).score for trace in traces]
    score = gates.score
    assert score is not None
    floors = []
    for floor in gates.floors:
        so_far = [score_of(score, tally(trace.logprob[: floor.after].tolist())) for trace in traces]
        floors.append(floor.model_copy(update={"score": float(np.quantile(so_far, 0.2))}))
    gates = gates.model_copy(update={"floors": floors})
    return one("onnx-int8", gates, float(np.median(scores))), one("onnx-fp32", STOPS["answer"])


def answer_of(family: Family) -> AnswerSpec:
    assert family.manifest.task.answer is not None
    return family.manifest.task.answer


def with_points(family: Family, *points: OperatingPoint) -> Family:
    """The family on the disk has these points from now on."""
    write_manifest(family.directory / FAMILY_FILE, family.manifest.model_copy(update={"points": list(points)}))
    return Family.open(family.directory)


@pytest.fixture
def local(family: Family) -> Iterator[LocalTexts]:
    with_points(family)
    with opened(family) as found:
        yield found


def opened(family: Family) -> LocalTexts:
    found = fettle.load(family.directory)
    assert isinstance(found, LocalTexts)
    return found


def prompts_of(family: Family, texts: Sequence[str] = TEXTS) -> list[np.ndarray]:
    tokenizer = Tokenizer(family.tokenizer_path, family.manifest.tokenizer)
    return [tokenizer.ids(f"<user>Say {text}<assistant>", special=False) for text in texts]


def generator_of(family: Family, variant: str) -> Generator:
    settings = TextConfig()
    return Generator(open_runner(family.variant_path(variant)), settings.cache_bytes, settings.slots)


def traces_of(family: Family, variant: str) -> list[Trace]:
    generator = generator_of(family, variant)
    detokenizer = Tokenizer(family.tokenizer_path, family.manifest.tokenizer).detokenizer
    recorders = {}
    sure = Sampling(temperature=0.0, logprobs=0)
    ends = frozenset(family.manifest.task.end_ids)
    for number, ids in enumerate(prompts_of(family)):
        recorders[str(number)] = Recorder(len(ids), detokenizer.stream(before=ids[-BEFORE:].tolist()))
        generator.submit(Prompt(str(number), ids, TOKENS, sure, end_ids=ends, want_end=True))
    found: dict[str, Trace] = {}
    while generator.busy:
        for step in generator.step():
            trace = recorders[step.id].add(step)
            if trace is not None:
                found[step.id] = trace
    return [found[str(number)] for number in range(len(recorders))]


@pytest.mark.parametrize("variant", ["torch-fp32", "onnx-fp32", "onnx-int8"])
def test_a_variant_alone_writes_what_its_generator_does(family: Family, local: LocalTexts, variant: str) -> None:
    generator = generator_of(family, variant)
    detokenizer = Tokenizer(family.tokenizer_path, family.manifest.tokenizer).detokenizer
    found = local.predict(TEXTS, variant=variant)
    for ids, told in zip(prompts_of(family), found, strict=True):
        generator.submit(Prompt("x", ids, TOKENS, GREEDY, end_ids=frozenset(family.manifest.task.end_ids)))
        tokens, last = [], None
        while generator.busy:
            for last in generator.step():
                tokens += [token.id for token in last.tokens]
        assert last is not None
        stream = detokenizer.stream(before=ids[-BEFORE:].tolist())
        assert told.text == "".join(map(stream.push, tokens)) + stream.finish()
        assert told.finish is last.finish
        assert told.tokens == len(tokens) + (last.end is not None)
        assert (told.variant, told.point, told.step) == (variant, None, 0)
    assert [told.bound for told in found] == ["exact" if variant == "torch-fp32" else None] * len(TEXTS)


@pytest.mark.parametrize("name", [*STOPS, *CASCADES])
def test_a_point_decides_as_its_replay_does(family: Family, name: str) -> None:
    steps = (one("onnx-int8", STOPS[name]),) if name in STOPS else cascade(family, CASCADES[name])
    with opened(with_points(family, point("made", *steps))) as local:
        found = local.predict(TEXTS, 0.1)
    traces = [traces_of(family, step.variant) for step in steps]
    extract = extractor(answer_of(family))
    reached = set()
    for told, own in zip(found, zip(*traces, strict=True), strict=True):
        attempts = replay_steps(own, steps, extract)
        last = attempts[-1]
        reached.add((len(attempts), last.finish, attempts[0].finish))
        assert (told.text, told.finish, told.step) == (last.text, last.finish, len(attempts) - 1)
        assert told.tokens == sum(attempt.drawn for attempt in attempts)
        assert told.variant == steps[len(attempts) - 1].variant
        assert told.answer == (last.answer.value if last.answer.found else None)
        assert told.score is None if np.isnan(last.score) else told.score == last.score
        assert told.point == "made"
    # What is compared has to happen.
    if name in CASCADES:
        assert {count for count, _, _ in reached} == {1, 2}
    expected = {"whole": Finish.LENGTH, "end": Finish.EARLY_END, "answer": Finish.EARLY_ANSWER}
    assert expected.get(name, Finish.EARLY_ANSWER) in {finish for _, finish, _ in reached}
    if name in ("falling", "floors"):
        assert Finish.ESCALATED in {first for _, _, first in reached}


@pytest.mark.parametrize("name", list(CASCADES))
def test_a_point_decides_as_the_replicas_do(family: Family, name: str) -> None:
    steps = cascade(family, CASCADES[name])
    with opened(with_points(family, point("made", *steps))) as local:
        found = local.predict(TEXTS, 0.1)
    generators = {step.variant: generator_of(family, step.variant) for step in steps}
    for told, ids in zip(found, prompts_of(family), strict=True):
        for number, step in enumerate(steps):
            last = number == len(steps) - 1
            bit = served(family, generators[step.variant], ids, step, last=last)
            assert bit.finish is not None
            if takes(bit.finish, bit.score, step, last=last):
                break
        assert (told.text, told.finish, told.step) == (bit.text, bit.finish, number)
        assert told.score is None if np.isnan(bit.score) else told.score == bit.score


def served(family: Family, generator: Generator, ids: np.ndarray, step: Step, *, last: bool) -> Bit:
    """What a replica makes of one step of a point."""
    tokenizer = Tokenizer(family.tokenizer_path, family.manifest.tokenizer)
    ends = frozenset(family.manifest.task.end_ids)
    sampling = Sampling(temperature=0.0, logprobs=0)
    work = TextWork("x", (ids,), sampling, (TOKENS,), end_ids=ends, step=step, last=last)
    writer = Writer(work, 0, tokenizer.detokenizer, extractor(answer_of(family)))
    generator.submit(Prompt("x", ids, TOKENS, sampling, end_ids=ends, watch=writer.see, want_end=True))
    bits = []
    while generator.busy:
        bits += [writer.bit(told) for told in generator.step()]
    text = "".join(bit.text for bit in bits)
    return Bit(0, text, finish=bits[-1].finish, score=bits[-1].score)


def test_the_class_chooses_the_point(family: Family) -> None:
    dear, cheap = point("dear", one("onnx-fp32"), alpha=0.01), point("cheap", one("onnx-int8"), alpha=0.05)
    cheap = cheap.model_copy(update={"expected_cpu_ms": 0.5})

    def by(told: Sequence[Generation]) -> tuple[str, str | None]:
        return told[0].variant, told[0].point

    with opened(with_points(family, dear, cheap)) as local:
        assert by(local.predict(["a"], 0.1)) == ("onnx-int8", "cheap")
        assert by(local.predict(["a"], 0.02)) == ("onnx-fp32", "dear")
        assert by(local.predict(["a"])) == ("onnx-fp32", "dear")
        assert by(local.predict(["a"], 0.005)) == ("torch-fp32", None)
        assert by(local.predict(["a"], "exact")) == ("torch-fp32", None)
        assert by(local.predict(["a"], None)) == (family.manifest.default, None)
        assert local.predict(["a"], 0.1)[0].bound == fettle.local.Bound(0.05, 0.05, 0.05 * 0.9)


def test_prompts_are_strings_conversations_or_ids(family: Family, local: LocalTexts) -> None:
    asked = local.predict(["abc"], variant="onnx-fp32")
    (ids,) = prompts_of(family, ["abc"])
    for prompt in ([{"role": "user", "content": "Say abc"}], "<user>Say abc<assistant>", ids):
        assert local.generate([prompt], variant="onnx-fp32") == asked
    assert local.generate(["Say abc"], variant="onnx-fp32") != asked
    assert local.predict([], 0.1) == []


def test_rows_are_read_as_the_data_had_them(family: Family, local: LocalTexts) -> None:
    assert local.read({"text": "abc"}) == [{"role": "user", "content": "Say abc"}]
    task = family.manifest.task.model_copy(update={"instruction": None})
    write_manifest(family.directory / FAMILY_FILE, family.manifest.model_copy(update={"task": task}))
    said = [{"role": "user", "content": "abc"}]
    with opened(family) as bare:
        assert bare.read({"messages": said, "text": "abc"}) == said
        assert bare.read({"prompt": "abc"}) == bare.read({"text": "abc"}) == "abc"
        with pytest.raises(DataError, match='"messages", or a string "prompt" or "text"'):
            bare.read({"prompt": 3})
        (told,) = bare.predict(["<user>Say abc<assistant>"], variant="onnx-fp32")
    assert [told] == local.predict(["abc"], variant="onnx-fp32")


def test_texts_are_as_long_as_those_that_were_certified(local: LocalTexts) -> None:
    assert max(told.tokens for told in local.predict(TEXTS, variant="onnx-fp32")) == TOKENS
    assert [told.tokens for told in local.generate(["abc"], variant="onnx-fp32", max_tokens=3)] == [3]
    (long,) = local.generate(["abc"], variant="onnx-fp32", max_tokens=1000)
    assert long.finish in (Finish.LENGTH, Finish.STOP)


def test_what_cannot_be_answered_leaves_nothing_behind(local: LocalTexts) -> None:
    with pytest.raises(RequestError, match="shorten it"):
        local.generate(["abc", "a" * 100], variant="onnx-fp32")
    with pytest.raises(UsageError, match="prompt 0 is int"):
        local.generate([3])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="prompt 0 is list"):
        local.generate([["abc"]])  # type: ignore[list-item]
    with pytest.raises(FamilyError, match="no variant 'none'"):
        local.generate(["abc"], variant="none")
    with pytest.raises(UsageError, match="a share from 0 to 1"):
        local.generate(["abc"], 7.0)
    assert len(local.generate(["abc", "b"], variant="onnx-fp32")) == 2


def test_an_engine_that_fails_loses_this_call_alone(local: LocalTexts, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = local.predict(TEXTS, variant="onnx-fp32")
    generator = local._generators["onnx-fp32"]
    assert isinstance(generator, Generator)

    def broken(*_: object) -> None:
        raise EngineError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(generator.runner, "decode", broken)
        with pytest.raises(EngineError, match="out of memory"):
            local.predict(TEXTS, variant="onnx-fp32")
    assert not generator.busy
    assert local.predict(TEXTS, variant="onnx-fp32") == expected


def test_a_closed_family_says_so(family: Family) -> None:
    with opened(family) as local:
        local.predict(["a"], variant="onnx-fp32")
    with pytest.raises(UsageError, match="was closed"):
        local.predict(["a"])


def test_the_pipe_answers_line_by_line(local: LocalTexts) -> None:
    answers = b"".join(predict_lines(local, io.BytesIO(b"abc\nd e\n"), None, "onnx-fp32", jsonl=False))
    rows = [json.loads(line) for line in answers.splitlines()]
    assert [row["text"] for row in rows] == [told.text for told in local.predict(["abc", "d e"], variant="onnx-fp32")]
    assert rows[0]["variant"] == "onnx-fp32"
    assert "point" not in rows[0]
    lines = b'{"text": "abc"}\n{"title": "abc"}\n'
    stream = predict_lines(local, io.BytesIO(lines), None, "onnx-fp32", jsonl=True)
    assert json.loads(next(stream)) == rows[0]
    with pytest.raises(DataError, match='line 2: must be an object with a string "text"'):
        next(stream)


def test_a_tokenizer_that_was_changed_is_refused(family: Family, tmp_path: Path) -> None:
    kept = family.tokenizer_path.read_bytes()
    try:
        family.tokenizer_path.write_bytes(kept + b" ")
        with pytest.raises(fettle.errors.IntegrityError):
            fettle.load(family.directory)
    finally:
        family.tokenizer_path.write_bytes(kept)
