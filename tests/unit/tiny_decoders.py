"""Tiny random language models of every architecture that has an ONNX decoder graph, and a byte-level tokenizer.

Weights are drawn wide, norms and biases too, so that logits lie apart and a wrong graph cannot pass by chance.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fettle.manifest import (
    DecoderSpec,
    PassRecord,
    Precision,
    Runtime,
    Task,
    TaskKind,
    TokenizerSpec,
    VariantManifest,
)

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
END, PAD = "<|end|>", "<|pad|>"
PAIRS = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("Ġ", "the")]
VOCABULARY = len(BYTES) + len(PAIRS) + 2
END_ID, PAD_ID = VOCABULARY - 2, VOCABULARY - 1
CONTEXT = 64
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": END_ID,
    "eos_token_id": END_ID,
    "pad_token_id": PAD_ID,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
    "original_max_position_embeddings": 48,
    "partial_rotary_factor": 0.5,
}
LONGROPE_CONTEXT = {"original_max_position_embeddings": 48, "rope_parameters": LONGROPE}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7, "layer_types": SLIDING}

# Name, configuration, and what differs from SIZES. Head sizes are multiples of 16, as ONNX Runtime wants them.
ARCHITECTURES: dict[str, tuple[type[hf.PreTrainedConfig], dict[str, object]]] = {
    "llama": (hf.LlamaConfig, {"head_dim": 16}),
    "llama-biased": (hf.LlamaConfig, {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "llama3-scaled": (hf.LlamaConfig, {"head_dim": 16, "rope_parameters": LLAMA3}),
    "llama-yarn": (hf.LlamaConfig, {"head_dim": 16, "rope_parameters": YARN}),
    "llama-multi-head": (hf.LlamaConfig, {"head_dim": 16, "num_key_value_heads": 4}),
    "mistral": (hf.MistralConfig, {"head_dim": 16, "sliding_window": 6}),
    "qwen2": (hf.Qwen2Config, {"hidden_size": 64}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 16}),
    "smollm3": (hf.SmolLM3Config, {"hidden_size": 64, "no_rope_layers": [1, 0, 1]}),
    "phi3": (hf.Phi3Config, {"hidden_size": 64, "sliding_window": None}),
    "phi3-partial": (hf.Phi3Config, {"hidden_size": 128, "sliding_window": 9, **LONGROPE_CONTEXT}),
    "gemma2": (hf.Gemma2Config, {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": (hf.Gemma3TextConfig, GEMMA),
}
# What has no decoder graph, and runs on torch only. They know no heads that share keys, or experts, or chunks.
TORCH_ONLY: dict[str, tuple[type[hf.PreTrainedConfig], dict[str, object]]] = {
    "gpt2": (hf.GPT2Config, {"num_key_value_heads": None}),
    "gpt-neox": (hf.GPTNeoXConfig, {"num_key_value_heads": None}),
    "opt": (hf.OPTConfig, {"num_key_value_heads": None, "ffn_dim": 64, "word_embed_proj_dim": 48}),
    "mixtral": (hf.MixtralConfig, {"head_dim": 16, "num_local_experts": 4, "sliding_window": 6}),
    "llama4": (
        hf.Llama4TextConfig,
        {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 6},
    ),
}


def tiny_decoder(name: str = "llama", *, tied: bool = True, seed: int = 0, **settings: object) -> hf.PreTrainedModel:
    kind, extra = (ARCHITECTURES | TORCH_ONLY)[name]
    config = kind(**{**SIZES, **extra, "tie_word_embeddings": tied, **settings})
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            gain = weight.ndim == 1 and path.endswith("weight") and "gemma" not in config.model_type
            spread = 0.3 if weight.ndim > 1 else 0.1
            weight.copy_(float(gain) + torch.randn(weight.shape, generator=generator) * spread)
    # Generation goes on past the end token unless a test wants otherwise.
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


def tiny_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, an end token, a padding token and a chat template."""
    merged = [first + second for first, second in PAIRS]
    vocabulary = {word: index for index, word in enumerate([*BYTES, *merged])}
    fast = Tokenizer(models.BPE(vocabulary, PAIRS))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([END, PAD])
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = CHAT
    return tokenizer


def save_decoder(directory: Path, name: str = "llama", **settings: object) -> Path:
    """A checkpoint as a user would give it."""
    tiny_decoder(name, **settings).save_pretrained(directory)  # type: ignore[arg-type]
    tiny_tokenizer().save_pretrained(directory)
    return directory


def decoder_manifest(runtime: Runtime, spec: DecoderSpec, recipe: list[PassRecord] | None = None) -> VariantManifest:
    return VariantManifest(
        id="tiny",
        runtime=runtime,
        precision=Precision.FP32,
        recipe=recipe or [],
        tokenizer=TokenizerSpec(max_length=spec.context, vocabulary=VOCABULARY, pad_id=PAD_ID, segments=False),
        task=Task(kind=TaskKind.GENERATE, width=VOCABULARY, end_ids=[END_ID]),
        files=[],
        decoder=spec,
    )
