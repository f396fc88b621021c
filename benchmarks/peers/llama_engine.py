"""llama.cpp through llama-cpp-python's low-level API: one batch a step over sequences of one context, greedy in numpy.

    python -m benchmarks.peers.llama_engine --model CHECKPOINT --file OUT.gguf --type Q4_0 --threads 2

The file is made from the checkpoint's own weights if it is missing: a float32 GGUF, then llama.cpp's own quantizer.
Runs in an environment with llama-cpp-python and gguf. Llama shapes only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from benchmarks.peers.agent import Clock, Prompts, serve

TYPES = {"F32": llama_cpp.LLAMA_FTYPE_ALL_F32, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
TYPES["Q8_0"] = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
BATCH = 512
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Float32; with a vocabulary of texts if the checkpoint's is one of byte pairs."""
    config = json.loads((checkpoint / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_vocabulary(writer, json.loads((checkpoint / "tokenizer.json").read_text()), config)
    for name, values in _tensors(checkpoint / "model.safetensors"):
        parts = name.removeprefix("model.").removesuffix(".weight")
        rows = {"q_proj": heads, "k_proj": groups}.get(parts.rsplit(".", 1)[-1])
        writer.add_tensor(_name(parts), values if rows is None else _interleaved(values, rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Each as float32. By hand, since numpy has no bfloat16, and the library gives none of it without."""
    with path.open("rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        begin = file.tell()
        for name, about in head.items():
            if name == "__metadata__":
                continue
            first, last = about["data_offsets"]
            file.seek(begin + first)
            raw = file.read(last - first)
            if about["dtype"] == "BF16":
                values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(raw, {"F32": np.float32, "F16": np.float16}[about["dtype"]])
            yield name, values.astype(np.float32).reshape(about["shape"])


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    if tokenizer["model"]["type"] != "BPE":
        writer.add_tokenizer_model("none")
        return
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    spelling = {place: text for text, place in {**tokenizer["model"]["vocab"], **special}.items()}
    tokens = [spelling[place] for place in range(config["vocab_size"])]
    kinds = [gguf.TokenType.CONTROL if text in special else gguf.TokenType.NORMAL for text in tokens]
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _name(parts: str) -> str:
    if parts.startswith("layers."):
        _, layer, rest = parts.split(".", 2)
        return f"blk.{layer}.{NAMES[rest]}.weight"
    return {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[parts] + ".weight"


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp turns neighbouring values of a head, transformers those half a head apart."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weight.shape)


def prepare(checkpoint: Path, path: Path, kind: str) -> None:
    if path.exists():
        return
    whole, part = path.with_suffix(".f32"), path.with_suffix(".part")
    write_gguf(checkpoint, whole)
    if kind == "F32":
        whole.rename(path)
        return
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = TYPES[kind]
    if llama_cpp.llama_model_quantize(bytes(whole), bytes(part), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not quantize to {kind}")
    whole.unlink()
    part.rename(path)


class LlamaEngine:
    def __init__(self, path: Path, threads: int) -> None:
        self._threads = threads
        self._model = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._shape = (0, 0)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def greedy(self, prompts: Prompts, tokens: int) -> Prompts:
        first = self._begin(prompts, tokens)
        found = [first]
        for step in range(tokens - 1):
            found.append(self._step(found[-1], [len(prompt) + step for prompt in prompts]))
        return [list(each) for each in zip(*found, strict=True)]

    def prefill(self, prompt: list[int], clock: Clock) -> None:
        self._open(1, len(prompt) + 8)
        with clock:
            self._feed(0, prompt)

    def decode(self, prompts: Prompts, tokens: int, clock: Clock) -> None:
        last = self._begin(prompts, tokens + 1)
        with clock:
            for step in range(tokens):
                last = self._step(last, [len(prompt) + step for prompt in prompts])

    def _begin(self, prompts: Prompts, tokens: int) -> list[int]:
        self._open(len(prompts), max(map(len, prompts)) + tokens)
        return [self._feed(row, prompt) for row, prompt in enumerate(prompts)]

    def _open(self, rows: int, tokens: int) -> None:
        """An empty context of so many rows; the one that there is, if it is large enough."""
        if self._context is not None and self._shape[0] == rows and self._shape[1] >= tokens:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = rows * -(-tokens // 256) * 256
        settings.n_seq_max = rows
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = self._threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no context of {rows} rows of {tokens} tokens")
        self._shape = (rows, -(-tokens // 256) * 256)

    def _feed(self, row: int, prompt: list[int]) -> int:
        for start in range(0, len(prompt), BATCH):
            part = prompt[start : start + BATCH]
            self._fill([(token, start + place, row, False) for place, token in enumerate(part)])
            self._batch.logits[len(part) - 1] = start + len(part) == len(prompt)
            self._run()
        return self._best(len(part) - 1)

    def _step(self, tokens: list[int], places: list[int]) -> list[int]:
        self._fill([(token, place, row, True) for row, (token, place) in enumerate(zip(tokens, places, strict=True))])
        self._run()
        return [self._best(row) for row in range(len(tokens))]

    def _fill(self, entries: list[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (token, place, row, wanted) in enumerate(entries):
            batch.token[index], batch.pos[index], batch.logits[index] = token, place, wanted
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row

    def _run(self) -> None:
        if llama_cpp.llama_decode(self._context, self._batch):
            raise RuntimeError("llama_decode failed")

    def _best(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


def arguments() -> argparse.ArgumentParser:
    """What its server is told too."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--type", choices=list(TYPES), default="Q4_0")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def main() -> None:
    options = arguments().parse_args()

    def opened() -> LlamaEngine:
        prepare(options.model, options.file, options.type)
        return LlamaEngine(options.file, options.threads)

    serve(opened)


if __name__ == "__main__":
    main()
