"""Language models as references: what is read out of a checkpoint, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer

from fettle.chat import Chat
from fettle.errors import ModelError
from fettle.manifest import DecoderSpec, TaskKind
from optimize.decoder_load import DecoderReference
from optimize.load import load_reference
from tests.unit import tiny_decoders, tiny_models


def loaded(source: Path, task: TaskKind | None = None) -> DecoderReference:
    reference = load_reference(str(source), task=task)
    assert isinstance(reference, DecoderReference)
    return reference


def edit(source: Path, name: str, **values: object) -> None:
    path = source / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def end_tokens(source: Path, generation: object, config: object) -> list[int]:
    edit(source, "config.json", eos_token_id=config)
    (source / "generation_config.json").unlink()
    if generation is not None:
        edit(source, "generation_config.json", eos_token_id=generation)
    return loaded(source).task.end_ids


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_decoders.save_decoder(tmp_path / "lm")


@pytest.mark.parametrize("task", [None, TaskKind.GENERATE])
def test_a_language_model_is_a_reference_that_generates(source: Path, task: TaskKind | None):
    reference = loaded(source, task)
    assert reference.task.kind is TaskKind.GENERATE
    assert reference.task.width == reference.tokenizer.vocabulary == tiny_decoders.VOCABULARY
    assert reference.tokenizer.max_length == tiny_decoders.CONTEXT
    assert reference.tokenizer.pad_id == tiny_decoders.PAD_ID
    assert reference.decoder == DecoderSpec(layers=3, kv_heads=2, head_dim=16, context=tiny_decoders.CONTEXT)
    assert reference.source.architecture == "LlamaForCausalLM"
    assert {weight.dtype for weight in reference.language.parameters()} == {torch.float32}
    assert not any(weight.requires_grad for weight in reference.language.parameters())


def test_weights_in_bfloat16_are_read_as_float32(source: Path):
    before = loaded(source).language.get_input_embeddings().weight
    hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    after = loaded(source).language.get_input_embeddings().weight
    assert after.dtype == torch.float32
    assert torch.equal(after, before.bfloat16().float())


def test_the_scorer_gives_the_next_tokens_logits_whatever_the_padding(source: Path):
    reference = loaded(source)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    values = reference.model(ids, mask)
    alone = reference.language(input_ids=ids[1:, :2]).logits[:, -1]
    assert values.shape == (2, tiny_decoders.VOCABULARY)
    torch.testing.assert_close(values[1:], alone, rtol=1e-4, atol=1e-4)


def test_the_chat_template_renders_as_the_tokenizer_does(source: Path):
    reference = loaded(source)
    assert reference.chat is not None
    messages = [{"role": "user", "content": "hello"}]
    tokenizer = hf.AutoTokenizer.from_pretrained(source)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert Chat(reference.chat).render(messages) == expected


def test_a_template_in_a_file_of_its_own_counts_for_the_fingerprint(source: Path):
    assert (source / "chat_template.jinja").exists()
    before = loaded(source)
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    after = loaded(source)
    assert after.chat is not None
    assert after.chat.source == "{{ messages[0]['content'] }}"
    assert after.source.sha256 != before.source.sha256


def test_without_a_template_prompts_stand_as_they_are(source: Path):
    (source / "chat_template.jinja").unlink()
    reference = loaded(source)
    assert reference.chat is None
    assert "no chat template" in str(reference.notes["chat"])


def test_the_tokenizer_neither_pads_nor_cuts(source: Path):
    tokenizer = hf.AutoTokenizer.from_pretrained(source)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(source)
    fast = Tokenizer.from_str(loaded(source).tokenizer_json.decode())
    assert [len(row.ids) for row in fast.encode_batch(["a", "abcde"])] == [1, 5]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([7, tiny_decoders.END_ID, 7], 9, [tiny_decoders.END_ID, 7]),
        (8, 9, [8]),
        (None, 9, [9]),
        (None, [9, 3], [9, 3]),
        (None, None, [tiny_decoders.END_ID]),
        ([5, 100_000], None, [5]),
    ],
)
def test_end_tokens_come_from_where_generate_takes_them(
    source: Path, generation: object, config: object, expected: list[int]
):
    assert end_tokens(source, generation, config) == expected


def test_no_end_token_anywhere_is_noted(source: Path):
    edit(source, "tokenizer_config.json", eos_token=None)
    assert end_tokens(source, None, None) == []
    reference = loaded(source)
    assert reference.end_id is None
    assert "no end token" in str(reference.notes["end"])


def test_gpt2_with_its_own_names_is_read(tmp_path: Path):
    config = hf.GPT2Config(
        vocab_size=tiny_decoders.VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=24, eos_token_id=3
    )
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tiny_decoders.tiny_tokenizer().save_pretrained(tmp_path)
    reference = loaded(tmp_path)
    assert reference.decoder == DecoderSpec(layers=2, kv_heads=4, head_dim=8, context=24)
    assert reference.layers == 2


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "quantized": (
        lambda source: edit(source, "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantized already",
    ),
    "pickle": (lambda source: (source / "model.safetensors").rename(source / "pytorch_model.bin"), "pickle"),
    "missing weights": (lambda source: edit(source, "config.json", num_hidden_layers=4), "the weights lack"),
    "damaged weights": (lambda source: (source / "model.safetensors").write_bytes(b"x" * 99), "cannot load"),
    "remote code": (
        lambda source: edit(source, "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        "never runs",
    ),
    "state space": (
        lambda source: hf.MambaConfig(architectures=["MambaForCausalLM"]).save_pretrained(source),
        "no keys and values",
    ),
    "broken template": (
        lambda source: (source / "chat_template.jinja").write_text("{% for m in messages %}"),
        "does not compile",
    ),
    "small vocabulary": (
        lambda source: tiny_decoders.tiny_decoder(vocab_size=32, pad_token_id=0).save_pretrained(source),
        "do not belong together",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused(source: Path, case: str):
    change, message = REFUSED[case]
    change(source)
    with pytest.raises(ModelError, match=message):
        load_reference(str(source))


@pytest.mark.parametrize("task", [TaskKind.CLASSIFY, TaskKind.EMBED])
def test_a_language_model_is_for_nothing_else(source: Path, task: TaskKind):
    with pytest.raises(ModelError, match="language model"):
        load_reference(str(source), task=task)


def test_an_encoder_generates_nothing(tmp_path: Path):
    with pytest.raises(ModelError, match="generates no text"):
        load_reference(str(tiny_models.classifier(tmp_path / "m")), task=TaskKind.GENERATE)
