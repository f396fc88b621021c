"""The torch runner on CUDA: the logits and tokens of the CPU, step by step and from recorded graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fettle.errors import EngineError
from fettle.generation import GREEDY, Prompt
from fettle.manifest import Precision, Runtime, VariantManifest
from tests.unit.test_torch_decoder import assert_close, generated, plain, spec_of, text
from tests.unit.tiny_decoders import VOCABULARY, decoder_manifest, tiny_decoder
from workers.decode_graphs import CudaRecorder
from workers.engine import EngineOptions
from workers.generator import Generator
from workers.torch_decoder import TorchDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]
CONTEXT = 512
CUDA = EngineOptions(device="cuda")
# Other orders of summation.
TOLERANCE = 1e-3


class Counting:
    """Records as ever, and counts."""

    made = 0

    def __init__(self) -> None:
        self._recorder = CudaRecorder()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        Counting.made += 1
        return self._recorder(step)


def variant(directory: Path, name: str, precision: Precision = Precision.FP32) -> VariantManifest:
    model = tiny_decoder(name, max_position_embeddings=CONTEXT)
    model.save_pretrained(directory)
    manifest = decoder_manifest(Runtime.TORCH, spec_of(model.config, CONTEXT))
    return manifest.model_copy(update={"precision": precision})


@contextlib.contextmanager
def opened(directory: Path, manifest: VariantManifest) -> Iterator[TorchDecoder]:
    Counting.made = 0
    with contextlib.closing(TorchDecoder(directory, manifest, CUDA, Counting)) as runner:
        yield runner


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "phi3", "smollm3", "gemma2", "gemma3", "gpt2"])
def test_recorded_steps_give_the_models_logits(tmp_path, name):
    manifest = variant(tmp_path, name)
    model = tiny_decoder(name, max_position_embeddings=CONTEXT)
    texts = [text(length, seed=length) for length in (150, 3, 40, 9, 21, 60)]
    with opened(tmp_path, manifest) as runner:
        runner.warm_up()
        runner.allocate(6, 300)
        for slot, ids in enumerate(texts):
            assert_close(runner.feed(slot, ids, 0, 1)[0], plain(model, ids)[-1], TOLERANCE)
        for rows in (3, 5, 1, 3):
            for _ in range(2):
                tokens = np.array([ids[0] for ids in texts[:rows]], np.int32)
                found = runner.decode(tokens, np.array([len(ids) for ids in texts[:rows]], np.int32))
                texts[:rows] = [np.append(ids, ids[0]) for ids in texts[:rows]]
                for row in range(rows):
                    assert_close(found[row], plain(model, texts[row])[-1], TOLERANCE)
        runner.copy(5, 0, 60)
        found = runner.decode(np.array([1], np.int32), np.array([60], np.int32))
        assert_close(found[0], plain(model, np.append(texts[5], 1))[-1], TOLERANCE)
    assert Counting.made >= 3, "1, 4 and 6 rows"


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_half_precision_is_near(tmp_path, precision):
    manifest, ids = variant(tmp_path, "llama", precision), text(40)
    with opened(tmp_path, manifest) as runner:
        runner.allocate(2, 64)
        found = [runner.feed(0, ids[:39], 0, 39), runner.decode(ids[39:], np.array([39], np.int32))]
    expected = plain(tiny_decoder("llama", max_position_embeddings=CONTEXT), ids)
    assert_close(np.concatenate(found), expected, 0.1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_generator_gives_the_greedy_tokens(tmp_path, name):
    """Slots grow and are taken away, so that steps are recorded again and again."""
    manifest = variant(tmp_path, name)
    model = tiny_decoder(name, max_position_embeddings=CONTEXT)
    prompts = [Prompt(str(number), text(5 + 17 * number, seed=number), 40, GREEDY) for number in range(7)]
    tokens: dict[str, list[int]] = {each.id: [] for each in prompts}
    with opened(tmp_path, manifest) as runner:
        generator = Generator(runner, 600 * runner.bytes_per_token, max_slots=4, chunk=32)
        for each in prompts:
            generator.submit(each)
            for told in generator.step():
                tokens[told.id] += [token.id for token in told.tokens]
        while generator.busy:
            for told in generator.step():
                assert told.error is None
                tokens[told.id] += [token.id for token in told.tokens]
    for each in prompts:
        assert tokens[each.id] == generated(model, each.ids, each.max_tokens)


def test_unknown_token_does_not_cost_the_device(tmp_path):
    manifest = variant(tmp_path, "llama")
    with opened(tmp_path, manifest) as runner:
        runner.allocate(1, 20)
        with pytest.raises(EngineError, match="tokens are"):
            runner.feed(0, np.array([VOCABULARY], np.int32), 0, 1)
        assert np.isfinite(runner.feed(0, text(5), 0, 1)).all()


def test_closing_gives_the_memory_back(tmp_path):
    manifest = variant(tmp_path, "llama")
    before = torch.cuda.memory_allocated()
    with opened(tmp_path, manifest) as runner:
        runner.allocate(64, CONTEXT)
        runner.feed(0, text(30), 0, 0)
        runner.decode(np.array([1], np.int32), np.array([30], np.int32))
        assert torch.cuda.memory_allocated() - before > 64 * CONTEXT * runner.bytes_per_token
    del runner
    assert torch.cuda.memory_allocated() - before < 2**20
