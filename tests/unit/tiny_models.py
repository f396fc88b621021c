"""Tiny random checkpoints of every architecture that Fettle promises, with a tiny fast tokenizer. No network.

Weights are drawn wide (standard deviation 0.3), so that logits lie apart and a wrong graph cannot pass by chance.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
DISTILBERT_SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
WORDS = [chr(97 + first) + chr(97 + second) for first in range(9) for second in range(9)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
VOCABULARY = len(SPECIAL) + len(WORDS)
PAD = 0
LABELS = ["red", "green", "blue", "grey"]
# RoBERTa, XLM-R and MPNet keep PAD + 1 positions back.
POSITIONS = 40

CLASSIFIERS = {
    "bert": (hf.BertConfig, hf.BertForSequenceClassification, {}),
    "roberta": (hf.RobertaConfig, hf.RobertaForSequenceClassification, {"type_vocab_size": 1}),
    "distilbert": (hf.DistilBertConfig, hf.DistilBertForSequenceClassification, {}),
    "albert": (hf.AlbertConfig, hf.AlbertForSequenceClassification, {"embedding_size": 16}),
    "electra": (hf.ElectraConfig, hf.ElectraForSequenceClassification, {"embedding_size": 16}),
    "mpnet": (hf.MPNetConfig, hf.MPNetForSequenceClassification, {}),
    "xlm-roberta": (hf.XLMRobertaConfig, hf.XLMRobertaForSequenceClassification, {"type_vocab_size": 1}),
    "deberta-v2": (
        hf.DebertaV2Config,
        hf.DebertaV2ForSequenceClassification,
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
            "pooler_hidden_size": 32,
        },
    ),
    "modernbert": (
        hf.ModernBertConfig,
        hf.ModernBertForSequenceClassification,
        {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
}


def save_tokenizer(directory: Path, *, pad: bool = True, max_length: int | None = None) -> None:
    """A word-level tokenizer with `<s> a </s>` and `<s> a </s> b </s>`, segments 0 and 1."""
    fast = Tokenizer(models.WordLevel({word: index for index, word in enumerate(SPECIAL + WORDS)}, "<unk>"))
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>"} if pad else {}
    limit = {} if max_length is None else {"model_max_length": max_length}
    hf.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        **names,
        **limit,
    ).save_pretrained(directory)


def config_of(name: str, **settings: object) -> hf.PreTrainedConfig:
    kind, _, extra = CLASSIFIERS[name]
    sizes = DISTILBERT_SIZES if name == "distilbert" else SIZES
    shared = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "max_position_embeddings": POSITIONS}
    return kind(**sizes, **shared, **extra, **settings)


def classifier(directory: Path, name: str = "bert", *, problem: str | None = None, width: int = 4) -> Path:
    labels = LABELS[:width]
    config = config_of(
        name,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type=problem,
    )
    return _save(directory, CLASSIFIERS[name][1](config))


def encoder(directory: Path, name: str = "bert") -> Path:
    """A bare encoder, as `AutoModel` saves it."""
    return _save(directory, hf.AutoModel.from_config(config_of(name)))


def sentence_transformer(
    directory: Path,
    pooling: str = "mean",
    *,
    normalize: bool = True,
    old_keys: bool = False,
    max_length: int | None = None,
    extra_module: str | None = None,
) -> Path:
    encoder(directory)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    kinds += [(f"2_{extra_module}", extra_module)] if extra_module else []
    kinds += [("3_Normalize", "Normalize")] if normalize else []
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    names = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    settings = (
        {f"pooling_mode_{key}": mode == pooling for mode, key in names.items()}
        if old_keys
        else {"pooling_mode": pooling}
    )
    (directory / "1_Pooling").mkdir()
    write_json(directory / "modules.json", modules)
    write_json(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **settings})
    if max_length is not None:
        write_json(directory / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    return directory


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def _save(directory: Path, model: hf.PreTrainedModel) -> Path:
    # Seeded by hand, since every architecture initialises in its own way.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
            elif name.endswith("bias"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory
