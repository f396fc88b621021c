"""Prediction without a server, in Python and in a pipe, on families of fake engines."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, softmax
from typer.testing import CliRunner, Result

import fettle
from fettle.certificates import certify
from fettle.cli import app
from fettle.errors import DataError, FamilyError, IntegrityError, UsageError
from fettle.family import Family
from fettle.local import Bound, LocalFamily, predict_lines
from fettle.manifest import Gate, Head, OperatingPoint, Step, Task, TaskKind
from tests.fakes import FakeVariant, change_json, classify_task, embed_task, make_fake_family, token_id
from workers.fake import expected

TEXTS = ["the quick fox", "brown", "", "word9 word200 word3", "quick quick the", "fox brown the quick", "word77"]
THRESHOLD = 0.01


def values_of(text: str, width: int = 3) -> np.ndarray:
    """What the fake engine answers: the words' ids between [CLS] and [SEP]."""
    return expected(np.array([2, *(token_id(word) for word in text.split()), 3], np.int32), width)


def margin(text: str) -> float:
    top = np.sort(softmax(values_of(text).astype(np.float64)))
    return float(top[-1] - top[-2])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Points at 1 %: cheap where it is sure, else the original; at 5 %: cheap alone."""
    made = make_fake_family(tmp_path / "family", variants=[FakeVariant("original"), FakeVariant("cheap")])
    cascade = [
        Step(variant="cheap", gates=[Gate(threshold=THRESHOLD)]),
        Step(variant="original", gates=[Gate(threshold=0.0)]),
    ]
    add_points(made, [(0.01, 2.0, cascade), (0.05, 1.0, [Step(variant="cheap", gates=[Gate(threshold=0.0)])])])
    return tmp_path / "family"


def add_points(family: Family, points: list[tuple[float, float, list[Step]]]) -> None:
    made = [
        OperatingPoint(
            id=f"within-{alpha:g}",
            steps=steps,
            certificate=certify(3, 5000, alpha, 0.05),
            expected_cpu_ms=cost,
            tuned_disagreement=0.0,
        )
        for alpha, cost, steps in points
    ]
    change_json(family.directory / "family.json", points=[point.model_dump(mode="json") for point in made])


@pytest.fixture
def local(directory: Path) -> Iterator[LocalFamily]:
    with fettle.load(directory) as opened:
        yield opened


# In Python


def test_answers_keep_their_order_and_are_the_models(local: LocalFamily) -> None:
    labels = classify_task().labels
    for text, prediction in zip(TEXTS, local.predict(TEXTS), strict=True):
        scores = softmax(values_of(text).astype(np.float64))
        assert prediction.answer == labels[int(values_of(text).argmax())]
        assert prediction.scores is not None
        np.testing.assert_allclose([prediction.scores[label] for label in labels], scores, atol=1e-6)
        assert prediction.score == pytest.approx(margin(text), abs=1e-6)


def test_unsure_answers_are_escalated(local: LocalFamily) -> None:
    predictions = local.predict(TEXTS, 0.01)
    assert [one.variant for one in predictions] == [
        "cheap" if margin(text) >= THRESHOLD else "original" for text in TEXTS
    ]
    assert {one.variant for one in predictions} == {"cheap", "original"}, "the texts should try both"
    assert all(one.point == "within-0.01" and one.stage == 0 for one in predictions)


def test_the_bound_is_the_certificates(local: LocalFamily) -> None:
    (prediction,) = local.predict(["fox"], 0.02)
    assert prediction.bound == Bound(0.01, 0.05, certify(3, 5000, 0.01, 0.05).upper_bound)


def test_more_tolerance_is_answered_more_cheaply(local: LocalFamily) -> None:
    assert {one.variant for one in local.predict(TEXTS, 0.05)} == {"cheap"}


@pytest.mark.parametrize("tolerance", ["exact", 0, 0.004])
def test_where_nothing_is_certified_the_reference_answers(local: LocalFamily, tolerance: float) -> None:
    for one in local.predict(TEXTS, tolerance):
        assert (one.variant, one.point, one.bound) == ("original", None, "exact")


def test_a_pinned_variant_promises_nothing(local: LocalFamily) -> None:
    (prediction,) = local.predict(["fox"], variant="cheap")
    assert (prediction.variant, prediction.point, prediction.bound) == ("cheap", None, None)
    (prediction,) = local.predict(["fox"], variant="original")
    assert prediction.bound == "exact"


def test_no_tolerance_is_the_default_variant(tmp_path: Path) -> None:
    make_fake_family(tmp_path, variants=[FakeVariant("original"), FakeVariant("cheap")], default="cheap")
    with fettle.load(tmp_path) as local:
        (prediction,) = local.predict(["fox"], None)
    assert (prediction.variant, prediction.bound) == ("cheap", None)


def test_only_what_is_needed_is_loaded(directory: Path) -> None:
    (directory / "variants" / "original" / "weights.bin").write_bytes(b"changed")
    with fettle.load(directory) as local:
        local.predict(["fox"], 0.05)
        with pytest.raises(IntegrityError, match="SHA-256"):
            local.predict(["fox"], "exact")


def test_pairs_and_long_texts(local: LocalFamily) -> None:
    pair, long = local.predict([("fox", "brown"), "fox " * 100], "exact")
    ids = np.array([2, token_id("fox"), 3, token_id("brown"), 3], np.int32)
    assert list((pair.scores or {}).values()) == pytest.approx(softmax(expected(ids, 3)).tolist(), abs=1e-6)
    assert (pair.truncated, long.truncated) == (False, True)


def test_no_texts(local: LocalFamily) -> None:
    assert local.predict([]) == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "takes a list of texts, not str"),
        ({"a"}, "takes a list of texts, not set"),
        (["a", 5], "input 1 is int"),
        (["a", "b", None], "input 2 is NoneType"),
        ([("a", "b", "c")], "input 0 is tuple"),
        ([("a", 1)], "input 0 is tuple"),
        (["a\ud800"], "input 0 holds half of a surrogate pair"),
    ],
)
def test_what_is_no_text_is_named(local: LocalFamily, texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        local.predict(texts)


@pytest.mark.parametrize("tolerance", [-0.1, 1.5, float("nan"), "loose", "1%"])
def test_a_tolerance_is_a_share(local: LocalFamily, tolerance: float) -> None:
    with pytest.raises(UsageError, match="a share from 0 to 1"):
        local.predict(["a"], tolerance)


def test_an_unknown_variant_is_named(local: LocalFamily) -> None:
    with pytest.raises(FamilyError, match="no variant 'tiny'; it has cheap, original"):
        local.predict(["a"], variant="tiny")


def test_a_closed_family_says_so(directory: Path) -> None:
    local = fettle.load(directory)
    local.predict(["a"])
    local.close()
    local.close()
    with pytest.raises(UsageError, match="closed"):
        local.predict(["a"])


def test_wrong_options_are_named(directory: Path) -> None:
    with pytest.raises(UsageError, match="threads"):
        fettle.load(directory, threads=0)
    with pytest.raises(UsageError, match="cpu or cuda"):
        fettle.load(directory, device="tpu")


def test_a_point_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    made = make_fake_family(tmp_path)
    add_points(made, [(0.01, 1.0, [Step(variant="gone", gates=[Gate(threshold=0.0)])])])
    with pytest.raises(FamilyError, match="'gone'"):
        fettle.load(tmp_path)


def test_several_labels_a_number_and_a_vector(tmp_path: Path) -> None:
    multi = classify_task().model_copy(update={"head": Head.MULTI_LABEL})
    number = Task(kind=TaskKind.CLASSIFY, head=Head.REGRESSION, labels=["score"], width=1)
    answers = {}
    for name, task in {"multi": multi, "number": number, "vector": embed_task(4)}.items():
        make_fake_family(tmp_path / name, task=task)
        with fettle.load(tmp_path / name) as local:
            (answers[name],) = local.predict(["the quick fox"])
    assert answers["multi"].answer == ["red", "green", "blue"]
    assert list((answers["multi"].scores or {}).values()) == pytest.approx(expit(values_of("the quick fox")).tolist())
    assert answers["number"].answer == pytest.approx(float(values_of("the quick fox", 1)[0]))
    assert answers["number"].scores is answers["number"].score is None
    vector = values_of("the quick fox", 4)
    np.testing.assert_allclose(np.asarray(answers["vector"].answer), vector / np.linalg.norm(vector), atol=1e-6)


def test_importing_fettle_stays_light() -> None:
    code = "import fettle, sys; print('numpy' in sys.modules); fettle.load; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        _ = fettle.unload


# In a pipe


def predict(*arguments: object, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], input=stdin)


def lines_of(result: Result) -> list[dict[str, object]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_help_has_an_example() -> None:
    assert "fettle predict ./family" in predict("--help").stdout


def test_one_line_out_for_each_line_in(directory: Path) -> None:
    done = predict(directory, stdin="\n".join(TEXTS).encode())
    assert done.exit_code == 0, done.stderr
    labels = classify_task().labels
    assert [line["answer"] for line in lines_of(done)] == [labels[int(values_of(text).argmax())] for text in TEXTS]
    assert lines_of(done)[0]["bound"] == {"alpha": 0.01, "delta": 0.05, "upper_bound": pytest.approx(0.00155, abs=1e-4)}


def test_windows_line_ends_and_a_last_line_without_one(directory: Path) -> None:
    plain, windows = predict(directory, stdin=b"fox\nbrown\n"), predict(directory, stdin=b"fox\r\nbrown")
    assert plain.stdout == windows.stdout
    assert len(lines_of(plain)) == 2


def test_nothing_in_nothing_out(directory: Path) -> None:
    done = predict(directory)
    assert (done.exit_code, done.stdout) == (0, "")


def test_a_file_instead_of_a_pipe(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("fox\nbrown\n")
    assert predict(directory, tmp_path / "texts.txt").stdout == predict(directory, stdin=b"fox\nbrown\n").stdout
    missing = predict(directory, tmp_path / "none.txt")
    assert (missing.exit_code, "none.txt: No such file" in missing.stderr) == (1, True)


def test_options_reach_the_prediction(directory: Path) -> None:
    (exact,) = lines_of(predict(directory, "--max-disagreement", "exact", stdin=b"fox"))
    assert (exact["variant"], exact["bound"]) == ("original", "exact")
    (pinned,) = lines_of(predict(directory, "--variant", "cheap", stdin=b"fox"))
    assert pinned["variant"] == "cheap"
    assert "bound" not in pinned
    assert predict(directory, "--max-disagreement", "7", stdin=b"fox").exit_code == 2


def test_vectors_are_lists_of_numbers(tmp_path: Path) -> None:
    make_fake_family(tmp_path / "vectors", task=embed_task(4))
    (line,) = lines_of(predict(tmp_path / "vectors", stdin=b"the quick fox"))
    vector = values_of("the quick fox", 4)
    assert line.pop("answer") == pytest.approx((vector / np.linalg.norm(vector)).tolist(), abs=1e-6)
    assert line == {"variant": "fake", "stage": 0, "bound": "exact", "truncated": False}


def test_jsonl_with_pairs(directory: Path) -> None:
    done = predict(directory, "--jsonl", stdin=b'{"text": "fox", "pair": "brown"}\n{"text": "fox", "label": "red"}\n')
    single = lines_of(predict(directory, stdin=b"fox"))
    assert lines_of(done)[1:] == single
    assert lines_of(done)[0] != single[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"no json", "line 2: not JSON"),
        (b"", "line 2: not JSON"),
        (b'["a"]', 'line 2: must be an object with a string "text"'),
        (b'{"text": 5}', 'line 2: must be an object with a string "text"'),
        (b'{"text": "a", "pair": 5}', 'line 2: "pair" must be a string'),
    ],
)
def test_a_bad_line_is_named_and_the_lines_before_it_answered(directory: Path, line: bytes, message: str) -> None:
    done = predict(directory, "--jsonl", stdin=b'{"text": "fox"}\n' + line + b'\n{"text": "fox"}\n')
    assert done.exit_code == 1
    assert message in done.stderr
    assert len(lines_of(done)) == 1


def test_what_is_not_utf8_is_named(local: LocalFamily) -> None:
    source = io.BytesIO(b"fox\nbr\xffwn\n")
    answers = predict_lines(local, source, 0.01, None, jsonl=False)
    assert len(next(answers).splitlines()) == 1
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        next(answers)


def test_answers_come_while_the_pipe_is_open(local: LocalFamily) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source, os.fdopen(writing, "wb", buffering=0) as sink:
        answers = predict_lines(local, source, 0.01, None, jsonl=False)
        sink.write(b"fox\nbro")
        assert len(next(answers).splitlines()) == 1
        sink.write(b"wn\n\n")
        assert len(next(answers).splitlines()) == 2


def test_a_reader_that_has_seen_enough_is_no_trouble(directory: Path) -> None:
    command = [sys.executable, "-m", "fettle.cli", "predict", str(directory)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdout.close()
    child.stdin.write(b"fox\n")
    child.stdin.close()
    assert child.stderr is not None
    assert child.stderr.read() == b""
    assert child.wait() == 1
