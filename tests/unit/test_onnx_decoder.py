"""The runner over an ONNX decoder: room, copies, addresses, errors, and that no row knows of another."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fettle.errors import EngineError, FamilyError, IntegrityError, UsageError
from fettle.family import MANIFEST_FILE, record_files, write_manifest
from fettle.manifest import Runtime
from optimize.decoder_graph import export_decoder
from optimize.decoder_graph_parts import decoder_spec
from tests.unit.tiny_decoders import CONTEXT, PAD_ID, VOCABULARY, decoder_manifest, tiny_decoder
from workers.engine import EngineOptions, open_runner
from workers.onnx_decoder import CALL_TOKENS, GraphRunner, OnnxDecoder

SPEC = decoder_spec(tiny_decoder().config)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("variant")
    export_decoder(tiny_decoder(), directory / "model.onnx")
    manifest = decoder_manifest(Runtime.ONNX, SPEC)
    write_manifest(directory / MANIFEST_FILE, manifest.model_copy(update={"files": record_files(directory)}))
    return directory


@pytest.fixture
def runner(directory) -> Iterator[OnnxDecoder]:
    with contextlib.closing(open_runner(directory)) as opened:
        assert isinstance(opened, OnnxDecoder)
        opened.allocate(8, 40)
        yield opened


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, PAD_ID, length).astype(np.int32)


def step(runner: OnnxDecoder, tokens: list[int], lengths: list[int]) -> np.ndarray:
    return runner.decode(np.array(tokens, np.int32), np.array(lengths, np.int32))


def alone(directory: Path, ids: np.ndarray, token: int, threads: int = 1) -> np.ndarray:
    """Logits after one more token, from a runner that has never seen anything else."""
    with contextlib.closing(open_runner(directory, EngineOptions(threads=threads))) as fresh:
        fresh.allocate(1, len(ids) + 1)
        fresh.feed(0, ids, 0, 0)
        return step(fresh, [token], [len(ids)])[0]


def test_starts_with_no_room_and_knows_what_a_token_takes(directory):
    with contextlib.closing(open_runner(directory)) as opened:
        assert (opened.slots, opened.context) == (0, 0)
        assert opened.bytes_per_token == 4 * 2 * 3 * 2 * 16
        with pytest.raises(EngineError, match="0 of 0 are allocated"):
            opened.feed(0, text(3), 0, 1)


def test_warm_up_needs_no_room_and_leaves_it_as_it_was(directory):
    with contextlib.closing(open_runner(directory)) as opened:
        opened.warm_up()
        assert (opened.slots, opened.context) == (0, 0)
        opened.allocate(3, 9)
        opened.warm_up()
        assert (opened.slots, opened.context) == (3, 9)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_in_a_batch_has_the_logits_that_it_has_alone_bit_for_bit(directory, threads):
    texts = [text(length, seed=length) for length in (31, 3, 1, 17, 8, 25, 30, 12)]
    with contextlib.closing(open_runner(directory, EngineOptions(threads=threads))) as runner:
        runner.allocate(8, 40)
        for slot, ids in enumerate(texts):
            runner.feed(slot, ids, 0, 0)
        together = step(runner, list(range(8)), [len(ids) for ids in texts])
    for row, ids in enumerate(texts):
        assert np.array_equal(alone(directory, ids, row, threads), together[row])


def test_pieces_of_a_prompt_give_the_bits_of_the_whole(runner):
    """As long as no piece is a single token, whose sums are made in another order."""
    ids = text(40)
    whole = runner.feed(0, ids, 0, 40)
    starts = [0, 2, 4, 17, 33, 40]
    pieces = [runner.feed(1, ids[at:end], at, end - at) for at, end in pairwise(starts)]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_long_prompt_is_fed_in_several_calls(tmp_path):
    model = tiny_decoder(max_position_embeddings=300)
    export_decoder(model, tmp_path / "model.onnx")
    ids = text(263)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
    with contextlib.closing(GraphRunner(tmp_path / "model.onnx", decoder_spec(model.config), EngineOptions())) as long:
        long.allocate(2, 300)
        for tokens in (CALL_TOKENS, CALL_TOKENS + 1, 2 * CALL_TOKENS, 260):
            for wanted in {0, 1, tokens // 3, tokens // 2, tokens // 2 + 1, tokens}:
                found = long.feed(1, ids[:tokens], 0, wanted)
                assert found.shape == (wanted, VOCABULARY)
                np.testing.assert_allclose(found, expected[tokens - wanted : tokens], atol=1e-4)
        np.testing.assert_allclose(long.feed(1, ids[260:], 260, 1), expected[262:], atol=1e-4)
        # No call was of a single token, so the bits are those of any other pieces.
        assert np.array_equal(long.feed(0, ids[:129], 0, 129), long.feed(1, ids[:260], 0, 260)[:129])


def test_more_room_keeps_what_was_there(directory, runner):
    first, second = text(20), text(40, seed=1)
    runner.feed(0, first, 0, 0)
    runner.feed(7, second, 0, 0)
    runner.allocate(11, 56)
    assert (runner.slots, runner.context) == (11, 56)
    runner.copy(7, 1, 40)
    found = step(runner, [4, 5], [20, 40])
    assert np.array_equal(found[0], alone(directory, first, 4))
    assert np.array_equal(found[1], alone(directory, second, 5))


def test_less_room_keeps_what_it_still_holds(directory, runner):
    first, second = text(10), text(15, seed=1)
    runner.feed(0, first, 0, 0)
    runner.feed(1, second, 0, 0)
    runner.allocate(2, 16)
    found = step(runner, [4, 5], [10, 15])
    assert np.array_equal(found[0], alone(directory, first, 4))
    assert np.array_equal(found[1], alone(directory, second, 5))
    with pytest.raises(EngineError, match="3 slots of 11 tokens are needed, and 2 of 16"):
        step(runner, [1, 1, 1], [10, 3, 3])


def test_room_that_there_is_not_is_an_error_and_the_next_may_fit(directory, runner):
    with pytest.raises(EngineError, match=f"no memory for 1000000000000 slots of {CONTEXT} tokens"):
        runner.allocate(10**12, CONTEXT)
    assert (runner.slots, runner.context) == (0, 0)
    runner.allocate(1, 8)
    runner.feed(0, text(7), 0, 0)
    assert np.array_equal(step(runner, [3], [7])[0], alone(directory, text(7), 3))


def test_what_was_fed_before_is_overwritten(directory, runner):
    runner.feed(0, text(30, seed=3), 0, 0)
    ids = text(12)
    runner.feed(0, ids[:5], 0, 0)
    runner.feed(0, ids[5:], 5, 0)
    assert np.array_equal(step(runner, [9], [12])[0], alone(directory, ids, 9))


def test_rejected_tokens_are_forgotten_by_going_on_before_them(directory, runner):
    """As after speculative decoding: four tokens are tried, and the second is replaced."""
    ids = text(14)
    runner.feed(0, ids[:10], 0, 0)
    tried = runner.feed(0, np.array([1, 2, 3, 4], np.int32), 10, 4)
    assert tried.shape == (4, VOCABULARY)
    found = step(runner, [7], [11])
    assert np.allclose(found[0], alone(directory, np.append(ids[:10], np.int32(1)), 7), atol=1e-5)


def test_feeding_does_not_touch_other_slots(directory, runner):
    texts = [text(6 + slot, seed=slot) for slot in range(8)]
    for slot in (3, 0, 7, 1, 5, 2, 6, 4):
        runner.feed(slot, texts[slot], 0, 0)
    found = step(runner, [1] * 8, [len(ids) for ids in texts])
    assert all(np.array_equal(found[slot], alone(directory, texts[slot], 1)) for slot in range(8))


def test_decoding_few_leaves_the_others_as_they_are(directory, runner):
    kept = text(9)
    runner.feed(2, kept, 0, 0)
    runner.feed(0, text(4), 0, 0)
    runner.feed(1, text(5), 0, 0)
    for index in range(3):
        step(runner, [1, 2], [4 + index, 5 + index])
    runner.copy(2, 0, 9)
    assert np.array_equal(step(runner, [3], [9])[0], alone(directory, kept, 3))


def test_first_token_of_an_empty_slot(directory, runner):
    runner.feed(0, text(6), 0, 0)
    found = step(runner, [8, 9], [6, 0])
    with contextlib.closing(open_runner(directory)) as fresh:
        fresh.allocate(1, 1)
        assert np.array_equal(found[1], step(fresh, [9], [0])[0])


def test_logits_are_the_callers_own(runner):
    first = runner.feed(0, text(5), 0, 2)
    before = first.copy()
    runner.feed(0, text(5, seed=1), 0, 2)
    assert np.array_equal(first, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda runner: runner.feed(8, text(2), 0, 1), "9 slots of 2 tokens"),
        (lambda runner: runner.feed(0, text(2), 39, 1), "1 slots of 41 tokens"),
        (lambda runner: step(runner, [1, 1], [3, 40]), "2 slots of 41 tokens"),
        (lambda runner: runner.copy(0, 8, 1), "9 slots of 1 tokens"),
        (lambda runner: runner.copy(0, 1, 41), "2 slots of 41 tokens"),
        (lambda runner: runner.allocate(1, CONTEXT + 1), f"this model's context is {CONTEXT}"),
        (lambda runner: runner.feed(0, np.array([VOCABULARY], np.int32), 0, 1), "ONNX Runtime failed on 1 rows"),
    ],
)
def test_what_does_not_fit_is_an_error_and_the_runner_goes_on(directory, runner, call, message):
    ids = text(7)
    runner.feed(0, ids, 0, 0)
    with pytest.raises(EngineError, match=message):
        call(runner)
    assert np.array_equal(step(runner, [3], [7])[0], alone(directory, ids, 3))


def test_closed_runner_says_so(runner):
    runner.close()
    assert runner.slots == 0
    with pytest.raises(EngineError):
        runner.feed(0, text(3), 0, 1)


# Opening.


def test_changed_file_is_refused(directory, tmp_path):
    for name in ("model.onnx", MANIFEST_FILE):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    with (tmp_path / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError, match="SHA-256"):
        open_runner(tmp_path)


def test_variant_that_generates_no_text_is_refused(directory):
    manifest = decoder_manifest(Runtime.ONNX, SPEC).model_copy(update={"decoder": None})
    with pytest.raises(FamilyError, match="generates no text"):
        OnnxDecoder(directory, manifest, EngineOptions())


def test_graph_of_another_kind_is_refused(tmp_path):
    import onnx
    from onnx import helper

    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "model.onnx"
    )
    with pytest.raises(FamilyError, match="no decoder graph"):
        OnnxDecoder(tmp_path, decoder_manifest(Runtime.ONNX, SPEC), EngineOptions())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_is_a_usage_error(directory):
    with pytest.raises(UsageError, match="set device to cpu"):
        open_runner(directory, EngineOptions(device="cuda"))


def test_worker_imports_no_torch():
    code = "import sys, workers.onnx_decoder; assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
