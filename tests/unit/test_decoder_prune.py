"""Layers, neurons and heads taken out of language models: exact, ordinary checkpoints, and chosen by what they do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from fettle.errors import PassError
from optimize.decoder_anatomy import dissect_decoder
from optimize.decoder_graph import export_decoder
from optimize.decoder_importance import decoder_importance
from optimize.decoder_prune import (
    choose_evenly,
    keep_decoder_layers,
    keep_kv_groups,
    keep_neurons,
    neuron_count,
    pool_kv_heads,
)
from tests.unit import tiny_decoders

# Rope of another kind changes nothing here; the head sizes and packed weights do.
NAMES = ["llama", "llama-biased", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma", "gemma2", "gemma3", "gpt2"]
GROUPED = [name for name in NAMES if name != "gpt2"]
# The attention of a loaded model is another kernel than that of a tiny one.
EXACT = {"rtol": 1e-4, "atol": 1e-4}


def tiny(name: str, **settings: object) -> Any:
    if name in tiny_decoders.ARCHITECTURES:
        return tiny_decoders.tiny_decoder(name, **{"hidden_size": 64, "num_attention_heads": 8, **settings})
    sizes = {**tiny_decoders.SIZES, "num_attention_heads": 8, **settings}
    if name == "gemma":
        config: hf.PreTrainedConfig = hf.GemmaConfig(**{**sizes, "head_dim": 16, "hidden_size": 64})
    else:
        config = hf.GPT2Config(
            vocab_size=tiny_decoders.VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, n_inner=64, **settings
        )
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.2)
    return model.requires_grad_(False)


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 250, (2, 13), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(ids()).logits


def with_inputs_zeroed(model: Any, zero: Callable[[int], tuple[str, list[int]]]) -> Tensor:
    """Logits with some inputs of one projection in each layer set to zero."""
    anatomy = dissect_decoder(model)
    handles = []
    for layer in range(len(anatomy.blocks)):
        path, columns = zero(layer)

        def blank(_: nn.Module, inputs: tuple[Tensor, ...], columns: list[int] = columns) -> tuple[Tensor]:
            values = inputs[0].clone()
            values[..., columns] = 0.0
            return (values,)

        handles.append(model.get_submodule(anatomy.name(layer, path)).register_forward_pre_hook(blank))
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


def reloaded(model: Any, directory: Path) -> Any:
    """The checkpoint as anybody would load it, with nothing missing or left over."""
    model.save_pretrained(directory)
    again, report = hf.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    assert type(again) is type(model)
    kept = model.state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in again.state_dict().items())
    return again.eval()


@pytest.mark.parametrize("name", NAMES)
def test_dropped_layers_are_as_if_they_added_nothing(name: str, tmp_path: Path):
    model = tiny(name)
    small = keep_decoder_layers(model, [0, 2])
    dropped = dissect_decoder(model).blocks[1]
    before = logits(model)
    for module in (dropped.output, dropped.down):
        for weight in module.parameters():
            weight.zero_()
    assert not torch.allclose(logits(model), before, **EXACT)
    torch.testing.assert_close(logits(small), logits(model), **EXACT)
    torch.testing.assert_close(logits(reloaded(small, tmp_path)), logits(small), **EXACT)


def test_lists_of_one_item_a_layer_lose_those_of_dropped_layers(tmp_path: Path):
    gemma = keep_decoder_layers(tiny("gemma3"), [1, 2])
    assert gemma.config.layer_types == ["full_attention", "sliding_attention"]
    smol = reloaded(keep_decoder_layers(tiny("smollm3"), [1, 2]), tmp_path)
    assert smol.config.no_rope_layers == [0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_pruned_neurons_are_as_if_they_were_zero(name: str, tmp_path: Path):
    model = tiny(name)
    keep = [[0, 3, 63], [5, 6, 7], [1, 2, 62]]
    small = keep_neurons(model, keep)
    path = dissect_decoder(model).plan.down
    gone = [[neuron for neuron in range(64) if neuron not in neurons] for neurons in keep]
    torch.testing.assert_close(logits(small), with_inputs_zeroed(model, lambda layer: (path, gone[layer])), **EXACT)
    torch.testing.assert_close(logits(reloaded(small, tmp_path)), logits(small), **EXACT)
    assert dissect_decoder(small).neurons == 3


@pytest.mark.parametrize("name", GROUPED)
def test_pruned_groups_are_as_if_their_heads_were_zero(name: str, tmp_path: Path):
    model = tiny(name, num_key_value_heads=4)
    anatomy = dissect_decoder(model)
    keep = [[0, 3], [1, 2], [2, 3]]
    small = keep_kv_groups(model, keep)
    size = anatomy.queries * anatomy.head_size
    gone = [
        [column for group in range(4) if group not in groups for column in range(group * size, group * size + size)]
        for groups in keep
    ]
    expected = with_inputs_zeroed(model, lambda layer: (anatomy.plan.output, gone[layer]))
    torch.testing.assert_close(logits(small), expected, **EXACT)
    again = reloaded(small, tmp_path)
    torch.testing.assert_close(logits(again), logits(small), **EXACT)
    now = dissect_decoder(again)
    assert (now.heads, now.groups, now.head_size) == (4, 2, anatomy.head_size)


@pytest.mark.parametrize("name", GROUPED)
def test_merging_equal_heads_changes_nothing(name: str, tmp_path: Path):
    model = tiny(name, num_key_value_heads=8)
    anatomy = dissect_decoder(model)
    names = [anatomy.name(layer, path) for layer in range(3) for path in anatomy.plan.qkv]
    keys = 8 * anatomy.head_size
    for module in map(model.get_submodule, names):
        for weight in module.parameters():
            # Of packed weights the first rows are the queries', which stay as they are.
            blocks = [weight] if weight.shape[0] == keys else weight.split(keys)[1:]
            for block in blocks:
                heads = block.view(4, 2, anatomy.head_size, -1)
                heads[:, 1] = heads[:, 0]
    expected = logits(model)
    small = pool_kv_heads(model, 4)
    torch.testing.assert_close(logits(small), expected, **EXACT)
    torch.testing.assert_close(logits(reloaded(small, tmp_path)), logits(small), **EXACT)
    assert dissect_decoder(small).queries == 2
    assert not torch.allclose(logits(pool_kv_heads(model, 2)), expected, **EXACT)


def test_merged_heads_are_the_mean_of_neighbours():
    model = tiny("llama-biased", num_key_value_heads=4)
    small = pool_kv_heads(model, 2)
    for path in ("k_proj", "v_proj"):
        before, after = (getattr(each.model.layers[1].self_attn, path) for each in (model, small))
        torch.testing.assert_close(after.weight[:16], (before.weight[:16] + before.weight[16:32]) / 2)
        torch.testing.assert_close(after.bias[16:], (before.bias[32:48] + before.bias[48:]) / 2)


def test_passes_go_on_from_each_other_and_leave_the_original_alone(tmp_path: Path):
    model = tiny("qwen3", num_key_value_heads=4)
    before = logits(model)
    model.generation_config.eos_token_id = [7, 9]
    small = keep_neurons(keep_kv_groups(keep_decoder_layers(model, [0, 2]), [[0, 1], [2, 3]]), [[0, 1], [2, 3]])
    small = pool_kv_heads(small, 1)
    again = reloaded(small, tmp_path)
    torch.testing.assert_close(logits(again), logits(small), **EXACT)
    assert again.generation_config.eos_token_id == [7, 9]
    assert (again.config.num_hidden_layers, again.config.intermediate_size, again.config.num_key_value_heads) == (
        2,
        2,
        1,
    )
    assert torch.equal(logits(model), before)
    generated = again.generate(ids(), max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > ids().shape[1]


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma3", "smollm3"])
def test_what_is_left_has_a_graph(name: str, tmp_path: Path):
    model = tiny(name, num_key_value_heads=4, hidden_size=128)
    small = keep_neurons(keep_kv_groups(keep_decoder_layers(model, [1, 2]), [[0, 3], [1, 2]]), [list(range(32))] * 2)
    found = export_decoder(pool_kv_heads(small, 1), tmp_path / "model.onnx")
    assert float(found["max_difference"]) < 1e-4


def test_tied_embeddings_stay_tied_and_untied_ones_untied():
    for tied in (True, False):
        small = keep_decoder_layers(tiny("llama", tied=tied), [0])
        same = small.get_output_embeddings().weight is small.get_input_embeddings().weight
        assert same is tied


def test_the_weights_type_and_trainability_are_kept():
    model = tiny("llama").to(torch.bfloat16).requires_grad_(True)
    small = pool_kv_heads(keep_decoder_layers(model, [0]), 1)
    assert {(weight.dtype, weight.requires_grad) for weight in small.parameters()} == {(torch.bfloat16, True)}
    assert small.config.dtype == torch.bfloat16


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no layer": (lambda: keep_decoder_layers(tiny("llama"), []), "layers to keep"),
    "wrong layer": (lambda: keep_decoder_layers(tiny("llama"), [0, 3]), "layers to keep"),
    "descending": (lambda: keep_decoder_layers(tiny("llama"), [1, 0]), "ascending"),
    "unequal": (lambda: keep_neurons(tiny("llama"), [[0], [0, 1], [0]]), "equally many"),
    "too few lists": (lambda: keep_neurons(tiny("llama"), [[0]]), "1 lists of neurons for 3 layers"),
    "heads do not divide": (
        lambda: keep_kv_groups(tiny("llama", num_key_value_heads=4), [[0, 1, 2]] * 3),
        "hidden size",
    ),
    "no divisor": (lambda: pool_kv_heads(tiny("llama", num_key_value_heads=8), 3), "cannot be merged to 3"),
    "not fewer": (lambda: pool_kv_heads(tiny("llama"), 2), "cannot be merged to 2"),
    "gpt2 groups": (lambda: keep_kv_groups(tiny("gpt2"), [[0]] * 3), "gpt2 configuration knows only heads"),
    "gpt2 merged": (lambda: pool_kv_heads(tiny("gpt2"), 2), "gpt2 configuration knows only heads"),
    "scaled by layer": (
        lambda: keep_decoder_layers(tiny("gpt2", scale_attn_by_inverse_layer_idx=True), [0]),
        "number of the layer",
    ),
    "unknown": (
        lambda: keep_decoder_layers(
            hf.AutoModelForCausalLM.from_config(
                hf.OPTConfig(
                    num_hidden_layers=1,
                    hidden_size=16,
                    ffn_dim=8,
                    num_attention_heads=2,
                    vocab_size=32,
                    word_embed_proj_dim=16,
                )
            ),
            [0],
        ),
        "opt models cannot be pruned",
    ),
    "not finite": (lambda: choose_evenly([torch.tensor([1.0, float("nan")])], 1), "not finite"),
    "too many": (lambda: choose_evenly([torch.ones(4)], 5), "5 cannot be kept of 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str):
    make, message = REFUSED[case]
    with pytest.raises(PassError, match=message):
        make()


# What to remove.


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    mask = (torch.arange(13) < torch.tensor([[13], [5]])).long()
    return [(ids(seed), mask) for seed in range(count)]


def added(model: Any, path: str, columns: slice, layer: int) -> float:
    """Root mean square of what some inputs of a projection add to its output, from the definition."""
    anatomy = dissect_decoder(model)
    module = model.get_submodule(anatomy.name(layer, path))
    weight = module.weight.T if anatomy.plan.transposed else module.weight
    seen = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    squares: list[Tensor] = []
    for batch, mask in batches():
        model(batch, attention_mask=mask)
        squares.append((seen.pop()[mask.bool()][:, columns] @ weight[:, columns].T).square().sum(dim=1))
    handle.remove()
    return float(torch.cat(squares).mean().sqrt())


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "gpt2"])
def test_importance_is_what_a_unit_adds(name: str):
    model = tiny(name) if name == "gpt2" else tiny(name, num_key_value_heads=4)
    anatomy = dissect_decoder(model)
    found = decoder_importance(model, batches())
    size = anatomy.queries * anatomy.head_size
    for layer in (0, 2):
        for group in range(anatomy.groups):
            expected = added(model, anatomy.plan.output, slice(group * size, (group + 1) * size), layer)
            assert float(found.groups[layer][group]) == pytest.approx(expected, rel=1e-4)
        for neuron in (0, 17):
            expected = added(model, anatomy.plan.down, slice(neuron, neuron + 1), layer)
            assert float(found.neurons[layer][neuron]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_influence_is_one_minus_the_cosine_over_real_tokens(name: str):
    model = tiny(name)
    for module in (dissect_decoder(model).blocks[1].output, dissect_decoder(model).blocks[1].down):
        for weight in module.parameters():
            weight.zero_()
    found = decoder_importance(model, batches()).influence
    cosines = []
    for batch, mask in batches():
        states = model(batch, attention_mask=mask, output_hidden_states=True).hidden_states
        cosines.append(torch.cosine_similarity(states[0], states[1], dim=-1)[mask.bool()])
    assert found[0] == pytest.approx(1 - float(torch.cat(cosines).mean()), abs=1e-5)
    assert found[1] == pytest.approx(0, abs=1e-6)
    assert min(found[0], found[2]) > 0.01


def test_padding_does_not_count():
    model = tiny("llama")
    ragged = decoder_importance(model, batches(1))
    [(rows, mask)] = batches(1)
    alone = [
        (rows[row : row + 1, :length], torch.ones(1, length)) for row, length in enumerate(mask.sum(dim=1).tolist())
    ]
    single = decoder_importance(model, alone)
    assert ragged.influence == pytest.approx(single.influence, abs=1e-6)
    for left, right in zip([*ragged.neurons, *ragged.groups], [*single.neurons, *single.groups], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_no_text_is_refused():
    with pytest.raises(PassError, match="no text"):
        decoder_importance(tiny("llama"), [])


def test_the_most_important_are_kept_and_ties_go_to_the_first():
    assert choose_evenly([torch.tensor([1.0, 3.0, 2.0, 3.0]), torch.ones(3)], 2) == [[1, 3], [0, 1]]


@pytest.mark.parametrize(
    ("total", "share", "count"), [(704, 0.5, 352), (704, 1.0, 704), (48, 1.0, 48), (64, 0.01, 32), (1000, 0.5, 512)]
)
def test_widths_are_whole_blocks(total: int, share: float, count: int):
    assert neuron_count(total, share) == count


def test_important_parts_are_kept_better_than_unimportant_ones():
    model = tiny("llama", num_key_value_heads=4)
    found = decoder_importance(model, batches())
    best = choose_evenly(found.neurons, 48)
    worst = choose_evenly([-values for values in found.neurons], 48)
    reference = logits(model)
    assert (logits(keep_neurons(model, best)) - reference).norm() < (
        logits(keep_neurons(model, worst)) - reference
    ).norm()
