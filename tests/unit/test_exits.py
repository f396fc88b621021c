"""Exit heads: what they read, that they learn the teacher's answer, and that they come back from their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fettle.errors import PassError
from fettle.manifest import Head, Task, TaskKind
from fettle.rows import Row
from optimize.exits import (
    ExitHead,
    Heads,
    HeadSettings,
    Lesson,
    MultiExit,
    layer_count,
    load_heads,
    reads_first_token,
    save_heads,
    train_frozen_heads,
)
from optimize.load import Reference, load_reference
from optimize.measure import reference_values
from tests.unit import tiny_models

SETTINGS = HeadSettings(epochs=15, batch=16)


def some_rows(count: int, seed: int = 0) -> list[Row]:
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 14, count)
    return [Row(random.integers(5, tiny_models.VOCABULARY, length).astype(np.int32)) for length in lengths]


def lesson(reference: Reference, count: int, seed: int) -> Lesson:
    rows = some_rows(count, seed)
    return Lesson(rows, reference_values(reference, rows, lambda done: None))


def batch(reference: Reference) -> list[torch.Tensor]:
    ids = torch.randint(5, tiny_models.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return [ids, mask, torch.zeros_like(ids)][: 3 if reference.tokenizer.segments else 2]


def untrained(layers: list[int], *, first: bool) -> Heads:
    torch.manual_seed(0)
    return Heads(
        {layer: ExitHead(64 if first else 32, 4).eval() for layer in layers}, first, dict.fromkeys(layers, 0.25)
    )


def train(reference: Reference, layers: list[int], settings: HeadSettings = SETTINGS) -> Heads:
    return train_frozen_heads(
        reference.model, layers, lesson(reference, 160, 1), lesson(reference, 60, 2), reference.tokenizer, settings,
        lambda done: None,
    )  # fmt: skip


@pytest.fixture(scope="module", params=tiny_models.CLASSIFIERS)
def each(request, tmp_path_factory) -> Reference:
    return load_reference(str(tiny_models.classifier(tmp_path_factory.mktemp("m"), request.param)))


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Reference:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.SIZES, "num_hidden_layers", 3)
        return load_reference(str(tiny_models.classifier(tmp_path_factory.mktemp("bert"))))


def test_every_architecture_answers_at_its_exit_and_its_end(each):
    """Against the head applied by hand to the state that a hook sees."""
    assert layer_count(each.model) == 2
    assert reads_first_token(each.model, batch(each))
    heads = untrained([1], first=True)
    inputs = batch(each)
    with torch.inference_mode():
        states = each.model.model(
            **dict(zip(("input_ids", "attention_mask", "token_type_ids"), inputs, strict=False)),
            output_hidden_states=True,
        ).hidden_states
        exit_values, values = MultiExit(each.model, heads)(*inputs)
        # The mean of the embeddings of the tokens that are there, and the first token of the layer's output.
        entering = torch.stack([row[:count].mean(0) for row, count in zip(states[0], (5, 9, 9), strict=True)])
        expected = heads.by_layer[1](torch.cat([states[1][:, 0], entering], dim=1))
        assert torch.allclose(exit_values, expected, atol=1e-5)
        assert torch.allclose(values, each.model(*inputs), atol=1e-6)
    assert exit_values.dtype == values.dtype == torch.float32


def test_a_head_that_reads_the_mean_is_known(each):
    class MeanHead(nn.Module):
        """The encoder with another head: logits from the mean of all tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = each.model.model

        def get_input_embeddings(self) -> nn.Module:
            return self.inner.get_input_embeddings()

        def forward(self, **inputs):
            output = self.inner(**inputs)
            output.logits = output.hidden_states[-1].mean(dim=1)
            return output

    scorer = type(each.model)(MeanHead(), each.task)
    assert not reads_first_token(scorer, batch(each))


def test_mean_pooling_leaves_padding_out(bert):
    heads = untrained([1], first=False)
    ids, mask, types = batch(bert)
    with torch.inference_mode():
        padded = MultiExit(bert.model, heads)(ids, mask, types)[0][0]
        alone = MultiExit(bert.model, heads)(ids[:1, :5], mask[:1, :5], types[:1, :5])[0][0]
    assert torch.allclose(padded, alone, atol=1e-5)


def test_heads_learn_the_teachers_answer(bert):
    guess = train(bert, [1, 2], HeadSettings(epochs=1, learning_rate=1e-9))
    taught = train(bert, [1, 2])
    assert list(taught.by_layer) == [1, 2]
    assert taught.disagreement[2] < 0.7 * guess.disagreement[2]
    # Measured through the whole model, in float32 and without the cache.
    rows = lesson(bert, 60, 2)
    multi = MultiExit(bert.model, taught).eval()
    wrong = []
    for row, values in zip(rows.rows, rows.values, strict=True):
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        with torch.inference_mode():
            wrong.append([int(answer.argmax()) != values.argmax() for answer in multi(ids, torch.ones_like(ids))])
    shares = np.mean(wrong, axis=0)
    assert shares[-1] == 0
    assert abs(shares[1] - taught.disagreement[2]) <= 3 / 60


def test_the_backbone_stays_as_it_was(bert):
    before = {name: value.clone() for name, value in bert.model.state_dict().items()}
    train(bert, [1])
    assert all(torch.equal(value, before[name]) for name, value in bert.model.state_dict().items())
    assert not any(weight.requires_grad for weight in bert.model.parameters())


def test_the_seed_decides(bert):
    torch.manual_seed(1)
    first = train(bert, [1]).by_layer[1].state_dict()
    torch.manual_seed(2)
    second = train(bert, [1]).by_layer[1].state_dict()
    other = train(bert, [1], HeadSettings(epochs=15, batch=16, seed=1)).by_layer[1].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_several_labels_are_taught_each_for_itself(tmp_path):
    reference = load_reference(str(tiny_models.classifier(tmp_path, problem="multi_label_classification")))
    guess = train(reference, [1], HeadSettings(epochs=1, learning_rate=1e-9))
    assert train(reference, [1]).disagreement[1] < guess.disagreement[1]


def test_heads_come_back_from_their_files(bert, tmp_path):
    heads = untrained([1, 2], first=True)
    save_heads(heads, tmp_path)
    again = load_heads(tmp_path)
    assert (again.first_token, again.disagreement) == (True, {1: 0.25, 2: 0.25})
    states = torch.randn(5, 64)
    for layer in (1, 2):
        assert torch.equal(again.by_layer[layer](states), heads.by_layer[layer](states))
    assert list(again.only([2]).by_layer) == [2]
    with pytest.raises(PassError, match="layer 3"):
        again.only([1, 3])


def test_damaged_files_are_refused(tmp_path):
    save_heads(untrained([1], first=True), tmp_path)
    (tmp_path / "exits.safetensors").write_bytes(b"no tensors")
    with pytest.raises(PassError, match="cannot be read"):
        load_heads(tmp_path)
    with pytest.raises(PassError, match="cannot be read"):
        load_heads(Path(tmp_path / "missing"))


@pytest.mark.parametrize("layers", [[], [0], [3], [1, 7]])
def test_layers_that_are_no_exit_are_refused(bert, layers):
    with pytest.raises(PassError, match="layers from 1 to 2"):
        train(bert, layers)


def test_numbers_have_no_confidence_to_exit_on(bert):
    task = Task(kind=TaskKind.CLASSIFY, head=Head.REGRESSION, width=4)
    scorer = type(bert.model)(bert.model.model, task)
    rows = lesson(bert, 4, 0)
    with pytest.raises(PassError, match="no confidence"):
        train_frozen_heads(scorer, [1], rows, rows, bert.tokenizer, SETTINGS, lambda done: None)
