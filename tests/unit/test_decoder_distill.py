"""Distillation of language models: examples, the teacher's answers, the loss, training that goes on after a kill."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fettle.errors import PassError, UsageError
from optimize import decoder_resume, losses
from optimize.decoder_distill import TextDistillData, TextDistillResult, TextDistillSettings, distill_decoder
from optimize.decoder_evaluate import Teaching, agreement
from optimize.decoder_examples import Example, example_batch, examples_of, prompt_batches
from optimize.decoder_objective import TextObjective, logits_at, token_loss
from optimize.decoder_prune import keep_decoder_layers
from optimize.decoder_resume import Notebook, Written
from optimize.decoder_samples import generated
from tests.unit import tiny_decoders

END, PAD = tiny_decoders.END_ID, tiny_decoders.PAD_ID
LONGEST = 6
DEVICE = torch.device("cpu")


def prompts(count: int, seed: int = 0) -> list[Any]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 60, random.integers(2, 12)).astype(np.int32) for _ in range(count)]


def answered(model: Any, rows: list[Any], **settings: Any) -> list[Example]:
    answers = generated(model, rows, end_ids=[END], pad_id=PAD, max_tokens=LONGEST, **settings)
    return examples_of(rows, answers)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return tiny_decoders.tiny_decoder("llama")


# Examples.


def test_batches_say_where_the_next_token_is_learnt():
    examples = [Example(np.array([5, 6, 7, 8, 9], np.int32), 3), Example(np.array([1, 2, 3], np.int32), 1)]
    batch = example_batch(examples, 99, DEVICE)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 99, 99]]
    assert batch.targets[batch.answers].tolist() == [8, 9, 2, 3]
    assert batch.targets[batch.prompts].tolist() == [6, 7]


def test_an_answer_may_be_given_its_end():
    [example] = examples_of([np.array([1, 2], np.int32)], [np.array([3], np.int32)], END)
    assert (example.ids.tolist(), example.prompt, example.answer.tolist()) == ([1, 2, 3, END], 2, [3, END])


def test_batches_to_measure_on_hold_every_row_once():
    examples = examples_of(prompts(7), prompts(7, 1))
    for answers in (True, False):
        seen = []
        for ids, mask in prompt_batches(examples, 3, PAD, answers=answers):
            seen += [tuple(row[inside.bool()].tolist()) for row, inside in zip(ids, mask, strict=True)]
        wanted = [each.ids if answers else each.ids[: each.prompt] for each in examples]
        assert sorted(seen) == sorted(tuple(row.tolist()) for row in wanted)


# Answers.


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_greedy_answers_are_those_of_each_prompt_alone(name: str):
    model = tiny_decoders.tiny_decoder(name)
    rows = prompts(9)
    answers = generated(model, rows, end_ids=[END], pad_id=PAD, max_tokens=LONGEST, batch_rows=4)
    for row, answer in zip(rows, answers, strict=True):
        ids = torch.from_numpy(row.astype(np.int64))[None]
        for token in answer:
            assert int(model(ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert len(answer) == LONGEST or answer[-1] == END


def test_answers_end_with_the_first_end_token(teacher: Any):
    [free] = generated(teacher, prompts(1), end_ids=[], pad_id=PAD, max_tokens=LONGEST)
    end = int(free[2])
    [answer] = generated(teacher, prompts(1), end_ids=[END, end], pad_id=PAD, max_tokens=LONGEST)
    assert answer.tolist() == free[: free.tolist().index(end) + 1].tolist()


def test_samples_follow_the_distribution_and_the_seed(teacher: Any):
    [row] = prompts(1)
    many = [row] * 4000
    first = generated(teacher, many, end_ids=[], pad_id=PAD, max_tokens=1, temperature=2.0, batch_rows=4000)
    counts = np.bincount([int(answer[0]) for answer in first], minlength=tiny_decoders.VOCABULARY)
    logits = teacher(torch.from_numpy(row.astype(np.int64))[None]).logits[0, -1]
    expected = torch.softmax(logits / 2.0, dim=-1).numpy()
    assert np.abs(counts / 4000 - expected).max() < 5 * math.sqrt(0.25 / 4000)
    state = torch.get_rng_state()
    again, other = (
        generated(teacher, many[:50], end_ids=[], pad_id=PAD, max_tokens=3, temperature=2.0, seed=seed)
        for seed in (1, 2)
    )
    same = generated(teacher, many[:50], end_ids=[], pad_id=PAD, max_tokens=3, temperature=2.0, seed=1)
    assert [row.tolist() for row in again] == [row.tolist() for row in same]
    assert [row.tolist() for row in again] != [row.tolist() for row in other]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_checkpoints_own_penalties_do_not_count(teacher: Any):
    plain = generated(teacher, prompts(5), end_ids=[END], pad_id=PAD, max_tokens=LONGEST)
    model = copy.deepcopy(teacher)
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, top_k=1, max_length=3)
    before = model.generation_config
    penalised = generated(model, prompts(5), end_ids=[END], pad_id=PAD, max_tokens=LONGEST)
    assert [row.tolist() for row in penalised] == [row.tolist() for row in plain]
    assert model.generation_config is before


# The loss.


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "qwen3"])
def test_logits_at_chosen_places_are_those_of_the_whole(name: str):
    model = tiny_decoders.tiny_decoder(name)
    batch = example_batch(examples_of(prompts(4), prompts(4, 1)), PAD, DEVICE)
    mask = batch.ids != PAD
    whole = model(input_ids=batch.ids, attention_mask=mask.long()).logits
    chosen = logits_at(model, batch.ids, batch.answers)
    torch.testing.assert_close(chosen, whole[batch.answers], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(batch.ids).logits.shape, whole.shape)


def test_reverse_divergence_by_its_definition():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    said, known = ((values / 2).softmax(dim=-1) for values in (student, teacher))
    expected = 4 * (said * (said / known).log()).sum(dim=-1).mean()
    torch.testing.assert_close(losses.reverse_single_label(student, teacher, 2.0), expected)
    assert float(losses.reverse_single_label(teacher, teacher, 1.0)) == pytest.approx(0, abs=1e-6)


def test_the_tokens_loss_is_the_sum_of_what_the_settings_ask_for():
    student, teacher, targets = torch.randn(5, 7), torch.randn(5, 7), torch.randint(0, 7, (5,))
    forward = losses.soft_single_label(student, teacher, 1.0)
    reverse = losses.reverse_single_label(student, teacher, 1.0)
    hard = functional.cross_entropy(student, targets)
    for settings, expected in (
        (TextDistillSettings(), forward),
        (TextDistillSettings(reverse=1.0), reverse),
        (TextDistillSettings(reverse=0.25, hard_weight=0.5), 0.75 * forward + 0.25 * reverse + 0.5 * hard),
    ):
        torch.testing.assert_close(token_loss(student, teacher, targets, settings), expected)
    assert float(token_loss(student[:0], teacher[:0], targets[:0], TextDistillSettings())) == 0.0


def test_only_answers_count_unless_prompts_are_weighed(teacher: Any):
    student = tiny_decoders.tiny_decoder("llama", seed=1)
    batch = example_batch(examples_of(prompts(4), prompts(4, 1)), PAD, DEVICE)
    known, said = (model(batch.ids).logits.flatten(0, 1) for model in (teacher, student))
    on_answers, on_prompts = (
        losses.soft_single_label(said[chosen.flatten()], known[chosen.flatten()], 1.0)
        for chosen in (batch.answers, batch.prompts)
    )
    alone = TextObjective(student, teacher, TextDistillSettings(bf16=False))(batch)
    both = TextObjective(student, teacher, TextDistillSettings(bf16=False, prompt_weight=0.5))(batch)
    torch.testing.assert_close(alone, on_answers, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both, on_answers + 0.5 * on_prompts, rtol=1e-4, atol=1e-4)


# Evaluation.


def test_agreement_tells_the_share_of_tokens_and_of_texts(teacher: Any):
    examples = answered(teacher, prompts(20))
    found = agreement(teacher, Teaching(teacher, examples, PAD))
    assert (found.tokens, found.texts) == (1.0, 1.0)
    assert found.divergence == pytest.approx(0, abs=1e-6)
    # A wrong token in every second answer, its last, where nothing follows.
    broken = [
        Example(np.append(each.ids[:-1], (each.ids[-1] + 1) % 60).astype(np.int32), each.prompt) if row % 2 else each
        for row, each in enumerate(examples)
    ]
    found = agreement(teacher, Teaching(teacher, broken, PAD))
    tokens = sum(len(each.answer) for each in examples)
    assert (found.texts, found.tokens) == (0.5, pytest.approx(1 - 10 / tokens))


# Training.


def small(teacher: Any) -> Any:
    return keep_decoder_layers(teacher, [0, 2]).requires_grad_(True)


def lessons(teacher: Any) -> TextDistillData:
    return TextDistillData(teacher, answered(teacher, prompts(96)), answered(teacher, prompts(32, 1)), PAD)


SETTINGS = TextDistillSettings(epochs=4, batch_rows=16, learning_rate=3e-3, evaluations=4, patience=4, bf16=False)


def train(teacher: Any, notes: Path | None = None, **changes: Any) -> tuple[Any, TextDistillResult]:
    student = small(teacher)
    settings = SETTINGS.model_copy(update=changes)
    return student, distill_decoder(student, lessons(teacher), settings, lambda _: None, notes)


def weights(model: Any) -> list[Any]:
    return [weight.detach().clone() for weight in model.parameters()]


def equal(left: list[Any], right: list[Any]) -> bool:
    return all(torch.equal(mine, its) for mine, its in zip(left, right, strict=True))


@pytest.mark.parametrize("changes", [{}, {"reverse": 0.5, "prompt_weight": 0.2}, {"bf16": True, "hard_weight": 0.5}])
def test_a_student_comes_nearer_to_its_teacher(teacher: Any, changes: dict[str, Any]):
    student, result = train(teacher, **changes)
    assert result.best.divergence < 0.9 * result.history[0].divergence
    assert result.best.disagreement <= result.history[0].disagreement
    assert result.steps == result.planned_steps == 24
    assert result.epochs == 4
    assert not student.training
    data = lessons(teacher)
    again = agreement(student, Teaching(teacher, data.tuning, PAD, bool(changes.get("bf16"))))
    assert again.divergence == pytest.approx(result.best.divergence, rel=1e-3)


@pytest.fixture(scope="module")
def whole(teacher: Any) -> Any:
    return train(teacher)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state(teacher: Any, whole: Any):
    state = torch.get_rng_state()
    first, _ = whole
    second, _ = train(teacher)
    other, _ = train(teacher, seed=1)
    assert equal(weights(first), weights(second))
    assert not equal(weights(first), weights(other))
    assert torch.equal(torch.get_rng_state(), state)


class KilledError(Exception):
    pass


# Within the first round between two evaluations, at its last step, right after it.
@pytest.mark.parametrize("killed_after", [2, 6, 7])
def test_a_killed_training_goes_on_to_the_same_weights(
    teacher: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
):
    student, expected = whole
    monkeypatch.setattr(decoder_resume, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(decoder_resume, "MOST_SHARE", 1e9)
    written = Notebook.write
    count = 0

    def write_and_die(self: Notebook, state: Written) -> None:
        nonlocal count
        written(self, state)
        count += 1
        if count == killed_after:
            raise KilledError

    monkeypatch.setattr(Notebook, "write", write_and_die)
    with pytest.raises(KilledError):
        train(teacher, tmp_path / "notes")
    resumed, result = train(teacher, tmp_path / "notes")
    assert equal(weights(resumed), weights(student))
    assert [entry.model_dump() for entry in result.history] == [entry.model_dump() for entry in expected.history]
    assert (result.steps, result.epochs) == (expected.steps, expected.epochs)


def test_a_damaged_notebook_counts_as_none(tmp_path: Path):
    notebook = Notebook(tmp_path / "notes")
    assert notebook.read() is None
    notebook.write(Written({"a": torch.ones(2)}, {"steps": 3}))
    again = notebook.read()
    assert again is not None
    assert again.figures == {"steps": 3}
    (tmp_path / "notes" / decoder_resume.TENSORS).write_bytes(b"x")
    assert notebook.read() is None
    (tmp_path / "notes" / decoder_resume.FIGURES).write_text("{")
    assert notebook.read() is None


def test_a_student_is_never_made_worse(teacher: Any):
    student = copy.deepcopy(teacher).requires_grad_(True)
    before = weights(student)
    settings = SETTINGS.model_copy(update={"learning_rate": 0.5, "patience": 1})
    result = distill_decoder(student, lessons(teacher), settings, lambda _: None)
    assert result.best.step == 0
    assert result.stopped_early
    assert equal(weights(student), before)


def test_only_what_requires_a_gradient_is_trained(teacher: Any):
    student = small(teacher)
    student.get_input_embeddings().requires_grad_(False)
    before = student.get_input_embeddings().weight.clone()
    distill_decoder(student, lessons(teacher), SETTINGS.model_copy(update={"epochs": 1}), lambda _: None)
    assert torch.equal(student.get_input_embeddings().weight, before)
    assert not any(weight.grad is not None for weight in teacher.parameters())


def test_what_does_not_fit_is_refused(teacher: Any):
    data = lessons(teacher)
    with pytest.raises(UsageError, match="requires a gradient"):
        distill_decoder(small(teacher).requires_grad_(False), data, SETTINGS, lambda _: None)
    empty = TextDistillData(teacher, data.examples, [], PAD)
    with pytest.raises(UsageError, match="tuning examples"):
        distill_decoder(small(teacher), empty, SETTINGS, lambda _: None)
    other = tiny_decoders.tiny_decoder("llama", vocab_size=300).requires_grad_(True)
    with pytest.raises(UsageError, match="vocabularies of 300 and"):
        distill_decoder(other, data, SETTINGS, lambda _: None)
    broken = small(teacher)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(PassError, match="no longer a number"):
        distill_decoder(broken, data, SETTINGS, lambda _: None)
