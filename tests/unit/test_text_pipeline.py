"""`fettle optimize` of a tiny language model, from the command's configuration to the family and what it writes."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fettle.chat import ChatTemplate
from fettle.cli import app
from fettle.config import OptimizeConfig
from fettle.display import as_json, print_table
from fettle.errors import UsageError
from fettle.family import Family
from fettle.manifest import Runtime
from fettle.text_trace import Trace
from optimize import recipes, text_measure
from optimize.finish import CERTIFY, TRY_POINTS
from optimize.pipeline import LOAD, READ
from optimize.progress import Progress
from optimize.report import render
from tests.unit.test_report import Page
from tests.unit.tiny_decoders import CHAT, END_ID, save_decoder
from tests.unit.tiny_texts import ANSWER, ROWS, config_for, run, settle, write_data

QUICK = ["torch-fp32", "onnx-fp32", "onnx-int8", "onnx-int4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials run in this process, on a machine that is always the same."""
    settle(monkeypatch)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OptimizeConfig, Family]]:
    with pytest.MonkeyPatch.context() as patch:
        settle(patch)
        config = config_for(model, tmp_path_factory.mktemp("made"), votes=5, vote_temperature=0.5)
        yield config, run(config)


def test_the_family_is_whole_and_measured(made: tuple[OptimizeConfig, Family]) -> None:
    config, family = made
    assert family.verify() == []
    assert list(family.variants) == QUICK
    task = family.manifest.task
    assert (task.instruction, task.end_ids) == ("Say {text}", [END_ID])
    assert task.answer is not None
    assert task.answer.kind == "pattern"
    for variant in family.variants.values():
        assert variant.decoder is not None
        assert variant.decoder.kv_heads == 2
        found = variant.measured
        assert found is not None
        assert found.prompts is not None
        assert {cell.batch for cell in found.latency.cells} >= {1, 4}
        assert {cell.batch for cell in found.prompts.cells} == {1}
        assert found.quality.rows == ROWS["test"]
        assert found.quality.text is not None
        assert found.quality.text.perplexity > 1
        assert found.row_cpu_ms is not None
        assert found.prompt_token_cpu_ms is not None
    assert (config.out / "report.html").is_file()


def test_the_graph_gives_the_references_texts(made: tuple[OptimizeConfig, Family]) -> None:
    _, family = made
    found = family.variant("onnx-fp32").measured
    assert found is not None
    assert found.quality.text is not None
    assert found.quality.disagreement == 0
    assert found.quality.text.identical_texts == found.quality.text.token_agreement == 1
    assert found.quality.text.perplexity == pytest.approx(found.quality.text.reference_perplexity, rel=1e-3)
    int4 = family.variant("onnx-int4").measured
    assert int4 is not None
    assert int4.quality.text is not None
    assert int4.quality.text.perplexity != pytest.approx(found.quality.text.perplexity, rel=1e-3)
    assert int4.quality.text.token_agreement < 1


def test_levels_have_a_point_or_a_reason(made: tuple[OptimizeConfig, Family]) -> None:
    _, family = made
    assert [level.alpha for level in family.manifest.levels] == [0.1, 0.6]
    assert all((level.point is None) != (level.reason is None) for level in family.manifest.levels)
    assert family.manifest.points
    for point in family.manifest.points:
        assert {step.variant for step in point.steps} <= set(QUICK)
        assert point.text is not None
        assert point.text.rows == ROWS["validation"]
        assert point.test is not None
        assert point.test.rows == ROWS["test"]
        assert sum(share for (share,) in point.test.answered) == pytest.approx(1)
        assert point.certificate.rows == ROWS["calibration"]


def test_the_service_finds_the_chat_template(made: tuple[OptimizeConfig, Family]) -> None:
    _, family = made
    template = ChatTemplate.read(family.tokenizer_path.parent)
    assert template is not None
    assert template.source == CHAT
    assert template.special_tokens["eos_token"] == "<|end|>"
    assert {record.path for record in family.manifest.tokenizer_files} == {
        f"tokenizer/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }


def test_the_command_is_written_down(made: tuple[OptimizeConfig, Family]) -> None:
    command = made[1].manifest.command
    assert "--prompt 'Say {text}'" in command
    assert f"--answer '{ANSWER}'" in command
    assert "--max-tokens 6" in command
    assert "--votes 5 --vote-temperature 0.5" in command


def test_votes_are_drawn_and_certified(made: tuple[OptimizeConfig, Family]) -> None:
    _, family = made
    lossless, *others = family.manifest.votes
    assert (lossless.choices, lossless.temperature, lossless.certificate) == (5, 0.5, None)
    assert 3 <= lossless.drawn <= 5
    for vote in others:
        assert vote.certificate is not None
        assert vote.certificate.rows == ROWS["calibration"]
        assert vote.certificate.upper_bound <= vote.certificate.alpha
        assert vote.drawn <= lossless.drawn
    left = {0.1, 0.6} - {vote.certificate.alpha for vote in others if vote.certificate}
    assert all(any(f"no vote within {alpha:g}" in note for note in family.manifest.analysis.notes) for alpha in left)
    assert "agree on" in Page(render(family)).texts["texts"]


def test_the_report_shows_what_is_written_and_how_fast(made: tuple[OptimizeConfig, Family]) -> None:
    _, family = made
    text = render(family)
    page = Page(text)
    assert page.parts == ["points", "frontier", "levers", "texts", "missing", "search", "data", "method", "command"]
    assert not re.findall(r'(?:src|href)="(?!#)|url\(|@import|https?:', text)
    assert f"texts; another answer is another first match of {ANSWER[8:]}" in page.texts["header"]
    for said in ("Perplexity", "Identical texts", "Step of 16", "Stopping early", "Greedy texts of at most 6 tokens"):
        assert said in page.texts["texts"]
    found = family.variant("onnx-int8").measured
    assert found is not None
    assert found.quality.text is not None
    assert f"{found.quality.text.perplexity:,.3f}" in page.texts["texts"]
    assert "torch and float32" in page.texts["method"]


def test_it_is_shown_as_a_family_of_texts(made: tuple[OptimizeConfig, Family]) -> None:
    _, family = made
    row = as_json(family)["variants"][1]
    assert row["text"]["identical_texts"] == 1
    assert row["decode_token_cpu_ms"] >= 0
    console = Console(record=True, width=100, file=io.StringIO())
    print_table(family, console)
    shown = console.export_text()
    assert "texts" in shown.splitlines()[0]
    assert all(name in shown for name in QUICK)


# What is kept.


class Watched(Progress):
    """Remembers which steps were done; kills the run when one more is than it may."""

    def __init__(self, most: int | None = None) -> None:
        super().__init__(Console(quiet=True))
        self.done: list[str] = []
        self._most = most

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[float], None]]:
        if name not in (READ, LOAD) and self._most is not None and len(self.done) >= self._most:
            raise KeyboardInterrupt
        with super().step(name) as report:
            yield report
        if name not in (READ, LOAD):
            self.done.append(name)


def test_a_second_run_does_nothing(made: tuple[OptimizeConfig, Family]) -> None:
    config, family = made
    written = {path: path.stat().st_mtime_ns for path in family.directory.rglob("*.npz")}
    again = Watched()
    assert run(config, again).manifest == family.manifest
    assert set(again.done) <= {CERTIFY, TRY_POINTS}
    assert {path: path.stat().st_mtime_ns for path in family.directory.rglob("*.npz")} == written


def test_another_answer_needs_no_new_texts(made: tuple[OptimizeConfig, Family], model: Path) -> None:
    config, family = made
    config = config.model_copy(update={"answer": "text"})
    again = Watched()
    other = run(config, again)
    assert not [step for step in again.done if step.startswith("generate")]
    found, before = other.variant("onnx-int4").measured, family.variant("onnx-int4").measured
    assert found is not None
    assert before is not None
    assert found.quality.disagreement > before.quality.disagreement
    assert found.quality.metric_name == "exact match"
    assert other.manifest.task.answer != family.manifest.task.answer
    assert other.variant("onnx-int4").task == other.manifest.task


@pytest.mark.slow
def test_a_run_that_is_killed_after_each_step_is_completed(model: Path, tmp_path: Path) -> None:
    config = config_for(model, tmp_path)
    done: Counter[str] = Counter()
    family = None
    while family is None:
        # What certifying takes is not kept, so from there on it is one go.
        watched = Watched(most=None if CERTIFY in done else 1)
        try:
            family = run(config, watched)
        except KeyboardInterrupt:
            assert watched.done, "a run that was killed gets no further"
            done.update(watched.done)
    assert family.verify() == []
    assert list(family.variants) == QUICK
    assert {f"build {name}" for name in QUICK} | {f"measure {name}" for name in QUICK} <= set(done)
    # In 4 bits blocks of inputs do not fit a width of 48, and sums depend on the batch: such a variant is no candidate.
    assert {f"generate with {name} on calibration" for name in QUICK[:3]} <= set(done)
    assert set(done.values()) == {1}


@pytest.mark.slow
def test_students_are_made_of_the_language_model(model: Path, tmp_path: Path) -> None:
    config = config_for(model, tmp_path, effort="standard", recipes=["onnx-fp32", "distilled-1-int8"])
    family = run(config)
    assert list(family.variants)[:2] == QUICK[:2]
    student = family.variant("distilled-1-int8")
    assert student.runtime is Runtime.ONNX
    assert student.decoder is not None
    assert student.decoder.layers == 1
    assert [record.name for record in student.recipe] == ["prune", "distill", "export", "quantize"]
    assert student.measured is not None


# What the user is told.


def fettle(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", "Say it"], "the prompt has no place for the text; write {text} where it goes"),
        (["--prompt", "Say {text}", "--answer", "pattern=("], "not a regular expression"),
        (["--prompt", "Say {text}", "--answer", "colour"], "answer"),
        (["--prompt", "Say {text}", "--answer", "function=nowhere:answer"], "cannot be imported"),
        (["--prompt", "Say {title}"], "no column 'title', which the prompt names"),
        (["--max-tokens", "60"], "leaves room for 60 tokens in the model's context of 64"),
        (["--answer", "labels", "--label-column", "absent"], "no column 'absent' for the label"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(model: Path, tmp_path: Path, options: list[str], said: str) -> None:
    files = write_data(tmp_path / "data")
    data = ["--test", files.test, "--calibration", files.calibration]
    code, line = fettle("optimize", model, *data, "--out", tmp_path / "out", *options)
    assert code in (1, 2)
    assert said in line
    assert not (tmp_path / "out/family.json").exists()


def test_votes_need_rows_and_answers_that_a_service_can_read(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--votes: a service reads no answers with a Python function"):
        run(config_for(model, tmp_path / "one", votes=3, answer="function=string:capwords"))
    files = write_data(tmp_path / "two", {"train": 24, "validation": 30, "test": 20})
    with pytest.raises(UsageError, match="--votes: the data have no calibration split"):
        run(config_for(model, tmp_path / "two", votes=3, files=files))


def test_labels_that_are_not_there(model: Path, tmp_path: Path) -> None:
    files = write_data(tmp_path / "data")
    assert files.test is not None
    files.test.write_text(files.test.read_text().replace('"label"', '"unused"'))
    code, line = fettle("optimize", model, "--test", files.test, "--out", tmp_path / "out", "--answer", "labels")
    assert code == 2
    assert "the data have no labels" in line


# Comparing.


def trace_of(ids: list[int], *, ended: bool = True, logprob: float = -0.5) -> Trace:
    from fettle.generation import Finish

    return Trace(
        ids=np.array(ids, np.int32),
        logprob=np.full(len(ids), logprob, np.float32),
        end=np.array([0.1] * len(ids) + [0.9 if ended else np.nan], np.float32),
        text="".join(chr(97 + token) for token in ids),
        ends=np.arange(1, len(ids) + 1, dtype=np.int32),
        finish=Finish.STOP if ended else Finish.LENGTH,
        prompt=3,
    )


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    reference = [trace_of([1, 2, 3]), trace_of([4, 5]), trace_of([])]
    agree = text_measure.token_agreement
    assert agree(reference, reference) == (1.0, 1.0)
    # Of four, three and one tokens, ends included: two, all, and all.
    assert agree([trace_of([1, 2, 9]), trace_of([4, 5]), trace_of([])], reference) == (6 / 8, 2 / 3)
    # The end is a token that may be missing.
    longer = [trace_of([1, 2, 3, 4], ended=False), trace_of([4, 5]), trace_of([7])]
    assert agree(longer, reference) == (6 / 8, 1 / 3)


def test_texts_are_invariant_only_to_the_token_and_the_probability() -> None:
    def invariance(alone: Trace, together: Trace) -> tuple[bool, float]:
        found = text_measure.batch_invariance([alone], [together, trace_of([8])], str_answer, 16)
        return found.invariant, found.changed

    same = trace_of([1, 2])
    assert invariance(same, same) == (True, 0)
    assert invariance(same, trace_of([1, 2], logprob=-0.5001)) == (True, 0)
    assert invariance(same, trace_of([1, 2], logprob=-0.6)) == (False, 0)
    assert invariance(same, trace_of([1, 3])) == (False, 1)
    assert invariance(same, trace_of([1, 2], ended=False)) == (False, 0)


def str_answer(text: str) -> Any:
    from fettle.extract import Answer

    return Answer(text)


def test_right_answers_are_read_as_texts_are() -> None:
    share = text_measure.right_share
    assert share(["a", "b"], None, str_answer) is None
    assert share(["a", "b", "c"], ["a", "x", None], str_answer) == 0.5
    assert share(["a"], [None], str_answer) is None


def test_recipes_that_cannot_be_here_have_a_reason(made: tuple[OptimizeConfig, Family]) -> None:
    reasons = {item.id: item.reason for item in made[1].manifest.not_built}
    assert {"torch-bf16-cuda", "sparse-2of4"} <= set(reasons)
    assert not set(recipes.CUDA_RECIPES[:3]) & set(reasons)
