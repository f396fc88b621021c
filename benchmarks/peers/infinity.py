"""Infinity (infinity-emb): its torch engine in fp32 and in bf16, and its ONNX engine on an int8 file.

Makes a virtual environment of its own from pins that work together, since Infinity needs an older transformers
than Fettle; prepares a private copy of the model, since Infinity writes next to the model it loads; and says how
to start the server. Nothing is fetched but packages.

    python -m benchmarks.peers.infinity --setting int8 --model DIR --port 8000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SERVED_NAME = "minilm"
EMBED, CLASSIFY = "feature-extraction", "text-classification"
PEER_ENV = Path("build/peer-infinity")
PINS = (
    "infinity-emb[server,torch,optimum]",
    "transformers<4.53",
    "optimum[onnxruntime]<1.25",
    "sentence-transformers<5",
    "click<8.2",
    "typer<0.16",
    "pyarrow<19",
    "datasets<4",
    "onnx",
    "torch<2.14",  # as ours, so that no torch is newer than the other
)


@dataclass(frozen=True, slots=True)
class Setting:
    """How Infinity is run. Settings of one `files` serve the same files: the checkpoint, or an int8 ONNX file."""

    files: str
    options: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


_TORCH = ("--engine", "torch")
_ONNX = ("--engine", "optimum")
_SMALL = ("--batch-size", "8")
_AS_IT_IS = "--onnx-disable-optimize"
SETTINGS: Mapping[str, Setting] = {
    "torch": Setting("torch", _TORCH),
    "torch-bf16": Setting("torch", (*_TORCH, "--dtype", "bfloat16")),
    # ONNX Runtime optimizes the graph when it loads it; Infinity's own pass over a quantized graph adds nothing.
    "int8": Setting("int8", (*_ONNX, _AS_IT_IS)),
    # Tried to be fair to the peer; none was clearly faster here (LOG.md). Kept, so that it can be checked elsewhere.
    "torch-batch-8": Setting("torch", (*_TORCH, *_SMALL)),
    "torch-bf16-batch-8": Setting("torch", (*_TORCH, "--dtype", "bfloat16", *_SMALL)),
    "torch-sdpa": Setting("torch", (*_TORCH, "--no-bettertransformer")),
    "torch-compile": Setting("torch", (*_TORCH, "--no-bettertransformer", "--compile")),
    "torch-one-thread": Setting("torch", _TORCH, {"OMP_NUM_THREADS": "1"}),
    "int8-optimized": Setting("int8-optimized", _ONNX),  # files of its own: Infinity writes the result beside them
    "int8-batch-8": Setting("int8", (*_ONNX, _AS_IT_IS, *_SMALL)),
}
FASTEST = ("torch", "torch-bf16", "int8")
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}


def make_environment(directory: Path) -> None:
    """Create the environment unless it is there already; takes minutes and about 2 GB.

    Raises:
        subprocess.CalledProcessError: venv or pip failed; a half-made environment is removed.
    """
    if (directory / "bin/infinity_emb").exists():
        return
    try:
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        subprocess.run([directory / "bin/pip", "install", "--quiet", *PINS], check=True)
    except BaseException:  # Ctrl-C among them: what is half made would pass for whole the next time
        shutil.rmtree(directory, ignore_errors=True)
        raise


def prepare_model(directory: Path, setting: Setting, model: Path, task: str = EMBED) -> Path:
    """The directory that is to be served: a copy of the checkpoint, or only an int8 ONNX file of it.

    `task` is Optimum's name for it.
    """
    out = (directory / "models" / f"{_fingerprint(model)}-{setting.files}").absolute()
    if out.exists():
        return out
    working = out.with_name(out.name + ".part")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    if setting.files == "torch":
        shutil.copytree(model, working, dirs_exist_ok=True)
    else:
        script = Path(__file__).with_name("export_int8.py")
        line = map(str, [directory / "bin/python", script, model, working, instructions(), task])
        subprocess.run(list(line), check=True, env={**os.environ, **OFFLINE}, stdout=subprocess.DEVNULL)
    return working.rename(out)


def _fingerprint(model: Path) -> str:
    """Tells models apart by content, since many a directory is called `model`."""
    with (model / "model.safetensors").open("rb") as weights:
        return hashlib.file_digest(weights, "sha256").hexdigest()[:12]


def instructions() -> str:
    """The widest int8 instructions of this processor, by Optimum's names."""
    flags = Path("/proc/cpuinfo").read_text().split()
    if "avx512_vnni" in flags:
        return "avx512_vnni"
    return "avx512" if "avx512f" in flags else "avx2"


def command(directory: Path, setting: Setting, model: Path, port: int, task: str = EMBED) -> list[str]:
    """The server's command line; `model` is what `prepare_model` returned for the task."""
    # Its warm-up sends a classifier more tokens than the model takes; the ONNX engine then fails instead of cutting.
    warm_up = ["--no-model-warmup"] if task == CLASSIFY else []
    return [
        str((directory / "bin/infinity_emb").absolute()),
        "v2",
        *("--model-id", str(model)),
        *("--served-model-name", SERVED_NAME),
        *setting.options,
        *warm_up,
        *("--device", "cpu"),
        # Left alone, the ONNX engine pools by the first token, whatever the model says.
        *("--pooling-method", "mean"),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
        *("--log-level", "warning"),
    ]


def environment(directory: Path, setting: Setting) -> dict[str, str]:
    """Additions to the environment: offline, caches inside the peer's own directory, and the setting's own."""
    home = str((directory / "home").absolute())
    return {**OFFLINE, "HF_HOME": home, "INFINITY_HOME": home, **setting.environment}


def versions(directory: Path) -> dict[str, str]:
    """What is installed there of the packages that matter for speed."""
    names = ("infinity_emb", "torch", "transformers", "optimum", "onnxruntime", "sentence-transformers")
    script = "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([directory / "bin/python", "-c", script, *names], check=True, capture_output=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--setting", choices=list(SETTINGS), required=True)
    parser.add_argument("--model", type=Path, required=True, help="a sentence-transformers directory")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--peer-env", type=Path, default=PEER_ENV)
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    make_environment(options.peer_env)
    model = prepare_model(options.peer_env, setting, options.model)
    line = command(options.peer_env, setting, model, options.port)
    os.execvpe(line[0], line, {**os.environ, **environment(options.peer_env, setting)})


if __name__ == "__main__":
    main()
