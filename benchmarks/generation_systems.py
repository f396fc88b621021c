"""What `benchmarks.generation_engine` compares: a random model, Fettle's variants of it, the peers and where they run.

Each runs in a process of its own (`benchmarks/peers/agent.py`), peers in virtual environments that are made when they
are first needed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from fettle.manifest import Precision, Runtime, Task, TaskKind, TokenizerSpec, VariantManifest

ROOT = Path(__file__).parents[1]
# Of SmolLM2-135M, without its texts.
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 2048,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PINS = {
    "peer-llama": ("llama-cpp-python[server]>=0.3.30", "gguf", "numpy"),
    "peer-transformers": ("transformers[serving]", "accelerate", "torch>=2.11,<2.14"),
    "peer-openvino": ("openvino-genai", "optimum-intel[openvino]", "torch<2.14"),
}
# Another torch's build of it comes along, and breaks transformers there.
UNWANTED = {"peer-openvino": ("torchvision",)}
PEERS = ("llama.cpp-Q4_0", "transformers-bf16", "transformers-fp32", "openvino-int4")
MORE_PEERS = ("llama.cpp-Q8_0", "llama.cpp-F32", "openvino-int8")
# int8 has a scale for every token; calibrated, static ranges where random texts say that they serve.
OURS = ("fp32", "int8", "int8-calibrated", "int4")
MORE_OURS = ("int4-32", "int4-128", "int4-head-4")
CALIBRATION = (24, 96)


@dataclass(frozen=True, slots=True)
class System:
    """`command` starts its agent; `file` is what holds its weights."""

    name: str
    command: Sequence[str]
    file: Path
    is_peer: bool
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def megabytes(self) -> float:
        files = [self.file] if self.file.is_file() else [path for path in self.file.rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files) / 1e6


class Agent:
    """A system under way; a context manager."""

    def __init__(self, system: System, log: Path) -> None:
        self.system = system
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Agent:
        """Raises RuntimeError: it did not start; the end of what it said is in the message."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self.system.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, **self.system.environment},
            )
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def ask(self, kind: str, prompts: Sequence[Sequence[int]], tokens: int = 0) -> dict[str, Any]:
        """Raises RuntimeError: it died."""
        assert self._process is not None
        assert self._process.stdin is not None
        question = {"kind": kind, "prompts": [list(prompt) for prompt in prompts], "tokens": tokens}
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def cpu_seconds(self) -> float:
        assert self._process is not None
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def memory_bytes(self) -> int:
        assert self._process is not None
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(errors="replace")[-1500:]
            raise RuntimeError(f"{self.system.name} ended ({self._process.wait()}): ...{said}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def make_model(directory: Path, layers: int) -> Path:
    """A checkpoint of random weights, with a tokenizer that some exporters want to see."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = directory / f"checkpoint-{layers}"
    if (path / "tokenizer.json").exists():
        return path
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})
    hf.LlamaForCausalLM(config).save_pretrained(path)
    words = {f"w{index}": index for index in range(config.vocab_size)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w0", pad_token="w0").save_pretrained(path)
    return path


def our_system(name: str, checkpoint: Path, threads: int) -> System:
    """One of `OURS` or `MORE_OURS`; its graph is made first if it is missing."""
    directory = checkpoint.parent / f"{checkpoint.name}-{name}"
    if not (directory / "manifest.json").exists():
        _build(name, checkpoint, directory)
    command = [sys.executable, "-m", "benchmarks.peers.fettle_engine", "--variant", str(directory.absolute())]
    return System(f"fettle {name}", [*command, "--threads", str(threads)], directory / "model.onnx", is_peer=False)


def peer_system(name: str, checkpoint: Path, environments: Path, threads: int) -> System:
    """One of `PEERS` or `MORE_PEERS`; its environment is made first if it is missing."""
    engine, kind = name.split("-")
    tail = ["--model", str(checkpoint.absolute()), "--threads", str(threads)]
    file = (checkpoint.parent / f"{checkpoint.name}-{name}").absolute()
    wide = {"OMP_NUM_THREADS": str(threads)}
    match engine:
        case "llama.cpp":
            python = environment(environments / "peer-llama", "llama_cpp")
            tail += ["--file", str(file), "--type", kind]
            return System(name, [python, "-m", "benchmarks.peers.llama_engine", *tail], file, True, wide)
        case "openvino":
            python = environment(environments / "peer-openvino", "openvino_genai")
            tail += ["--directory", str(file), "--format", kind]
            return System(name, [python, "-m", "benchmarks.peers.openvino_engine", *tail], file, True)
        case "transformers":
            tail += ["--type", {"bf16": "bfloat16", "fp32": "float32"}[kind]]
            command = [sys.executable, "-m", "benchmarks.peers.transformers_engine", *tail]
            return System(name, command, checkpoint / "model.safetensors", True, wide)
    raise ValueError(f"no peer is called {name!r}")


def environment(directory: Path, package: str) -> str:
    """Its Python; takes minutes when it is new, and a compiler where a package is built from source.

    Raises:
        subprocess.CalledProcessError: venv or pip failed; a half-made environment is removed.
    """
    python = (directory / "bin/python").absolute()
    if list(directory.glob(f"lib/python*/site-packages/{package}")):
        return str(python)
    try:
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PINS[directory.name]], check=True)
        for name in UNWANTED.get(directory.name, ()):
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", name], check=True)
    except BaseException:  # Ctrl-C among them: what is half made would pass for whole the next time
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return str(python)


def _build(name: str, checkpoint: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from optimize.decoder_graph import export_decoder
    from optimize.decoder_graph_parts import decoder_spec

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    whole = checkpoint.parent / f"{checkpoint.name}-fp32" / "model.onnx"
    directory.mkdir(parents=True, exist_ok=True)
    if not whole.exists():
        whole.parent.mkdir(parents=True, exist_ok=True)
        export_decoder(model, whole)
    if name != "fp32":
        _pass(name)(whole, directory / "model.onnx")
    spec = decoder_spec(model.config)
    width = model.config.vocab_size
    manifest = VariantManifest(
        id=name,
        runtime=Runtime.ONNX,
        precision=Precision(name.split("-")[0]),
        recipe=[],
        tokenizer=TokenizerSpec(max_length=spec.context, vocabulary=width, pad_id=0, segments=False),
        task=Task(kind=TaskKind.GENERATE, width=width),
        files=[],
        decoder=spec,
    )
    (directory / "manifest.json").write_text(manifest.model_dump_json())


def _pass(name: str) -> Callable[[Path, Path], object]:
    import numpy as np

    from fettle.rows import Row, Rows
    from optimize.decoder_quantize import quantize_decoder_int4, quantize_decoder_int8

    chance = np.random.default_rng(0)
    texts, tokens = CALIBRATION
    random = Rows.of([Row(chance.integers(0, SHAPE["vocab_size"], tokens).astype(np.int32)) for _ in range(texts)])
    match name:
        case "int8":
            return quantize_decoder_int8
        case "int8-calibrated":
            return lambda source, path: quantize_decoder_int8(source, path, random, feedback=False)
        case "int4":
            return quantize_decoder_int4
        case "int4-32" | "int4-128":
            return lambda source, path: quantize_decoder_int4(source, path, block=int(name.split("-")[1]))
        case "int4-head-4":
            return lambda source, path: quantize_decoder_int4(source, path, head_bits=4)
    raise ValueError(f"Fettle has no variant {name!r} here")
