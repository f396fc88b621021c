"""What `load_reference` reads out of a checkpoint, and every way in which it refuses one."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from fettle.errors import ModelError
from fettle.manifest import Head, TaskKind
from optimize.load import load_reference
from tests.unit import tiny_models


def edit_config(directory, **changes) -> None:
    path = directory / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("problem", "width", "head"),
    [
        (None, 4, Head.SINGLE_LABEL),
        ("single_label_classification", 2, Head.SINGLE_LABEL),
        ("multi_label_classification", 3, Head.MULTI_LABEL),
        (None, 1, Head.REGRESSION),
        ("regression", 2, Head.REGRESSION),
    ],
)
def test_head_and_labels(tmp_path, problem, width, head):
    reference = load_reference(str(tiny_models.classifier(tmp_path / "m", problem=problem, width=width)))
    task = reference.task
    assert (task.kind, task.head, task.width) == (TaskKind.CLASSIFY, head, width)
    assert task.labels == tiny_models.LABELS[:width]
    assert reference.source.architecture == "BertForSequenceClassification"


@pytest.mark.parametrize("old_keys", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_transformers_directories(tmp_path, pooling, old_keys, normalize):
    source = tiny_models.sentence_transformer(
        tmp_path / "m", pooling, old_keys=old_keys, normalize=normalize, max_length=12
    )
    reference = load_reference(str(source))
    assert (reference.task.kind, reference.task.pooling) == (TaskKind.EMBED, pooling)
    assert (reference.task.normalized, reference.task.width) == (normalize, 32)
    assert reference.tokenizer.max_length == 12
    assert "pooling" not in reference.notes


def test_bare_encoder_says_what_it_assumed(tmp_path):
    reference = load_reference(str(tiny_models.encoder(tmp_path / "m")))
    assert (reference.task.pooling, reference.task.normalized) == ("mean", True)
    assert "mean" in reference.notes["pooling"]


def test_classifier_can_be_used_for_embeddings(tmp_path):
    reference = load_reference(str(tiny_models.classifier(tmp_path / "m")), task=TaskKind.EMBED)
    assert (reference.task.kind, reference.task.width) == (TaskKind.EMBED, 32)


@pytest.mark.parametrize(
    ("name", "limit", "segments"),
    [
        ("bert", 40, True),
        ("roberta", 39, False),
        ("mpnet", 38, False),
        ("xlm-roberta", 39, False),
        ("electra", 40, True),
        ("deberta-v2", 40, False),
        ("modernbert", 40, False),
    ],
)
def test_limits_and_segments(tmp_path, name, limit, segments):
    # The reserved positions follow the padding index: 0 here, and 1 in MPNet whatever the configuration says.
    spec = load_reference(str(tiny_models.classifier(tmp_path / "m", name))).tokenizer
    assert (spec.max_length, spec.segments, spec.vocabulary) == (limit, segments, tiny_models.VOCABULARY)


def test_tokenizer_limit_counts(tmp_path):
    source = tiny_models.classifier(tmp_path / "m")
    tiny_models.save_tokenizer(source, max_length=16)
    assert load_reference(str(source)).tokenizer.max_length == 16


def test_half_precision_checkpoint_becomes_float32(tmp_path):
    source = tiny_models.classifier(tmp_path / "m")
    hf.AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float16).save_pretrained(source)
    reference = load_reference(str(source))
    assert {weight.dtype for weight in reference.model.parameters()} == {torch.float32}
    assert not reference.model.training


def test_tokenizer_is_delivered_without_padding_and_truncation(tmp_path):
    fast = Tokenizer.from_str(load_reference(str(tiny_models.classifier(tmp_path / "m"))).tokenizer_json.decode())
    assert fast.padding is None
    assert fast.truncation is None
    assert fast.encode("aa ab").tokens == ["<s>", "aa", "ab", "</s>"]
    assert fast.encode("aa", "ab").type_ids == [0, 0, 0, 1, 1]


def test_lowercasing_of_sentence_transformers_is_kept(tmp_path):
    source = tiny_models.sentence_transformer(tmp_path / "m", max_length=12)
    tiny_models.write_json(source / "sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": True})
    fast = Tokenizer.from_str(load_reference(str(source)).tokenizer_json.decode())
    assert fast.encode("AA").tokens == ["<s>", "aa", "</s>"]


def test_padding_token_falls_back_to_the_configuration(tmp_path):
    source = tiny_models.classifier(tmp_path / "m")
    tiny_models.save_tokenizer(source, pad=False)
    reference = load_reference(str(source))
    assert reference.tokenizer.pad_id == tiny_models.PAD
    assert "padding" in reference.notes


def test_fingerprint_follows_the_content(tmp_path):
    source = tiny_models.classifier(tmp_path / "m")
    before = load_reference(str(source)).source.sha256
    assert load_reference(str(source)).source.sha256 == before
    weights = load_file(source / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + 1
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    assert load_reference(str(source)).source.sha256 != before


def drop_classifier(source) -> None:
    weights = load_file(source / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("classifier")}
    save_file(kept, source / "model.safetensors", {"format": "pt"})


def only_pickle(source) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"")


def no_tokenizer(source) -> None:
    for path in source.glob("*token*"):
        path.unlink()


BAD_CHECKPOINTS = {
    "no config": (lambda source: (source / "config.json").unlink(), "no config.json"),
    "broken config": (lambda source: (source / "config.json").write_text("{"), "cannot be read as JSON"),
    "unknown model": (lambda source: edit_config(source, model_type="nonesuch"), "does not know this model"),
    "remote code": (
        lambda source: edit_config(source, model_type="nonesuch", auto_map={"AutoConfig": "a.B"}),
        "never runs",
    ),
    "no weights": (lambda source: (source / "model.safetensors").unlink(), "no weights"),
    "pickle": (only_pickle, "pickle"),
    "no head": (drop_classifier, "the weights lack classifier.bias and 1 more"),
    "head of another size": (
        lambda source: edit_config(source, id2label={"0": "a", "1": "b"}, label2id=None),
        "weights",
    ),
    "damaged weights": (
        lambda source: (source / "model.safetensors").write_bytes(b"x" * 99),
        "cannot load the weights",
    ),
    "language model": (lambda source: edit_config(source, architectures=["GPT2LMHeadModel"]), "language model"),
    "token classifier": (
        lambda source: edit_config(source, architectures=["BertForTokenClassification"]),
        "not served",
    ),
    "no tokenizer": (no_tokenizer, "okenizer"),
    "foreign tokenizer": (lambda source: edit_config(source, vocab_size=10), "weights"),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_refused_by_name(tmp_path, name):
    damage, message = BAD_CHECKPOINTS[name]
    source = tiny_models.classifier(tmp_path / "m")
    damage(source)
    with pytest.raises(ModelError, match=message):
        load_reference(str(source))


@pytest.mark.parametrize(
    ("source", "message"),
    [("./nowhere", "no such directory"), ("/a/b/c", "no such directory"), ("not a name", "not a hub id")],
)
def test_missing_path_is_refused(source, message):
    with pytest.raises(ModelError, match=message):
        load_reference(source)


def test_unreachable_hub_is_refused(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("optimize.source.snapshot_download", fail)
    with pytest.raises(ModelError, match="hub did not deliver"):
        load_reference("someone/something")


def test_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        load_reference(str(path))


def test_unsupported_sentence_transformers_modules_are_refused(tmp_path):
    source = tiny_models.sentence_transformer(tmp_path / "dense", extra_module="Dense")
    with pytest.raises(ModelError, match="Dense"):
        load_reference(str(source))
    source = tiny_models.sentence_transformer(tmp_path / "last", "lasttoken")
    with pytest.raises(ModelError, match="lasttoken"):
        load_reference(str(source))
    tiny_models.write_json(source / "config_sentence_transformers.json", {"model_type": "SparseEncoder"})
    with pytest.raises(ModelError, match="SparseEncoder"):
        load_reference(str(source))


def test_classification_without_a_head_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no classification head"):
        load_reference(str(tiny_models.encoder(tmp_path / "m")), task=TaskKind.CLASSIFY)
