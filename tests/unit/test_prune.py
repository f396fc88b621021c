"""What is left after pruning computes what the whole computed with the removed parts silenced."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from torch.nn import functional

from fettle.errors import PassError
from fettle.manifest import Head
from optimize.anatomy import dissect
from optimize.importance import head_and_neuron_importance, layer_influence, own_answer_loss
from optimize.prune import choose_heads, choose_neurons, keep_layers, least_influential, prune_heads, prune_neurons
from tests.unit.tiny_encoders import (
    ARCHITECTURES,
    CLASSIFY,
    DEPTH,
    EMBED,
    HEADS,
    NEURONS,
    SIZE,
    answers,
    difference,
    padded_batch,
    parameter_count,
    tiny_scorer,
)

TOLERANCE = 1e-5
each = pytest.mark.parametrize("name", ARCHITECTURES)
# Written down again, so that a mistake in the table of `optimize.anatomy` shows.
READERS = {
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "albert": ("attention.dense", "ffn_output"),
    "mpnet": ("attention.attn.o", "output.dense"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
}
BERT_READERS = ("attention.output.dense", "output.dense")
UNEVEN_HEADS = [[0, 2, 3], [1], [0, 1, 2, 3], [2, 3]]
UNEVEN_NEURONS = [list(range(0, 48, 3)), list(range(48)), [5, 47], list(range(7, 39))]


def blocks(scorer, name):
    """The layers by their place in transformers' own module tree; ALBERT has one."""
    base = scorer.model.base_model
    if name == "albert":
        return [layer for group in base.encoder.albert_layer_groups for layer in group.albert_layers]
    if name == "modernbert":
        return list(base.layers)
    return list(base.transformer.layer if name == "distilbert" else base.encoder.layer)


@contextlib.contextmanager
def silenced(scorer, name, which, keep, size):
    """Multiply what is not kept by zero in front of the layer that reads it."""
    handles = []
    for block, units in zip(blocks(scorer, name), keep, strict=False):
        reader = block.get_submodule(READERS.get(name, BERT_READERS)[which])
        mask = torch.zeros(reader.in_features // size, size)
        mask[units] = 1
        handles.append(reader.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask.flatten(),)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def for_each_layer(name, keep):
    """ALBERT's layers are one and need one list."""
    return [keep[0]] * DEPTH if name == "albert" else keep


@each
@pytest.mark.parametrize("task", [CLASSIFY, EMBED], ids=["classify", "embed"])
def test_removed_heads_are_silent_heads(name, task):
    scorer = tiny_scorer(name, task)
    keep = for_each_layer(name, UNEVEN_HEADS)
    with silenced(scorer, name, 0, keep, SIZE):
        expected = answers(scorer)
    assert difference(scorer, expected) > 1e-3
    weights = parameter_count(scorer)
    prune_heads(scorer, keep)
    assert difference(scorer, expected) < TOLERANCE
    assert [layer.heads for layer in dissect(scorer).layers] == [len(heads) for heads in keep]
    assert parameter_count(scorer) < weights


@each
def test_removed_neurons_are_silent_neurons(name):
    scorer = tiny_scorer(name)
    keep = for_each_layer(name, UNEVEN_NEURONS)
    with silenced(scorer, name, 1, keep, 1):
        expected = answers(scorer)
    assert difference(scorer, expected) > 1e-3
    prune_neurons(scorer, keep)
    assert difference(scorer, expected) < TOLERANCE
    assert [layer.neurons for layer in dissect(scorer).layers] == [len(neurons) for neurons in keep]


@each
def test_pruning_twice_is_pruning_once(name):
    once, twice = tiny_scorer(name), tiny_scorer(name)
    prune_heads(once, [[1, 3]] * DEPTH)
    prune_heads(twice, [[0, 1, 3]] * DEPTH)
    prune_heads(twice, [[1, 2]] * DEPTH)
    assert torch.equal(answers(once), answers(twice))


def test_deberta_with_its_own_position_projections():
    scorer = tiny_scorer("deberta-v2", share_att_key=False)
    with silenced(scorer, "deberta-v2", 0, UNEVEN_HEADS, SIZE):
        expected = answers(scorer)
    prune_heads(scorer, UNEVEN_HEADS)
    assert difference(scorer, expected) < TOLERANCE


@each
@pytest.mark.parametrize("keep", [[0, 2], [1, 2, 3], [3]], ids=str)
def test_dropped_layers_are_skipped_layers(name, keep):
    scorer = tiny_scorer(name)
    step = 0

    def skip(module, inputs, output):
        nonlocal step
        skipped, step = step not in keep, step + 1
        if not skipped:
            return output
        return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]

    handles = [block.register_forward_hook(skip) for block in blocks(scorer, name)]
    expected = answers(scorer)
    for handle in handles:
        handle.remove()
    assert step == DEPTH
    assert difference(scorer, expected) > 1e-3
    keep_layers(scorer, keep)
    assert torch.equal(answers(scorer), expected)
    assert scorer.model.config.num_hidden_layers == len(keep)


def test_albert_with_groups_drops_single_steps():
    scorer = tiny_scorer("albert", num_hidden_groups=2)
    first, second = blocks(scorer, "albert")
    keep_layers(scorer, [0, 1, 3])
    assert [layer.module for layer in dissect(scorer).layers] == [first, first, second]


def test_debertas_convolution_keeps_its_layer():
    scorer = tiny_scorer("deberta-v2", conv_kernel_size=3)
    with pytest.raises(PassError, match="convolution"):
        keep_layers(copy.deepcopy(scorer), [1, 2])
    keep_layers(scorer, [0, 2])


@pytest.mark.parametrize("keep", [[], [0, 0], [1, 0], [-1, 0], [4]], ids=str)
def test_wrong_lists_are_refused_before_anything_changes(keep):
    scorer = tiny_scorer("bert")
    before = answers(scorer)
    for operation, lists in (
        (keep_layers, keep),
        (prune_heads, [[0], [0], [0], keep]),
        (prune_neurons, [[0], [0], [0], [index * 47 for index in keep]]),
    ):
        with pytest.raises(PassError, match="ascending"):
            operation(scorer, lists)
    assert torch.equal(answers(scorer), before)


def test_one_list_for_each_layer_and_the_same_for_shared_ones():
    with pytest.raises(PassError, match="3 lists of heads for 4 layers"):
        prune_heads(tiny_scorer("bert"), [[0]] * 3)
    with pytest.raises(PassError, match="share their weights"):
        prune_neurons(tiny_scorer("albert"), UNEVEN_NEURONS)


# Importance.


@each
def test_importance_is_the_derivative_by_a_mask(name):
    """Against central differences: a head or neuron scaled by 1 +- step, in float64, one row alone."""
    scorer = tiny_scorer(name).double()
    scorer.forward = lambda *inputs: scorer.model(*inputs).logits
    ids, mask = padded_batch()
    target = torch.tensor([1])
    # ModernBERT turns its heads in float32, whatever the rest is in.
    step, tolerance = (1e-3, 2e-3) if name == "modernbert" else (1e-5, 1e-4)

    def loss(values):
        return functional.cross_entropy(values, target, reduction="sum")

    batches = [(ids[row : row + 1], mask[row : row + 1]) for row in (0, 1)]
    heads, neurons = head_and_neuron_importance(scorer, batches, loss)
    for which, unit, size, found in ((0, 2, SIZE, heads[0]), (1, 17, 1, neurons[0])):
        total = 0.0
        for batch in batches:
            values = []
            for scale in (1 + step, 1 - step):
                reader = blocks(scorer, name)[0].get_submodule(READERS.get(name, BERT_READERS)[which])
                factors = torch.ones(reader.in_features // size, size, dtype=torch.float64)
                factors[unit] = scale
                handle = reader.register_forward_pre_hook(lambda _, inputs, f=factors: (inputs[0] * f.flatten(),))
                values.append(loss(scorer(*batch)).item())
                handle.remove()
            total += abs(values[0] - values[1]) / (2 * step)
        assert found[unit].item() == pytest.approx(total / len(batches), rel=tolerance, abs=1e-7)


@each
def test_importance_does_not_depend_on_the_batching(name):
    scorer = tiny_scorer(name)
    ids, mask = padded_batch()
    loss = own_answer_loss(CLASSIFY)
    together = head_and_neuron_importance(scorer, [(ids, mask)], loss)
    alone = [(ids[row : row + 1, : mask[row].sum()], mask[row : row + 1, : mask[row].sum()]) for row in range(4)]
    apart = head_and_neuron_importance(scorer, alone, loss)
    for ours, theirs in zip(together[0] + together[1], apart[0] + apart[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
        assert ours.max() > 0
    assert all(weight.grad is None and not weight.requires_grad for weight in scorer.parameters())


@pytest.mark.parametrize(
    "task",
    [CLASSIFY, CLASSIFY.model_copy(update={"head": Head.MULTI_LABEL}), EMBED],
    ids=["classes", "labels", "vectors"],
)
def test_own_answers_give_every_kind_of_task_an_importance(task):
    scorer = tiny_scorer("bert", task)
    heads, neurons = head_and_neuron_importance(scorer, [padded_batch()], own_answer_loss(task))
    assert all((values > 0).all() for values in heads)
    assert all(values.mean() > 0 for values in neurons)
    again, _ = head_and_neuron_importance(scorer, [padded_batch()], own_answer_loss(task))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(heads, again, strict=True))


@pytest.mark.parametrize("name", ["bert", "albert", "distilbert"])
def test_influence_is_one_minus_the_cosine_of_hidden_states(name):
    scorer = tiny_scorer(name)
    ids, mask = padded_batch()
    states = scorer.model.base_model(ids, mask, output_hidden_states=True).hidden_states
    expected = [
        1 - functional.cosine_similarity(before, after, dim=-1)[mask.bool()].mean().item()
        for before, after in itertools.pairwise(states)
    ]
    halves = [(ids[:2], mask[:2]), (ids[2:], mask[2:])]
    assert layer_influence(scorer, halves) == pytest.approx(expected, abs=1e-5)


@each
def test_influence_has_one_value_for_each_layer(name):
    influence = layer_influence(tiny_scorer(name), [padded_batch()])
    assert len(influence) == DEPTH
    assert all(0 < value < 2 for value in influence)


def test_nothing_to_measure_on():
    with pytest.raises(PassError):
        layer_influence(tiny_scorer("bert"), [])
    with pytest.raises(PassError):
        head_and_neuron_importance(tiny_scorer("bert"), [], own_answer_loss(CLASSIFY))


# Choices.


def test_the_least_influential_layers_are_never_the_first():
    assert least_influential([0.0, 0.3, 0.1, 0.2], 2) == [2, 3]
    assert least_influential([0.0, 0.1, 0.1, 0.1], 2) == [1, 2]
    assert least_influential([0.5, 0.1], 0) == []
    with pytest.raises(PassError):
        least_influential([0.5, 0.1], 2)


def test_heads_are_ranked_over_all_layers_and_none_is_left_without():
    importance = [torch.tensor([3.0, 4.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 2.9])]
    assert choose_heads(importance, 0.25) == [[0, 1], [3]]
    assert choose_heads(importance, 0.375) == [[0, 1], [3]]
    assert choose_heads(importance, 0.75) == [[0, 1], [0, 1, 2, 3]]
    assert choose_heads(importance, 1.0) == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_neurons_are_kept_in_whole_blocks():
    up = torch.arange(64.0)
    # 38 of 128 are 19 of each layer, and 19 is nearest to 16.
    assert choose_neurons([up, up.flip(0)], 0.3) == [list(range(48, 64)), list(range(16))]
    assert choose_neurons([torch.zeros(64), torch.ones(64)], 0.5)[0] == list(range(16))
    assert choose_neurons([torch.arange(10.0)], 0.5) == [list(range(10))]
    assert choose_neurons([torch.arange(10.0)], 0.5, multiple=1) == [[5, 6, 7, 8, 9]]


def test_neurons_compete_on_the_scale_of_their_layer():
    up = torch.arange(64.0)
    assert choose_neurons([up, 10 * up], 0.5) == [list(range(32, 64))] * 2


def test_layers_with_the_same_weights_get_the_same_choice():
    scorer = tiny_scorer("albert")
    heads, neurons = head_and_neuron_importance(scorer, [padded_batch()], own_answer_loss(CLASSIFY))
    prune_heads(scorer, choose_heads(heads, 0.5))
    prune_neurons(scorer, choose_neurons(neurons, 0.5))
    layer = dissect(scorer).layers[0]
    assert layer.heads < HEADS
    assert layer.neurons < NEURONS


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_shares_outside_the_unit_interval_are_refused(share):
    with pytest.raises(PassError, match="share to keep"):
        choose_heads([torch.ones(4)], share)


def test_an_overflow_is_not_ranked():
    with pytest.raises(PassError, match="finite"):
        choose_neurons([torch.tensor([1.0, float("nan")])], 0.5)
