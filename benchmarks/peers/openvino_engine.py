"""OpenVINO GenAI: its continuous batching on the CPU, weights as its exporter makes them, otherwise its defaults.

    python -m benchmarks.peers.openvino_engine --model CHECKPOINT --directory OUT --format int4 --threads 2

The files are exported from the checkpoint if they are missing. Runs in an environment with openvino-genai and
optimum-intel.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.agent import Clock, Prompts, serve

CACHE_GB = 2


def prepare(checkpoint: Path, directory: Path, weights: str) -> None:
    if directory.exists():
        return
    part = directory.with_name(f"{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    line = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", str(checkpoint)]
    line += ["--task", "text-generation-with-past", "--weight-format", weights]
    # Its default, 128, does not divide 576 inputs, which the exporter refuses.
    line += ["--group-size", "64"] if weights == "int4" else []
    line.append(str(part))
    subprocess.run(line, check=True, stdout=sys.stderr)
    part.rename(directory)


class OpenvinoEngine:
    def __init__(self, directory: Path, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = False
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", settings)
        self._asked = 0

    def greedy(self, prompts: Prompts, tokens: int) -> Prompts:
        handles = [self._ask(prompt, tokens) for prompt in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return [list(handle.read_all()[0].generated_ids) for handle in handles]

    def prefill(self, prompt: list[int], clock: Clock) -> None:
        handle = self._ask(prompt, 1)
        with clock:
            while not handle.can_read():
                self._pipeline.step()
        self._finish()

    def decode(self, prompts: Prompts, tokens: int, clock: Clock) -> None:
        handles = [self._ask(prompt, tokens + len(prompts) + 1) for prompt in prompts]
        waiting = handles
        while waiting:
            self._pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]
        with clock:
            for _ in range(tokens):
                self._pipeline.step()
        for handle in handles:
            handle.stop()
        self._finish()

    def _ask(self, prompt: list[int], tokens: int) -> Any:
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens = tokens
        settings.ignore_eos = True
        self._asked += 1
        return self._pipeline.add_request(self._asked, openvino.Tensor(np.array([prompt], np.int64)), settings)

    def _finish(self) -> None:
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--format", choices=("fp16", "int8", "int4"), default="int4")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    def opened() -> OpenvinoEngine:
        prepare(options.model, options.directory, options.format)
        return OpenvinoEngine(options.directory, options.threads)

    serve(opened)


if __name__ == "__main__":
    main()
