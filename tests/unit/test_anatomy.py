"""The table of architectures finds the right parts, in the order in which the forward pass runs them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fettle.errors import PassError
from optimize.anatomy import dissect, set_layers
from tests.unit.tiny_encoders import (
    ARCHITECTURES,
    DEPTH,
    EMBED,
    HEADS,
    HIDDEN,
    NEURONS,
    SIZE,
    answers,
    padded_batch,
    tiny_scorer,
)

each = pytest.mark.parametrize("name", ARCHITECTURES)


@each
def test_sizes_are_those_of_the_config(name):
    anatomy = dissect(tiny_scorer(name))
    assert anatomy.hidden == HIDDEN
    assert len(anatomy.layers) == DEPTH
    for layer in anatomy.layers:
        assert (layer.heads, layer.head_size, layer.neurons) == (HEADS, SIZE, NEURONS)
        assert sum(projection.out_features for projection in layer.projections) == 3 * HIDDEN
        assert layer.up.out_features == (2 * NEURONS if name == "modernbert" else NEURONS)


@each
def test_layers_come_in_the_order_of_the_forward_pass(name):
    scorer = tiny_scorer(name)
    anatomy = dissect(scorer)
    order = []
    for module in {id(layer.module): layer.module for layer in anatomy.layers}.values():
        module.register_forward_hook(lambda module, inputs, output: order.append(module))
    answers(scorer)
    assert order == [layer.module for layer in anatomy.layers]


@each
def test_bare_encoders_have_the_same_parts(name):
    anatomy = dissect(tiny_scorer(name, EMBED))
    assert len(anatomy.layers) == DEPTH
    assert anatomy.base is anatomy.model


@each
def test_putting_back_the_same_layers_changes_nothing(name):
    scorer = tiny_scorer(name)
    before = answers(scorer)
    anatomy = dissect(scorer)
    set_layers(anatomy, [layer.module for layer in anatomy.layers])
    assert torch.equal(answers(scorer), before)


@pytest.mark.parametrize(
    ("groups", "inner", "steps", "distinct"), [(1, 1, 4, 1), (2, 1, 4, 2), (4, 1, 4, 4), (1, 2, 8, 2), (2, 2, 8, 4)]
)
def test_albert_groups_become_one_layer_for_each_step(groups, inner, steps, distinct):
    scorer = tiny_scorer("albert", num_hidden_groups=groups, inner_group_num=inner)
    before = answers(scorer)
    anatomy = dissect(scorer)
    assert len(anatomy.layers) == steps
    assert len(list(anatomy.distinct())) == distinct
    weights = sum(weight.numel() for weight in scorer.parameters())
    set_layers(anatomy, [layer.module for layer in anatomy.layers])
    assert torch.equal(answers(scorer), before)
    assert sum(weight.numel() for weight in scorer.parameters()) == weights
    again = dissect(scorer).layers
    assert [id(layer.module) for layer in again] == [id(layer.module) for layer in anatomy.layers]


def test_deberta_with_its_own_position_projections():
    anatomy = dissect(tiny_scorer("deberta-v2", share_att_key=False))
    assert all(len(layer.projections) == 5 for layer in anatomy.layers)


def test_an_unknown_architecture_is_named():
    scorer = tiny_scorer("bert")
    scorer.model.config.model_type = "longformer"
    with pytest.raises(PassError, match="longformer"):
        dissect(scorer)


def test_a_rebuilt_architecture_is_noticed():
    scorer = tiny_scorer("bert")
    scorer.model.bert.encoder.layer[1].intermediate.dense = nn.Identity()
    with pytest.raises(PassError, match=r"intermediate\.dense"):
        dissect(scorer)


def test_the_batch_is_padded():
    assert padded_batch()[1].sum(dim=1).tolist() == [19, 7, 2, 12]
