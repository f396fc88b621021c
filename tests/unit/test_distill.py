"""Distillation on tiny random models: students learn, exits too, the best weights stay, and a seed decides it all."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from fettle.answers import disagreements
from fettle.errors import PassError, UsageError
from fettle.manifest import TaskKind, TokenizerSpec
from fettle.rows import Row
from optimize.batches import by_length, one_epoch, shortened, tensors, training_batches
from optimize.distill import DistillData, DistillSettings, distill
from optimize.load import Reference, load_reference
from optimize.measure import torch_values
from tests.unit import tiny_models
from workers.torch_encoder import Scorer, pooled

SETTINGS = DistillSettings(epochs=6, batch_rows=16, learning_rate=1e-3, evaluations=4, patience=4, bf16=False)
SPEC = TokenizerSpec(max_length=32, vocabulary=tiny_models.VOCABULARY, pad_id=tiny_models.PAD, segments=False)


def some_rows(count: int, seed: int, longest: int = 16) -> list[Row]:
    random = np.random.default_rng(seed)
    return [
        Row(random.integers(len(tiny_models.SPECIAL), tiny_models.VOCABULARY, length).astype(np.int32))
        for length in random.integers(3, longest + 1, count)
    ]


def data_of(reference: Reference, *, train: int = 480, tuning: int = 160, scorer: bool = False) -> DistillData:
    rows, tuning_rows = some_rows(train, 1), some_rows(tuning, 2)
    return DistillData(
        rows=rows,
        teacher=torch_values(reference.model, reference, rows, lambda done: None),
        tuning_rows=tuning_rows,
        tuning_teacher=torch_values(reference.model, reference, tuning_rows, lambda done: None),
        task=reference.task,
        tokenizer=reference.tokenizer,
        scorer=reference.model if scorer else None,
    )


def student_of(reference: Reference, noise: float = 0.2) -> Scorer:
    """The teacher with a damaged last layer and head: something that there is a way back from."""
    student = copy.deepcopy(reference.model).requires_grad_(True)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "layer.1.output" in name or "classifier" in name:
                weight += noise * torch.randn(weight.shape, generator=generator)
    return student


def run(student: nn.Module, data: DistillData, **settings: object):
    return distill(student, data, SETTINGS.model_copy(update=settings), lambda done: None)


def weights_of(student: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in student.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    return load_reference(str(tiny_models.classifier(tmp_path_factory.mktemp("bert"))))


@pytest.fixture(scope="module")
def data(reference) -> DistillData:
    return data_of(reference)


class TwoExits(nn.Module):
    """A backbone with a linear head on its first layer and one on its last."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = copy.deepcopy(reference.model.model.bert).requires_grad_(True)
        self.heads = nn.ModuleList(nn.Linear(32, reference.task.width) for _ in range(2))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None = None) -> list[torch.Tensor]:
        states = self.model(ids, mask, types, output_hidden_states=True).hidden_states[1:]
        return [head(pooled(state, mask, "mean")).float() for head, state in zip(self.heads, states, strict=True)]


# Batches.


def test_every_row_once_an_epoch_in_batches_of_like_length():
    lengths = [len(row) for row in some_rows(1000, 3, longest=60)]
    batches = one_epoch(lengths, 16, np.random.default_rng(0))
    assert sorted(index for batch in batches for index in batch) == list(range(1000))
    assert [len(batch) for batch in batches].count(16) == 62
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert padded < 1.03 * sum(lengths)
    longest = [max(lengths[index] for index in batch) for batch in batches]
    assert longest != sorted(longest)


def test_the_order_follows_from_the_seed_and_changes_from_epoch_to_epoch():
    lengths = [len(row) for row in some_rows(64, 3)]

    def first(seed: int, count: int) -> list[list[int]]:
        batches = training_batches(lengths, 16, seed)
        return [next(batches).tolist() for _ in range(count)]

    assert first(0, 8) == first(0, 8)
    assert first(0, 4) != first(1, 4)
    assert first(0, 8)[4:] != first(0, 4)
    assert not list(training_batches([], 16, 0))


def test_answers_are_batched_by_length():
    lengths = [5, 1, 3, 2, 4]
    assert [batch.tolist() for batch in by_length(lengths, 2)] == [[1, 3], [2, 4], [0]]


def test_a_shortened_row_keeps_its_end():
    row = Row(np.arange(10, dtype=np.int32), np.arange(10, dtype=np.int8))
    short = shortened(row, 4)
    assert short.ids.tolist() == [0, 1, 2, 9]
    assert short.type_ids is not None
    assert short.type_ids.tolist() == [0, 1, 2, 9]
    assert shortened(row, 10) is row


@pytest.mark.parametrize("segments", [False, True])
def test_token_types_only_for_models_that_read_them(segments):
    batch = tensors(some_rows(3, 0), SPEC.model_copy(update={"segments": segments}), torch.device("cpu"))
    assert len(batch) == 2 + segments
    assert {tensor.dtype for tensor in batch} == {torch.int64}


# Learning.


def test_a_student_learns_to_answer_as_its_teacher(reference, data):
    student = student_of(reference)
    result = run(student, data)
    before, after = result.history[0].disagreement, result.best.disagreement
    assert before > 0.5
    assert after < before / 2
    assert result.steps == result.planned_steps == 180
    assert result.epochs == 6
    answers = torch_values(student, reference, data.tuning_rows, lambda done: None)
    assert disagreements(answers, data.tuning_teacher, data.task).mean() == pytest.approx(after)
    assert not student.training


def test_several_labels_learn(tmp_path):
    reference = load_reference(str(tiny_models.classifier(tmp_path, problem="multi_label_classification", width=2)))
    result = run(student_of(reference), data_of(reference))
    assert result.best.disagreement < result.history[0].disagreement / 2


def test_regression_learns(tmp_path):
    reference = load_reference(str(tiny_models.classifier(tmp_path, problem="regression", width=2)))
    result = run(student_of(reference), data_of(reference))
    # Within a twentieth of the spread is out of reach here, so the squared error tells.
    assert result.best.distance < result.history[0].distance / 10


def test_embeddings_learn_even_while_all_disagree(tmp_path):
    reference = load_reference(str(tiny_models.sentence_transformer(tmp_path)))
    result = run(student_of(reference), data_of(reference), epochs=2)
    assert reference.task.kind is TaskKind.EMBED
    assert result.history[0].disagreement > 0.9
    assert result.best.distance < result.history[0].distance / 4
    assert result.best.step > 0
    lenient = dataclasses.replace(data_of(reference), cosine_floor=0.0)
    assert run(student_of(reference), lenient, epochs=0.1).history[0].disagreement < 0.1


def test_bfloat16_learns_too(reference, data):
    result = run(student_of(reference), data, bf16=True, epochs=3)
    assert result.best.disagreement < result.history[0].disagreement / 2


def test_every_exit_is_trained(reference, data):
    student = TwoExits(reference)
    result = run(student, data, exit_weights=[1.0, 3.0])
    before, after = result.history[0].disagreements, result.best.disagreements
    assert len(after) == 2
    assert all(new < 0.7 * old for new, old in zip(after, before, strict=True))
    assert result.best.disagreement == pytest.approx((after[0] + 3 * after[1]) / 4)


def test_frozen_parameters_stay_and_the_others_move(reference, data):
    student = TwoExits(reference)
    student.model.requires_grad_(False)
    before = weights_of(student)
    result = run(student, data, epochs=2)
    after = weights_of(student)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("model."))
    assert not any(torch.equal(before[name], after[name]) for name in before if name.startswith("heads."))
    assert result.best.disagreement < result.history[0].disagreement


# Hidden states and relations.


@pytest.mark.parametrize("name", tiny_models.CLASSIFIERS)
def test_hidden_losses_on_every_architecture(tmp_path, name):
    reference = load_reference(str(tiny_models.classifier(tmp_path, name)))
    data = data_of(reference, train=48, tuning=16, scorer=True)
    student = damaged_everywhere(reference)
    inner = {"soft_weight": 0.0, "hidden_weight": 1.0, "relation_weight": 1.0}
    result = run(student, data, epochs=4, learning_rate=1e-3, **inner)
    losses = [evaluation.loss for evaluation in result.history[1:]]
    assert losses[-1] < 0.9 * losses[0]
    # The teacher is as it was: no hook, no attention of another kind.
    for model in (student.model, reference.model.model):
        assert model(**dict(zip(("input_ids", "attention_mask"), batch_of(data), strict=False))).hidden_states is None
    again = torch_values(reference.model, reference, data.rows, lambda done: None)
    assert np.array_equal(again, data.teacher)


def damaged_everywhere(reference: Reference) -> Scorer:
    """Every weight moved a little, whatever the architecture calls it."""
    student = copy.deepcopy(reference.model).requires_grad_(True)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return student


def batch_of(data: DistillData) -> tuple[torch.Tensor, ...]:
    return tensors(data.rows[:4], data.tokenizer, torch.device("cpu"))


def test_a_student_of_one_shared_layer_and_a_narrow_one(reference):
    data = data_of(reference, train=96, tuning=32, scorer=True)
    shared = student_of(reference, noise=0.0)
    encoder = shared.model.bert.encoder
    encoder.layer = nn.ModuleList([encoder.layer[0]] * 2)
    config = copy.deepcopy(reference.config)
    config.hidden_size, config.num_hidden_layers = 16, 1
    torch.manual_seed(0)
    narrow = Scorer(type(reference.model.model)(config), reference.task)
    for student in (shared, narrow):
        result = run(student, data, epochs=4, hidden_weight=1.0, relation_weight=1.0)
        losses = [evaluation.loss for evaluation in result.history[1:]]
        assert losses[-1] < 0.8 * losses[0]
    assert shared.model.bert.encoder.layer[0] is shared.model.bert.encoder.layer[1]
    assert narrow(*batch_of(data)).shape == (4, reference.task.width)


def test_a_perfect_student_has_no_hidden_loss(reference):
    data = data_of(reference, train=16, tuning=16, scorer=True)
    exact = student_of(reference, noise=0.0)
    once = {"epochs": 1, "evaluations": 1, "hidden_weight": 1.0, "relation_weight": 1.0}
    assert run(exact, data, **once).history[1].loss == pytest.approx(0, abs=1e-5)
    crossed = student_of(reference, noise=0.0)
    assert run(crossed, data, layer_map=[2, 1], **once).history[1].loss > 0.1


# Determinism, stopping and keeping the best.


def test_the_same_seed_gives_the_same_weights_bit_for_bit(reference, data):
    def trained(seed: int, start: int) -> tuple[dict, list]:
        torch.manual_seed(start)
        student = student_of(reference)
        result = run(student, data, epochs=1, seed=seed, dropout=True, bf16=True)
        return weights_of(student), [evaluation.loss for evaluation in result.history]

    (first, losses), (again, losses_again), (other, _) = trained(3, 0), trained(3, 1), trained(4, 0)
    assert losses == losses_again
    assert equal(first, again)
    assert not equal(first, other)


def test_the_global_random_state_is_left_alone(reference, data):
    before = torch.random.get_rng_state()
    run(student_of(reference), data, epochs=0.2, dropout=True)
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_that_does_harm_stops_early_and_is_undone(reference, data):
    student = student_of(reference, noise=0.001)
    before = weights_of(student)
    result = run(student, data, epochs=20, learning_rate=0.5, evaluations=20, patience=3)
    assert result.stopped_early
    assert result.best.step == 0
    assert len(result.history) == 4
    assert result.steps == 90 < result.planned_steps
    assert result.epochs == 3
    assert equal(before, weights_of(student))


def test_the_weights_kept_are_those_of_the_best_evaluation(reference, data):
    student = student_of(reference)
    result = run(student, data, epochs=3, evaluations=6, learning_rate=0.02, tuning_rows=64, patience=6)
    assert result.best == min(result.history, key=lambda evaluation: (evaluation.disagreement, evaluation.distance))
    again = run(student, data, epochs=0.05, evaluations=1, learning_rate=1e-12, tuning_rows=64)
    assert again.history[0].disagreements == result.best.disagreements
    assert again.history[0].distance == pytest.approx(result.best.distance)


def test_a_loss_that_is_no_number_is_refused(reference, data):
    student = student_of(reference)
    with torch.no_grad():
        next(student.parameters())[:] = float("nan")
    with pytest.raises(PassError, match="learning_rate"):
        run(student, data)


def test_a_teacher_without_finite_answers_is_refused(reference, data):
    broken = data.teacher.copy()
    broken[3, 1] = np.inf
    with pytest.raises(PassError, match="not finite"):
        run(student_of(reference), dataclasses.replace(data, teacher=broken))


def test_both_kinds_of_attention_train_alike(reference, data, monkeypatch):
    plain = run(student_of(reference), data, epochs=0.5)
    monkeypatch.setattr("optimize.distill.PLAIN_ATTENTION_TOKENS", 0)
    fused = run(student_of(reference), data, epochs=0.5)
    assert [entry.loss for entry in plain.history[1:]] == pytest.approx(
        [entry.loss for entry in fused.history[1:]], rel=1e-3
    )


def test_hooks_and_attention_are_put_back_after_a_failure(reference):
    data = data_of(reference, train=32, tuning=16, scorer=True)
    student = student_of(reference)
    before = student.model.config._attn_implementation
    with pytest.raises(UsageError, match="layer_map"):
        run(student, data, hidden_weight=1.0, layer_map=[1, 3])
    assert student.model.config._attn_implementation == before == "sdpa"
    assert not reference.model.model._forward_hooks
    assert not reference.model.model._forward_pre_hooks


# What does not fit, and what is recorded.


def test_what_does_not_fit_is_refused(reference, data):
    student = student_of(reference)
    with pytest.raises(UsageError, match="scorer"):
        run(student, data, hidden_weight=1.0)
    with pytest.raises(UsageError, match="exit_weights"):
        run(student, data, exit_weights=[1.0, 1.0])
    with pytest.raises(UsageError, match="requires a gradient"):
        run(copy.deepcopy(reference.model), data)
    with pytest.raises(UsageError, match="one row for each"):
        run(student, dataclasses.replace(data, rows=data.rows[1:]))
    with pytest.raises(UsageError, match="give more data"):
        run(student, dataclasses.replace(data, rows=[]))
    with pytest.raises(UsageError, match="transformers model"):
        run(nn.Linear(2, 2), data_of(reference, train=16, tuning=16, scorer=True), relation_weight=1.0)


def test_settings_and_result_are_plain_json(reference, data):
    dumped = SETTINGS.model_dump(mode="json")
    assert DistillSettings.model_validate_json(json.dumps(dumped)) == SETTINGS
    done: list[float] = []
    result = distill(student_of(reference), data, SETTINGS.model_copy(update={"epochs": 1.0}), done.append)
    assert json.loads(json.dumps(result.model_dump(mode="json"), allow_nan=False))["steps"] == 30
    assert done == sorted(done)
    assert done[-1] == 1.0
