"""The torch runner: transformers' own logits and greedy tokens, for texts of any length side by side."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

from fettle.errors import EngineError, FamilyError, IntegrityError, UsageError
from fettle.family import MANIFEST_FILE, record_files, write_manifest
from fettle.generation import GREEDY, Finish, Prompt, Sampling
from fettle.manifest import DecoderSpec, Precision, Runtime, VariantManifest
from optimize.decoder_load import DecoderReference
from optimize.load import load_reference
from tests.unit.tiny_decoders import (
    ARCHITECTURES,
    CONTEXT,
    PAD_ID,
    TORCH_ONLY,
    VOCABULARY,
    decoder_manifest,
    save_decoder,
    tiny_decoder,
)
from workers import decode_graphs
from workers.engine import EngineOptions, open_runner
from workers.generator import Generator
from workers.speculation import DraftModel, Speculation
from workers.torch_decoder import TorchDecoder

NEW = 20
LENGTHS = (9, 23, 1)
# One on which the longest text of a pass has no influence up to here.
EXACT = {"phi3-partial": 48}


def spec_of(config: hf.PreTrainedConfig, context: int = CONTEXT) -> DecoderSpec:
    heads = config.num_attention_heads
    return DecoderSpec(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        context=context,
    )


def save(directory: Path, model: PreTrainedModel, precision: Precision = Precision.FP32) -> VariantManifest:
    """A variant's directory, as `optimize` leaves it."""
    model.save_pretrained(directory)
    context = EXACT.get("phi3-partial", CONTEXT) if model.config.model_type == "phi3" else CONTEXT
    manifest = decoder_manifest(Runtime.TORCH, spec_of(model.config, context))
    files = {"files": record_files(directory), "precision": precision}
    manifest = manifest.model_copy(update=files)
    write_manifest(directory / MANIFEST_FILE, manifest)
    return manifest


@pytest.fixture(scope="module", params=[*ARCHITECTURES, *TORCH_ONLY])
def case(request, tmp_path_factory) -> tuple[PreTrainedModel, Path]:
    directory = tmp_path_factory.mktemp("variant")
    model = tiny_decoder(request.param)
    save(directory, model)
    return model, directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save(directory, tiny_decoder())
    return directory


@pytest.fixture
def runner(llama) -> Iterator[TorchDecoder]:
    with opened(llama) as runner:
        runner.allocate(8, 40)
        yield runner


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[TorchDecoder]:
    with contextlib.closing(open_runner(directory)) as runner:
        assert isinstance(runner, TorchDecoder)
        yield runner


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, PAD_ID, length).astype(np.int32)


def step(runner: TorchDecoder, tokens: list[int], lengths: list[int]) -> np.ndarray:
    return runner.decode(np.array(tokens, np.int32), np.array(lengths, np.int32))


def plain(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """The model's own logits, float32 [tokens, vocabulary], in one pass without a cache."""
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None].long(), use_cache=False).logits[0].float().numpy()


def generated(model: PreTrainedModel, ids: np.ndarray, new: int) -> list[int]:
    """transformers' greedy tokens."""
    prompt = torch.from_numpy(ids)[None].long()
    output = model.generate(prompt, max_new_tokens=new, do_sample=False, pad_token_id=PAD_ID)
    return output[0, len(ids) :].tolist()


def assert_close(found: np.ndarray, expected: np.ndarray, share: float = 1e-4) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=share * np.abs(expected).max())


def alone(directory: Path, ids: np.ndarray, token: int) -> np.ndarray:
    """Logits after one more token, from a runner that has never seen anything else."""
    with opened(directory) as fresh:
        fresh.allocate(1, len(ids) + 1)
        fresh.feed(0, ids, 0, 0)
        return step(fresh, [token], [len(ids)])[0]


# What transformers itself gives.


def test_logits_of_pieces_are_those_of_one_pass(case):
    model, directory = case
    ids = text(40)
    with opened(directory) as runner:
        runner.allocate(3, 48)
        found = [runner.feed(1, ids[:1], 0, 1), runner.feed(1, ids[1:18], 1, 17), runner.feed(1, ids[18:33], 18, 15)]
        runner.copy(1, 0, 33)
        found += [step(runner, [ids[place]], [place]) for place in range(33, 40)]
    assert_close(np.concatenate(found), plain(model, ids))


def test_texts_of_different_lengths_side_by_side_get_the_greedy_tokens(case):
    model, directory = case
    texts = [text(length, seed=length) for length in LENGTHS]
    with opened(directory) as runner:
        runner.allocate(4, max(LENGTHS) + NEW)
        tokens = []
        for slot, ids in enumerate(texts):
            half = len(ids) // 2
            runner.feed(slot, ids[:half], 0, 0) if half else None
            tokens.append([int(runner.feed(slot, ids[half:], half, 1)[0].argmax())])
        for place in range(NEW - 1):
            logits = step(runner, [each[-1] for each in tokens], [length + place for length in LENGTHS])
            for each, row in zip(tokens, logits, strict=True):
                each.append(int(row.argmax()))
    assert tokens == [generated(model, ids, NEW) for ids in texts]
    for row, (ids, each) in enumerate(zip(texts, tokens, strict=True)):
        assert_close(logits[row], plain(model, np.array([*ids, *each[:-1]], np.int32))[-1])


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_half_precision_is_near(tmp_path, precision):
    model, ids = tiny_decoder(), text(20)
    expected = plain(model, ids)
    save(tmp_path, model.to(torch.bfloat16 if precision is Precision.BF16 else torch.float16), precision)
    with opened(tmp_path) as runner:
        assert runner.bytes_per_token == 2 * 2 * 3 * 2 * 16
        runner.allocate(2, 20)
        found = [runner.feed(0, ids[:19], 0, 19), step(runner, [ids[19]], [19])]
    assert found[0].dtype == found[1].dtype == np.float32
    assert_close(np.concatenate(found), expected, 0.1)


def test_weights_of_the_manifests_precision_are_read_whatever_the_files_have(tmp_path):
    """A checkpoint may be kept in fewer bits than it is run in, and the other way round."""
    save(tmp_path, tiny_decoder().bfloat16())
    rounded = tiny_decoder()
    with torch.no_grad():
        for weight in rounded.parameters():
            weight.copy_(weight.bfloat16())
    with opened(tmp_path) as runner:
        assert runner.bytes_per_token == 4 * 2 * 3 * 2 * 16
        runner.allocate(1, 10)
        assert_close(runner.feed(0, text(10), 0, 10), plain(rounded, text(10)))


# Rows and slots.


def test_each_row_reads_what_it_sees_where_lengths_are_far_apart(tmp_path):
    """One long text among short ones is read by itself (`workers.slot_cache.WORTH`)."""
    model = tiny_decoder("gemma3", max_position_embeddings=1024, sliding_window=50)
    manifest = decoder_manifest(Runtime.TORCH, spec_of(model.config, 1024))
    model.save_pretrained(tmp_path)
    lengths = [700, 20, 3, 90]
    texts = [text(length + 1, seed=length) for length in lengths]
    with contextlib.closing(TorchDecoder(tmp_path, manifest, EngineOptions())) as runner:
        runner.allocate(4, 1024)
        for slot, ids in enumerate(texts):
            runner.feed(slot, ids[:-1], 0, 0)
        found = step(runner, [int(ids[-1]) for ids in texts], lengths)
    for row, ids in zip(found, texts, strict=True):
        assert_close(row, plain(model, ids)[-1])


def test_starts_with_no_room_and_warms_up_without(llama):
    with opened(llama) as fresh:
        assert (fresh.slots, fresh.context, fresh.bytes_per_token) == (0, 0, 4 * 2 * 3 * 2 * 16)
        fresh.warm_up()
        assert (fresh.slots, fresh.context) == (0, 0)
        with pytest.raises(EngineError, match="0 of 0 are allocated"):
            fresh.feed(0, text(3), 0, 1)
        fresh.allocate(3, 9)
        fresh.warm_up()
        assert (fresh.slots, fresh.context) == (3, 9)


def test_more_room_keeps_what_was_there(llama, runner):
    first, second = text(20), text(40, seed=1)
    runner.feed(0, first, 0, 0)
    runner.feed(7, second, 0, 0)
    runner.allocate(11, 56)
    assert (runner.slots, runner.context) == (11, 56)
    runner.copy(7, 1, 40)
    found = step(runner, [4, 5], [20, 40])
    assert_close(found[0], alone(llama, first, 4))
    assert_close(found[1], alone(llama, second, 5))


def test_less_room_keeps_what_it_still_holds(llama, runner):
    first, second = text(10), text(15, seed=1)
    runner.feed(0, first, 0, 0)
    runner.feed(1, second, 0, 0)
    runner.allocate(2, 16)
    found = step(runner, [4, 5], [10, 15])
    assert_close(found[0], alone(llama, first, 4))
    assert_close(found[1], alone(llama, second, 5))
    with pytest.raises(EngineError, match="3 slots of 11 tokens are needed, and 2 of 16"):
        step(runner, [1, 1, 1], [10, 3, 3])


def test_feeding_and_decoding_leave_other_slots_as_they_are(llama, runner):
    kept = text(9)
    runner.feed(2, kept, 0, 0)
    runner.feed(0, text(30, seed=1), 0, 0)
    runner.feed(0, text(4), 0, 0)
    runner.feed(1, text(5), 0, 0)
    for index in range(3):
        step(runner, [1, 2], [4 + index, 5 + index])
    runner.copy(2, 0, 9)
    assert_close(step(runner, [3], [9])[0], alone(llama, kept, 3))


def test_rejected_tokens_are_forgotten_by_going_on_before_them(llama, runner):
    ids = text(14)
    runner.feed(0, ids[:10], 0, 0)
    assert runner.feed(0, np.array([1, 2, 3, 4], np.int32), 10, 4).shape == (4, VOCABULARY)
    assert_close(step(runner, [7], [11])[0], alone(llama, np.append(ids[:10], np.int32(1)), 7))


def test_logits_are_the_callers_own(runner):
    first = runner.feed(0, text(5), 0, 2)
    before = first.copy()
    runner.feed(0, text(5, seed=1), 0, 2)
    assert np.array_equal(first, before)
    assert runner.feed(0, text(5), 0, 0).shape == (0, VOCABULARY)


def test_what_is_no_number_does_not_stay_in_the_slot(tmp_path):
    """Positions that are not there weigh nothing; but nothing times what is no number is no number."""
    model = tiny_decoder(tied=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.inf
    save(tmp_path, model)
    good, bad = text(30) % 7, text(30, seed=1) % 7
    bad[20] = 7
    with opened(tmp_path) as runner:
        runner.allocate(2, 40)
        assert np.isnan(runner.feed(0, bad, 0, 1)).any()
        runner.feed(0, good[:5], 0, 0)
        runner.feed(1, good[:4], 0, 0)
        assert np.isnan(step(runner, [0, 7], [5, 4])[1]).any()
        runner.feed(1, good[:2], 0, 0)
        first, second = step(runner, [1, 2], [6, 2])
    assert_close(first, plain(model, np.array([*good[:5], 0, 1]))[-1])
    assert_close(second, plain(model, np.array([*good[:2], 2]))[-1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda runner: runner.feed(8, text(2), 0, 1), "9 slots of 2 tokens"),
        (lambda runner: runner.feed(0, text(2), 39, 1), "1 slots of 41 tokens"),
        (lambda runner: step(runner, [1, 1], [3, 40]), "2 slots of 41 tokens"),
        (lambda runner: runner.copy(0, 8, 1), "9 slots of 1 tokens"),
        (lambda runner: runner.copy(0, 1, 41), "2 slots of 41 tokens"),
        (lambda runner: runner.allocate(1, CONTEXT + 1), f"this model's context is {CONTEXT}"),
        (lambda runner: runner.feed(0, np.array([VOCABULARY], np.int32), 0, 1), f"tokens are 0 to {VOCABULARY - 1}"),
        (lambda runner: step(runner, [-1], [3]), "-1 to -1 were given"),
    ],
)
def test_what_does_not_fit_is_an_error_and_the_runner_goes_on(
    llama, runner, call: Callable[[TorchDecoder], object], message
):
    ids = text(7)
    runner.feed(0, ids, 0, 0)
    with pytest.raises(EngineError, match=message):
        call(runner)
    assert_close(step(runner, [3], [7])[0], alone(llama, ids, 3))


def test_closed_runner_says_so(runner):
    runner.close()
    assert (runner.slots, runner.context) == (0, 0)
    with pytest.raises(EngineError):
        runner.feed(0, text(3), 0, 1)


# Recorded steps, with a recorder that does it all again.


@pytest.fixture(params=["llama", "gemma2"])
def recorded(request, tmp_path) -> Iterator[tuple[PreTrainedModel, TorchDecoder, list[int]]]:
    model = tiny_decoder(request.param, max_position_embeddings=512)
    model.save_pretrained(tmp_path)
    manifest = decoder_manifest(Runtime.TORCH, spec_of(model.config, 512))
    recordings: list[int] = []

    def recorder(again: Callable[[], None]) -> Callable[[], None]:
        recordings.append(1)
        return again

    with contextlib.closing(TorchDecoder(tmp_path, manifest, EngineOptions(), lambda: recorder)) as runner:
        yield model, runner, recordings


def test_recorded_steps_give_the_same_and_touch_no_slot_that_is_not_theirs(recorded):
    model, runner, recordings = recorded
    runner.allocate(6, 300)
    texts = [text(length, seed=length) for length in (150, 3, 40, 9, 21, 60)]
    for slot, ids in enumerate(texts):
        runner.feed(slot, ids, 0, 0)
    for rows in (3, 5, 1):
        for place in range(2):
            tokens = [int(ids[0]) for ids in texts[:rows]]
            found = step(runner, tokens, [len(ids) for ids in texts[:rows]])
            texts[:rows] = [np.append(ids, ids[0]) for ids in texts[:rows]]
            for row in range(rows):
                assert_close(found[row], plain(model, texts[row])[-1])
            assert place or len(recordings), "a step was recorded"
    assert len(recordings) == 3, "one for 4 rows, one for 6 and one for 1"
    runner.copy(5, 0, 60)
    assert_close(step(runner, [1], [60])[0], plain(model, np.append(texts[5], 1))[-1])


def test_more_room_forgets_recordings(recorded):
    model, runner, _ = recorded
    runner.allocate(1, 20)
    ids = text(15)
    runner.feed(0, ids, 0, 0)
    step(runner, [1], [15])
    runner.allocate(3, 40)
    assert runner.slots == 3
    assert_close(step(runner, [2], [16])[0], plain(model, np.array([*ids, 1, 2]))[-1])


def test_a_step_that_cannot_be_recorded_runs_unrecorded(llama):
    def recorder(again: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    manifest = decoder_manifest(Runtime.TORCH, spec_of(tiny_decoder().config))
    with contextlib.closing(TorchDecoder(llama, manifest, EngineOptions(), lambda: recorder)) as runner:
        runner.allocate(2, 20)
        runner.feed(0, text(9), 0, 0)
        with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
            found = step(runner, [1], [9])
        assert_close(found[0], alone(llama, text(9), 1))
        runner.allocate(2, 30)
        assert_close(step(runner, [1], [9])[0], alone(llama, text(9), 1))


def test_shapes_of_recordings_are_few():
    assert [decode_graphs.rounded_rows(rows, 30) for rows in (1, 2, 3, 5, 8, 9, 16, 17, 29, 30)] == [
        *[1, 2, 4, 8, 8, 16, 16, 24, 30, 30]
    ]
    assert [decode_graphs.rounded_length(length, 1000) for length in (1, 128, 129, 513, 1000)] == [
        *[128, 128, 256, 1000, 1000]
    ]


# Under the generator.


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_generator_gives_the_greedy_tokens_in_any_order_of_arrival(name, tmp_path):
    """With prompts in pieces, known beginnings, slots that are taken away, and guesses."""
    model = tiny_decoder(name)
    save(tmp_path, model)
    chance = random.Random(3)
    head = text(12, seed=99)
    prompts = []
    for number in range(8):
        ids = text(chance.randint(1, 25), seed=number)
        ids = np.concatenate([head, ids]) if number % 3 else ids
        prompts.append(Prompt(str(number), ids, chance.randint(1, 25), GREEDY, priority=1 - number % 2))
    last = Prompt("last", text(9, seed=50), 20, GREEDY)
    with opened(tmp_path) as runner, opened(tmp_path) as other:
        speculation = Speculation([DraftModel(other, CONTEXT)])
        generator = Generator(runner, 150 * runner.bytes_per_token, max_slots=4, chunk=10, speculation=speculation)
        tokens: dict[str, list[int]] = {each.id: [] for each in (*prompts, last)}
        ends: dict[str, Finish | None] = {}
        left = list(prompts)
        while left or generator.busy:
            if left:
                generator.submit(left.pop(0))
            for _ in range(chance.choice([0, 1, 4]) if left else 1):
                collect(generator, tokens, ends)
        generator.submit(last)
        while generator.busy:
            collect(generator, tokens, ends)
        stats = generator.stats
    for each in (*prompts, last):
        assert tokens[each.id] == generated(model, each.ids, each.max_tokens)
        assert ends[each.id] is Finish.LENGTH
    assert min(stats.reused_tokens, stats.preempted, stats.accepted) > 0


def collect(generator: Generator, tokens: dict[str, list[int]], ends: dict[str, Finish | None]) -> None:
    for told in generator.step():
        assert told.error is None
        tokens[told.id] += [token.id for token in told.tokens]
        ends[told.id] = told.finish


def test_sampled_text_does_not_change_with_the_texts_beside_it(llama):
    """It may where two tokens' shares lie within rounding, about once in 100,000 tokens; not here."""

    def sampled(others: int) -> list[int]:
        prompts = [Prompt("it", text(9), 30, Sampling(seed=4, temperature=0.8, top_p=0.9))]
        prompts += [Prompt(str(number), text(5 + number, seed=number), 30, GREEDY) for number in range(others)]
        with opened(llama) as runner:
            generator = Generator(runner, 1000 * runner.bytes_per_token)
            for each in reversed(prompts):
                generator.submit(each)
            found: list[int] = []
            while generator.busy:
                found += [token.id for told in generator.step() if told.id == "it" for token in told.tokens]
        return found

    assert sampled(0) == sampled(5)


# Opening.


def test_changed_file_is_refused(llama, tmp_path):
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError, match="SHA-256"):
        open_runner(tmp_path)


def manifest_of(config: hf.PreTrainedConfig, **changes: object) -> VariantManifest:
    return decoder_manifest(Runtime.TORCH, spec_of(config)).model_copy(update=changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"decoder": None}, FamilyError, "generates no text"),
        ({"precision": Precision.INT4}, UsageError, "torch does not run precision int4"),
        ({"decoder": DecoderSpec(layers=3, kv_heads=2, head_dim=16, context=CONTEXT + 1)}, FamilyError, "beyond 64"),
        ({"decoder": DecoderSpec(layers=2, kv_heads=2, head_dim=16, context=CONTEXT)}, FamilyError, "over slots"),
        ({"decoder": DecoderSpec(layers=3, kv_heads=4, head_dim=16, context=CONTEXT)}, FamilyError, "over slots"),
    ],
)
def test_manifest_that_the_files_do_not_fit_is_refused(llama, changes, error, message):
    with pytest.raises(error, match=message):
        TorchDecoder(llama, manifest_of(tiny_decoder().config, **changes), EngineOptions())


def test_context_in_which_angles_depend_on_the_longest_text_is_refused(tmp_path):
    model = tiny_decoder("phi3-partial")
    model.save_pretrained(tmp_path)
    with pytest.raises(FamilyError, match="beyond 48 a text's tokens would depend"):
        TorchDecoder(tmp_path, manifest_of(model.config), EngineOptions())


def test_reference_is_loaded_with_the_context_that_its_engine_is_exact_in(tmp_path):
    reference = load_reference(str(save_decoder(tmp_path, "phi3-partial")))
    assert isinstance(reference, DecoderReference)
    assert reference.decoder.context == 48


def test_missing_weights_and_damaged_files_are_refused(tmp_path):
    model = tiny_decoder()
    state = {name: weight for name, weight in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(FamilyError, match=r"weights are missing: model.layers.1.mlp.up_proj.weight"):
        TorchDecoder(tmp_path, manifest_of(model.config), EngineOptions())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(FamilyError, match="cannot load this variant"):
        TorchDecoder(tmp_path, manifest_of(model.config), EngineOptions())


UNFIT = {
    "mamba": (hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2), "does not run over slots"),
    "bloom": (hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2), "over slots"),
    "gpt-oss": (
        hf.GptOssConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
        ),
        "other logits over slots",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_architecture_that_reads_its_past_otherwise_is_refused(name, tmp_path):
    """Which ones are not listed: the logits over slots are compared with the model's own when it is opened."""
    config, message = UNFIT[name]
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    spec = DecoderSpec(layers=2, kv_heads=2, head_dim=16, context=20)
    with pytest.raises(FamilyError, match=message):
        TorchDecoder(tmp_path, decoder_manifest(Runtime.TORCH, spec), EngineOptions())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_is_a_usage_error(llama):
    with pytest.raises(UsageError, match="set device to cpu"):
        open_runner(llama, EngineOptions(device="cuda"))


def test_checkpoint_of_a_user_opens_as_it_is(tmp_path):
    """Tokenizer files and generation settings beside the weights do not matter."""
    save_decoder(tmp_path, "qwen3")
    model = tiny_decoder("qwen3")
    with contextlib.closing(TorchDecoder(tmp_path, manifest_of(model.config), EngineOptions())) as runner:
        runner.allocate(1, 8)
        assert_close(runner.feed(0, text(8), 0, 8), plain(model, text(8)))
