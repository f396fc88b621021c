"""2:4 and Wanda masks: the pattern, the scores by their definition, and what they do to a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fettle.errors import PassError
from optimize.decoder_masks import apply_masks, highest_share, input_norms, two_of_four, wanda_masks, wanda_scores
from tests.unit import tiny_decoders

IDS = torch.randint(0, 250, (3, 11), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(11) < torch.tensor([[11], [4], [7]])).long()


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
def test_two_of_every_four_are_kept_and_they_are_the_highest(rows: int, fours: int, seed: int):
    scores = torch.randn(rows, 4 * fours, generator=torch.Generator().manual_seed(seed))
    mask = two_of_four(scores)
    blocks, kept = scores.view(rows, fours, 4), mask.view(rows, fours, 4)
    assert (kept.sum(dim=-1) == 2).all()
    lowest_kept = blocks.masked_fill(~kept, float("inf")).amin(dim=-1)
    highest_gone = blocks.masked_fill(kept, float("-inf")).amax(dim=-1)
    assert (lowest_kept >= highest_gone).all()


def test_ties_go_to_the_lower_index():
    assert two_of_four(torch.zeros(1, 4)).tolist() == [[True, True, False, False]]
    assert highest_share(torch.zeros(1, 4), 0.25).tolist() == [[True, False, False, False]]


def test_a_share_of_every_row_is_kept():
    mask = highest_share(torch.tensor([[1.0, 4.0, 3.0, 2.0], [9.0, 8.0, 7.0, 6.0]]), 0.5)
    assert mask.tolist() == [[False, True, True, False], [True, True, False, False]]


def test_scores_weigh_a_weight_by_its_inputs():
    scores = wanda_scores(torch.tensor([[-2.0, 1.0]]), torch.tensor([1.0, 3.0]))
    assert scores.tolist() == [[2.0, 3.0]]


def test_norms_are_over_real_tokens():
    model = tiny_decoders.tiny_decoder("llama")
    norms = input_norms(model, [(IDS[:2], MASK[:2]), (IDS[2:], MASK[2:])])
    seen = []
    module = model.model.layers[1].mlp.down_proj
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for row, length in enumerate(MASK.sum(dim=1).tolist()):
        model(IDS[row : row + 1, :length])
    handle.remove()
    expected = torch.cat([each[0] for each in seen]).norm(dim=0).double()
    torch.testing.assert_close(norms["model.layers.1.mlp.down_proj"], expected, rtol=1e-4, atol=1e-4)
    assert len(norms) == 3 * 7


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_masked_models_have_the_pattern_in_every_layer(name: str):
    model = tiny_decoders.tiny_decoder(name)
    before = {path: module.weight.clone() for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    masks = wanda_masks(model, input_norms(model, [(IDS, MASK)]))
    apply_masks(model, masks)
    for path, weight in before.items():
        now = model.get_submodule(path).weight
        if path == "lm_head":
            assert torch.equal(now, weight)
            continue
        assert ((now == 0).view(-1, 4).sum(dim=1) == 2).all()
        assert torch.equal(now[masks[path]], weight[masks[path]])


def test_wanda_changes_a_layers_output_less_than_magnitudes():
    torch.manual_seed(0)
    model = tiny_decoders.tiny_decoder("llama")
    # Inputs of very different size, which magnitudes do not see.
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.copy_(torch.rand(48) * 4)
    path = "model.layers.1.self_attn.q_proj"
    norms = input_norms(model, [(IDS, MASK)])
    weight, seen = model.get_submodule(path).weight, []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][MASK.bool()]))
    model(IDS)
    handle.remove()

    def error(mask: torch.Tensor) -> float:
        return float((seen[0] @ (weight * ~mask).T).norm())

    assert error(wanda_masks(model, norms)[path]) < 0.9 * error(two_of_four(weight.abs()))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no fours": (lambda: two_of_four(torch.ones(2, 6)), "6 inputs"),
    "no share": (lambda: highest_share(torch.ones(2, 6), 0.0), "above 0"),
    "no text": (lambda: input_norms(tiny_decoders.tiny_decoder("llama"), []), "no text"),
    "transposed": (
        lambda: input_norms(hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2)), []),
        "transposed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str):
    make, message = REFUSED[case]
    with pytest.raises(PassError, match=message):
        make()
