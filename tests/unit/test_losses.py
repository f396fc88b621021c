"""The losses against numpy and brute force, in float64 where it matters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from optimize import losses

TOLERANCE = 1e-5


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def pair(random: np.random.Generator, *shape: int, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    return random.normal(0, spread, shape), random.normal(0, spread, shape)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_single_label(random, temperature):
    student, teacher = pair(random, 6, 5)
    known, said = softmax(teacher / temperature), softmax(student / temperature)
    expected = temperature**2 * (known * np.log(known / said)).sum(axis=1).mean()
    assert float(losses.soft_single_label(tensor(student), tensor(teacher), temperature)) == pytest.approx(
        expected, rel=TOLERANCE
    )
    assert float(losses.soft_single_label(tensor(teacher), tensor(teacher), temperature)) == pytest.approx(0, abs=1e-6)


def test_the_gradient_of_soft_labels_keeps_its_size_at_high_temperatures(random):
    student, teacher = pair(random, 6, 5)

    def gradient(temperature: float) -> torch.Tensor:
        values = tensor(student).requires_grad_()
        losses.soft_single_label(values, tensor(teacher), temperature).backward()
        assert values.grad is not None
        return values.grad

    # In the limit it is the difference of the centred logits, divided by labels and rows.
    gap = student - student.mean(1, keepdims=True) - teacher + teacher.mean(1, keepdims=True)
    assert np.allclose(gradient(1000.0).numpy(), gap / 5 / 6, atol=2e-3)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_multi_label(random, temperature):
    student, teacher = pair(random, 6, 3)
    known, said = (1 / (1 + np.exp(-values / temperature)) for values in (teacher, student))
    expected = -(known * np.log(said) + (1 - known) * np.log(1 - said)).mean() * temperature**2
    assert float(losses.soft_multi_label(tensor(student), tensor(teacher), temperature)) == pytest.approx(
        expected, rel=TOLERANCE
    )
    values = tensor(teacher).requires_grad_()
    losses.soft_multi_label(values, tensor(teacher), temperature).backward()
    assert values.grad is not None
    assert float(values.grad.abs().max()) < 1e-6


def test_soft_regression_is_in_units_of_the_spread(random):
    student, teacher = pair(random, 6, 2)
    expected = (((student - teacher) / 4) ** 2).mean()
    assert float(losses.soft_regression(tensor(student), tensor(teacher), 4.0)) == pytest.approx(
        expected, rel=TOLERANCE
    )


def test_cosine_distance(random):
    student, teacher = pair(random, 6, 8)
    cosines = (student * teacher).sum(1) / np.linalg.norm(student, axis=1) / np.linalg.norm(teacher, axis=1)
    value = losses.cosine_distance(tensor(student), tensor(teacher))
    assert float(value) == pytest.approx(1 - cosines.mean(), rel=TOLERANCE)
    assert float(losses.cosine_distance(tensor(3 * teacher), tensor(teacher))) == pytest.approx(0, abs=1e-6)


def test_neighbours_by_brute_force_and_with_another_width(random):
    student, teacher = random.normal(size=(5, 6)), random.normal(size=(5, 9))

    def nearness(vectors: np.ndarray, row: int) -> np.ndarray:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return softmax(np.array([unit[row] @ unit[other] for other in range(5) if other != row]) / 0.2)

    terms = []
    for row in range(5):
        known, said = nearness(teacher, row), nearness(student, row)
        terms.append((known * np.log(known / said)).sum())
    value = losses.neighbours(tensor(student), tensor(teacher), 0.2)
    assert float(value) == pytest.approx(np.mean(terms), rel=TOLERANCE)


def test_a_row_alone_has_no_neighbours(random):
    student = tensor(random.normal(size=(1, 4))).requires_grad_()
    value = losses.neighbours(student, tensor(random.normal(size=(1, 4))))
    value.backward()
    assert float(value.detach()) == 0.0
    assert student.grad is not None
    assert not student.grad.any()


def test_hidden_states_by_brute_force(random):
    student, teacher = pair(random, 3, 4, 8)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    terms = []
    for row, token in zip(*np.nonzero(mask), strict=True):
        mine, its = student[row, token], teacher[row, token]
        terms.append(((mine / np.linalg.norm(mine) - its / np.linalg.norm(its)) ** 2).sum())
    value = losses.hidden_states(tensor(student), tensor(teacher), torch.from_numpy(mask))
    assert float(value) == pytest.approx(np.mean(terms), rel=TOLERANCE)


def relations_of(states: np.ndarray, heads: int) -> np.ndarray:
    """One text without padding, [length, width] to [heads, length, length], head by head."""
    normal = (states - states.mean(1, keepdims=True)) / np.sqrt(states.var(1, keepdims=True) + 1e-5)
    size = states.shape[1] // heads
    parts = [normal[:, head * size : (head + 1) * size] for head in range(heads)]
    return np.stack([softmax(part @ part.T / math.sqrt(size)) for part in parts])


def test_token_relations_by_brute_force_with_another_width(random):
    student, teacher = random.normal(size=(3, 5, 8)), random.normal(size=(3, 5, 12))
    lengths = [5, 3, 1]
    mask = torch.tensor([[1] * length + [0] * (5 - length) for length in lengths])
    terms: list[float] = []
    for row, length in enumerate(lengths):
        known, said = (relations_of(states[row, :length], 4) for states in (teacher, student))
        terms += list((known * np.log(known / said)).sum(axis=-1).mean(axis=0))
    value = losses.token_relations(tensor(student), tensor(teacher), mask, 4)
    assert float(value) == pytest.approx(np.mean(terms), rel=TOLERANCE)


def test_padding_changes_neither_relations_nor_states_nor_their_gradients(random):
    student, teacher = pair(random, 2, 4, 8)
    junk = random.normal(0, 100, (2, 3, 8))

    def both(padded: bool) -> tuple[float, torch.Tensor]:
        mine, its = (np.concatenate([x, junk], 1) if padded else x for x in (student, teacher))
        mask = torch.tensor([[1, 1, 1, 1] + [0, 0, 0] * padded] * 2)
        states = tensor(mine).requires_grad_()
        value = losses.token_relations(states, tensor(its), mask, 2) + losses.hidden_states(states, tensor(its), mask)
        value.backward()
        assert states.grad is not None
        assert not states.grad[:, 4:].any()
        return float(value.detach()), states.grad[:, :4]

    (plain, gradient), (padded, padded_gradient) = both(False), both(True)
    assert padded == pytest.approx(plain, rel=1e-6)
    assert torch.allclose(gradient, padded_gradient, atol=1e-7)


@pytest.mark.parametrize("loss", [losses.neighbours, losses.cosine_distance])
def test_zero_vectors_give_no_nan(loss):
    student = torch.zeros(3, 4, requires_grad=True)
    value = loss(student, torch.ones(3, 4))
    value.backward()
    assert student.grad is not None
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("student", "teacher", "heads"), [(384, 384, 12), (192, 384, 12), (320, 384, 8), (32, 32, 8), (7, 12, 1)]
)
def test_relation_heads_divide_both_widths(student, teacher, heads):
    assert losses.relation_heads(student, teacher) == heads


@pytest.mark.parametrize(
    ("student", "teacher", "layers"), [(3, 6, [2, 4, 6]), (1, 6, [6]), (6, 6, [1, 2, 3, 4, 5, 6]), (4, 2, [1, 1, 2, 2])]
)
def test_uniform_layers_end_at_the_last(student, teacher, layers):
    assert losses.uniform_layers(student, teacher) == layers


def test_weighted_sum():
    parts = [torch.tensor(2.0), torch.tensor(3.0)]
    assert float(losses.weighted_sum(parts, [0.5, 2.0])) == 7.0
