"""Shared layers are shared, factors multiply to the embedding, a narrower model is the one its config describes."""

from __future__ import annotations

import copy

import pytest
import torch

from fettle.errors import PassError
from optimize.anatomy import dissect, part
from optimize.prune import keep_layers, prune_heads, prune_neurons
from optimize.reshape import FactorizedEmbedding, alternate_layers, factorize_embeddings, share_layers, shrink_width
from tests.unit import tiny_models
from tests.unit.tiny_encoders import (
    ARCHITECTURES,
    DEPTH,
    EMBED,
    HIDDEN,
    NEURONS,
    SIZE,
    answers,
    difference,
    padded_batch,
    parameter_count,
    tiny_scorer,
)

each = pytest.mark.parametrize("name", ARCHITECTURES)
NARROW = 16


@pytest.mark.parametrize(
    ("total", "count", "kept"),
    [(12, 6, [0, 2, 4, 6, 8, 11]), (6, 3, [0, 2, 5]), (6, 4, [0, 1, 3, 5]), (5, 1, [0]), (3, 3, [0, 1, 2])],
)
def test_alternate_layers(total, count, kept):
    assert alternate_layers(total, count) == kept


@pytest.mark.parametrize("count", [0, 7])
def test_alternate_layers_of_too_few(count):
    with pytest.raises(PassError):
        alternate_layers(6, count)


@each
def test_shared_layers_are_one(name):
    scorer = tiny_scorer(name, num_hidden_groups=2) if name == "albert" else tiny_scorer(name)
    total, layer = parameter_count(scorer), dissect(scorer).layers[1]
    each_layer = sum(weight.numel() for weight in layer.module.parameters())
    share_layers(scorer, 1)
    layers = dissect(scorer).layers
    assert len(layers) == DEPTH
    assert all(other.output is layer.output and other.up is layer.up for other in layers)
    if name == "modernbert":
        # The first layer has no norm of its own, before or after.
        assert parameter_count(scorer) == total - 3 * each_layer + HIDDEN
        assert [other.module.attention_type for other in layers] == scorer.model.config.layer_types
    else:
        assert all(other.module is layer.module for other in layers)
        assert parameter_count(scorer) == total - ((1 if name == "albert" else 3) * each_layer)


@each
def test_sharing_is_running_copies_of_one_layer(name):
    scorer, copies = tiny_scorer(name), tiny_scorer(name)
    share_layers(scorer)
    source = dissect(copies).layers[2].module
    for layer in dissect(copies).layers:
        weights = {key: value for key, value in source.state_dict().items() if key in layer.module.state_dict()}
        layer.module.load_state_dict(weights)
    assert difference(scorer, answers(copies)) < 1e-6


@each
def test_training_one_shared_layer_trains_all(name):
    scorer = tiny_scorer(name)
    share_layers(scorer)
    before = answers(scorer)
    trained = copy.deepcopy(scorer)
    dissect(trained).layers[0].down.weight.mul_(0.5)
    assert all((layer.down.weight == dissect(trained).layers[0].down.weight).all() for layer in dissect(trained).layers)
    assert difference(trained, before) > 1e-3


def test_no_such_layer_to_share():
    with pytest.raises(PassError, match="layer 4"):
        share_layers(tiny_scorer("bert"), 4)


@each
def test_factors_at_full_rank_are_the_embedding(name):
    scorer = tiny_scorer(name)
    expected = answers(scorer)
    width = part(scorer.model.base_model, dissect(scorer).plan.words).embedding_dim
    factorize_embeddings(scorer, width)
    assert difference(scorer, expected) < 1e-5


@each
def test_factors_are_the_best_of_their_rank(name):
    scorer = tiny_scorer(name)
    weight = scorer.model.get_input_embeddings().weight.double()
    total = parameter_count(scorer)
    factorize_embeddings(scorer, 5)
    words = scorer.model.get_input_embeddings()
    assert isinstance(words, FactorizedEmbedding)
    assert (words.num_embeddings, words.embedding_dim) == weight.shape
    singular = torch.linalg.svdvals(weight)
    product = words(torch.arange(len(weight))).double()
    # Eckart and Young: no matrix of that rank is nearer than the singular values left out.
    assert (product - weight).norm().item() == pytest.approx(singular[5:].norm().item(), rel=1e-5)
    assert parameter_count(scorer) == total - weight.numel() + 5 * sum(weight.shape)


def test_factors_are_made_once_and_of_a_rank_that_fits():
    scorer = tiny_scorer("bert")
    for rank in (0, HIDDEN + 1):
        with pytest.raises(PassError, match="rank"):
            factorize_embeddings(scorer, rank)
    factorize_embeddings(scorer, 4)
    with pytest.raises(PassError, match="already"):
        factorize_embeddings(scorer, 4)


@each
def test_a_narrower_classifier_is_the_model_of_its_config(name):
    """transformers builds the model anew from the config, takes the weights strictly and gives the same answers."""
    scorer = tiny_scorer(name)
    before = parameter_count(scorer)
    # transformers' ELECTRA has no projection where the hidden width is the embedding's, 16.
    narrow = 24 if name == "electra" else NARROW
    assert shrink_width(scorer, narrow) is scorer
    for layer in dissect(scorer).layers:
        assert {projection.in_features for projection in layer.projections} == {narrow}
        assert (layer.heads, layer.head_size, layer.neurons) == (narrow // SIZE, SIZE, NEURONS)
        assert (layer.output.out_features, layer.up.in_features, layer.down.out_features) == (narrow,) * 3
    assert parameter_count(scorer) < 0.85 * before
    assert answers(scorer).shape == (4, 4)
    assert answers(scorer).std() > 1e-3
    if name != "mpnet":
        fresh = tiny_models.CLASSIFIERS[name][1](scorer.model.config).eval()
        fresh.load_state_dict(scorer.model.state_dict(), strict=True)
        with torch.inference_mode():
            assert torch.equal(fresh(*padded_batch()).logits, answers(scorer))


def test_a_narrower_model_has_the_slices_of_the_original():
    scorer = tiny_scorer("bert")
    original = copy.deepcopy(scorer).model.bert
    shrink_width(scorer, NARROW)
    small = scorer.model.bert
    rows = original.embeddings.word_embeddings.weight.T
    kept = [int((rows == row).all(dim=1).nonzero()) for row in small.embeddings.word_embeddings.weight.T]
    assert kept == sorted(set(kept))
    large_up, up = original.encoder.layer[3].intermediate.dense, small.encoder.layer[3].intermediate.dense
    assert torch.equal(up.weight, large_up.weight[:, kept])
    large_down, down = original.encoder.layer[3].output, small.encoder.layer[3].output
    assert torch.equal(down.dense.weight, large_down.dense.weight[kept])
    assert torch.equal(down.LayerNorm.weight, large_down.LayerNorm.weight[kept])


def test_unread_dimensions_go_first():
    scorer = tiny_scorer("bert")
    dead = [1, 5, 8, 30, *range(10, 22)]
    for layer in dissect(scorer).layers:
        for reader in (*layer.projections, layer.up):
            reader.weight[:, dead] = 0
    words = scorer.model.get_input_embeddings().weight.clone()
    shrink_width(scorer, NARROW)
    alive = [index for index in range(HIDDEN) if index not in dead]
    assert torch.equal(scorer.model.get_input_embeddings().weight, words[:, alive])


@each
def test_a_narrower_embedding_model_keeps_the_width_of_its_vectors(name):
    scorer = shrink_width(tiny_scorer(name, EMBED), NARROW)
    values = answers(scorer)
    assert dissect(scorer).hidden == NARROW
    assert values.shape == (4, HIDDEN)
    torch.testing.assert_close(values.norm(dim=1), torch.ones(4))
    # Each dimension is back in its place and those that are gone are zero, until the projection is trained.
    assert int((values.abs().sum(dim=0) > 0).sum()) == NARROW
    with pytest.raises(PassError, match="already"):
        shrink_width(scorer, SIZE)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deberta-v2", {"conv_kernel_size": 3, "share_att_key": False}),
        ("deberta-v2", {"embedding_size": 20, "position_biased_input": True}),
        ("electra", {"embedding_size": HIDDEN}),
        ("albert", {"embedding_size": HIDDEN, "num_hidden_groups": 2}),
        ("modernbert", {"norm_bias": True, "mlp_bias": True, "attention_bias": True, "classifier_bias": True}),
    ],
    ids=str,
)
def test_variations_of_an_architecture_narrow_too(name, settings):
    scorer = tiny_scorer(name, **settings)
    shrink_width(scorer, NARROW)
    fresh = tiny_models.CLASSIFIERS[name][1](scorer.model.config).eval()
    fresh.load_state_dict(scorer.model.state_dict(), strict=True)
    with torch.inference_mode():
        assert torch.equal(fresh(*padded_batch()).logits, answers(scorer))


@each
def test_everything_at_once(name):
    scorer = tiny_scorer(name)
    keep_layers(scorer, [0, 2, 3])
    prune_heads(scorer, [[0, 1, 3]] * 3)
    prune_neurons(scorer, [list(range(16))] * 3)
    factorize_embeddings(scorer, 4)
    shrink_width(scorer, NARROW)
    share_layers(scorer)
    layers = dissect(scorer).layers
    assert [(layer.heads, layer.neurons) for layer in layers] == [(2, 16)] * 3
    assert torch.isfinite(answers(scorer)).all()


@pytest.mark.parametrize("hidden", [0, 12, HIDDEN, 40])
def test_widths_that_do_not_fit_are_refused(hidden):
    with pytest.raises(PassError, match="multiple of the head size 8"):
        shrink_width(tiny_scorer("bert"), hidden)


def test_a_grouped_convolution_is_refused():
    scorer = tiny_scorer("deberta-v2", conv_kernel_size=3, conv_groups=2)
    with pytest.raises(PassError, match="convolution"):
        shrink_width(scorer, NARROW)
