"""Random weights in the shapes of real language models: speed does not depend on what a model has learnt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

TOKENIZER = Path("examples/data/debian-lm")
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def random_model(directory: Path, shape: dict[str, object] | None = None) -> Path:
    """A Llama checkpoint with a tokenizer whose vocabulary has the size of the model's; made once.

    The tokenizer is the demo's: texts are cut as it cuts them, and tokens that it has not are words of their own that
    no text contains.
    """
    if (directory / "model.safetensors").exists():
        return directory
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMOLLM2_135M, **(shape or {})})
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    for path in TOKENIZER.glob("*token*"):
        shutil.copyfile(path, directory / path.name)
    for path in TOKENIZER.glob("*.jinja"):
        shutil.copyfile(path, directory / path.name)
    content = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    known = max(vocabulary.values(), default=-1)
    known = max([known, *(token["id"] for token in content["added_tokens"])])
    for number in range(known + 1, config.vocab_size):
        vocabulary[f"x{number}"] = number
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    return directory
