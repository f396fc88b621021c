"""The ONNX graph of every architecture gives transformers' logits and transformers' tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers as hf

from fettle.errors import PassError
from optimize.decoder_graph import export_decoder
from optimize.decoder_graph_parts import decoder_spec
from tests.unit.tiny_decoders import ARCHITECTURES, CONTEXT, PAD_ID, VOCABULARY, tiny_decoder
from workers.engine import EngineOptions
from workers.onnx_decoder import GraphRunner

TOLERANCE = 1e-4
LENGTHS = (31, 3, 1, 17)
EVERY = [(name, tied) for name in ARCHITECTURES for tied in (True, False)]


@cache
def model_of(name: str, tied: bool) -> hf.PreTrainedModel:
    return tiny_decoder(name, tied=tied)


@pytest.fixture(scope="module", params=EVERY, ids=lambda pair: f"{pair[0]}-{'tied' if pair[1] else 'untied'}")
def case(request, tmp_path_factory):
    model = model_of(*request.param)
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    export_decoder(model, path)
    return model, path


@pytest.fixture
def model(case):
    return case[0]


@pytest.fixture
def runner(case) -> Iterator[GraphRunner]:
    with contextlib.closing(GraphRunner(case[1], decoder_spec(case[0].config), EngineOptions())) as opened:
        opened.allocate(4, 48)
        yield opened


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, PAD_ID, length).astype(np.int32)


def truth(model: hf.PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """float32 [tokens, vocabulary], from one pass without a cache."""
    with torch.inference_mode():
        return model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].numpy()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * max(1.0, float(np.abs(expected).max())))


def test_prefill(model, runner):
    ids = text(40)
    assert_close(runner.feed(2, ids, 0, 40), truth(model, ids))


def test_prefill_in_pieces(model, runner):
    ids = text(40)
    expected = truth(model, ids)
    starts = [0, 16, 17, 29]
    for start, end in zip(starts, [*starts[1:], 40], strict=True):
        wanted = min(5, end - start)
        assert_close(runner.feed(1, ids[start:end], start, wanted), expected[end - wanted : end])


def test_steps_of_rows_with_different_lengths(model, runner):
    texts = [text(length + 8, seed=length) for length in LENGTHS]
    expected = [truth(model, ids) for ids in texts]
    lengths = np.array(LENGTHS, np.int32)
    for slot, (ids, length) in enumerate(zip(texts, LENGTHS, strict=True)):
        assert runner.feed(slot, ids[:length], 0, 0).shape == (0, VOCABULARY)
    for step in range(8):
        found = runner.decode(
            np.array([ids[at + step] for ids, at in zip(texts, LENGTHS, strict=True)]), lengths + step
        )
        assert_close(found, np.stack([each[at + step] for each, at in zip(expected, LENGTHS, strict=True)]))


def test_copied_beginning_goes_its_own_way(model, runner):
    first = text(30)
    second = np.concatenate([first[:21], text(12, seed=9)])
    runner.feed(3, first, 0, 0)
    runner.copy(3, 0, 21)
    assert_close(runner.feed(0, second[21:32], 21, 1), truth(model, second)[31:32])
    assert_close(runner.decode(second[32:], np.array([32], np.int32)), truth(model, second)[32:])
    # What was copied from is as it was.
    assert_close(runner.feed(3, text(1, seed=5), 30, 1), truth(model, np.concatenate([first, text(1, seed=5)]))[30:])


def test_greedy_tokens_are_those_of_transformers(model, runner):
    prompts = [text(length, seed=length) for length in LENGTHS[:3]]
    last, lengths = [], np.array(LENGTHS[:3], np.int32)
    for slot, ids in enumerate(prompts):
        last.append(runner.feed(slot, ids, 0, 1)[0].argmax())
    found = [np.array(last, np.int32)]
    # The longest text must stay in the 48 tokens that phi3-partial's rotary embedding has one set of angles for.
    for step in range(16):
        found.append(runner.decode(found[-1], lengths + step).argmax(axis=1).astype(np.int32))
    for row, ids in enumerate(prompts):
        inputs = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.inference_mode():
            output = model.generate(inputs, max_new_tokens=17, do_sample=False, attention_mask=torch.ones_like(inputs))
        assert np.array_equal(np.stack(found)[:, row], output[0, len(ids) :].numpy())


# What the graph is like.


def graph_of(tmp_path: Path, name: str = "llama", *, tied: bool = True) -> onnx.ModelProto:
    export_decoder(model_of(name, tied), tmp_path / "model.onnx")
    return onnx.load(tmp_path / "model.onnx")


def test_tied_table_is_stored_once(tmp_path):
    shapes = [list(item.dims) for item in graph_of(tmp_path).graph.initializer]
    assert sum(VOCABULARY in shape for shape in shapes) == 1


def test_linear_layers_are_named_constant_products(tmp_path):
    graph = graph_of(tmp_path, tied=False).graph
    weights = {item.name: list(item.dims) for item in graph.initializer}
    products = {node.name: weights[node.input[1]] for node in graph.node if node.op_type == "MatMul"}
    assert len(products) == 3 * 4 + 1
    assert products["layers.0.qkv"] == [48, (4 + 2 * 2) * 16]
    assert products["layers.2.gate_up"] == [48, 2 * 64]
    assert products["head"] == [48, VOCABULARY]


def test_what_exceeds_one_file_keeps_its_weights_in_a_second(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    monkeypatch.setattr(onnx.checker, "MAXIMUM_PROTOBUF", 20_000)
    for seed in (0, 1):
        model = tiny_decoder(seed=seed)
        export_decoder(model, path)
    first, second = sorted(tmp_path.iterdir())
    assert (first.name, second.name) == ("model.onnx", "model.onnx.data")
    assert first.stat().st_mode == second.stat().st_mode
    weights = sum(weight.nbytes for weight in model.parameters())
    assert weights < second.stat().st_size < 1.1 * weights
    with contextlib.closing(GraphRunner(path, decoder_spec(model.config), EngineOptions())) as opened:
        opened.allocate(1, 8)
        assert_close(opened.feed(0, text(8), 0, 8), truth(model, text(8)))


@pytest.mark.parametrize("name", ["llama-biased", "phi3", "qwen3", "gemma3"])
def test_the_model_stays_as_it_is(tmp_path, name):
    model = tiny_decoder(name)
    before = {path: weight.clone() for path, weight in model.state_dict().items()}
    export_decoder(model, tmp_path / "model.onnx")
    assert all(torch.equal(weight, before[path]) for path, weight in model.state_dict().items())


def test_context_may_be_bounded(tmp_path):
    model = model_of("llama", True)
    assert decoder_spec(model.config).context == CONTEXT
    assert export_decoder(model, tmp_path / "model.onnx", context=32)["context"] == 32
    weights = {item.name: list(item.dims) for item in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert weights["rotary.cos"] == [32, 8]
    assert decoder_spec(model.config, 10_000).context == CONTEXT


def test_context_ends_where_angles_begin_to_depend_on_the_length():
    assert decoder_spec(model_of("phi3-partial", True).config).context == 48


# What is refused.


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (hf.GPT2Config(), "gpt2"),
        (hf.Qwen3MoeConfig(), "qwen3_moe"),
        (hf.LlamaConfig(hidden_act="relu"), "relu"),
        (hf.LlamaConfig(head_dim=24), "24 of 24"),
        (hf.Phi3Config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.25}), "24 of 96"),
        (hf.Gemma3TextConfig(use_bidirectional_attention=True), "later tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_graph_cannot_say_is_refused_by_name(config, named):
    with pytest.raises(PassError, match=named):
        decoder_spec(config)


def test_unknown_rotary_kind_is_refused_by_name():
    config = hf.LlamaConfig()
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1.0}
    with pytest.raises(PassError, match="spiral"):
        decoder_spec(config)


@pytest.mark.parametrize(("context", "fits"), [(7, False), (8, True)])
def test_context_of_a_few_tokens_is_refused(tmp_path, context, fits):
    with contextlib.nullcontext() if fits else pytest.raises(PassError, match="7 tokens is too short"):
        export_decoder(tiny_decoder(), tmp_path / "model.onnx", context)


def test_half_precision_is_refused(tmp_path):
    with pytest.raises(PassError, match="bfloat16"):
        export_decoder(tiny_decoder().bfloat16(), tmp_path / "model.onnx")


def test_wrong_graph_is_refused(tmp_path, monkeypatch):
    model = tiny_decoder()
    right = model.forward

    def shifted(*args, **settings):
        output = right(*args, **settings)
        output.logits = output.logits + 0.01
        return output

    monkeypatch.setattr(model, "forward", shifted)
    with pytest.raises(PassError, match="differ from torch's by"):
        export_decoder(model, tmp_path / "model.onnx")
