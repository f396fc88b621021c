"""transformers' continuous batching on the CPU: its manager with its own scheduler, on as many threads as are given.

python -m benchmarks.peers.transformers_engine --model CHECKPOINT --type bfloat16 --threads 2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.peers.agent import Clock, Prompts, serve

# Room of its cache, in blocks of 32 tokens, and tokens of one pass: enough that nothing here ever waits.
BLOCKS, PAGE, BATCH_TOKENS = 512, 32, 2048
NEVER = -1


class TransformersEngine:
    def __init__(self, checkpoint: Path, kind: str, threads: int) -> None:
        torch.set_num_threads(threads)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, kind)).eval()
        settings = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=NEVER, pad_token_id=0)
        batching = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=BLOCKS, max_batch_tokens=BATCH_TOKENS, allow_block_sharing=False
        )
        self._manager = model.init_continuous_batching(settings, batching)
        self._manager.start()

    def greedy(self, prompts: Prompts, tokens: int) -> Prompts:
        return [result.generated_tokens for result in self._run(prompts, tokens)]

    def prefill(self, prompt: list[int], clock: Clock) -> None:
        with clock:
            self._run([prompt], 1)

    def decode(self, prompts: Prompts, tokens: int, clock: Clock) -> None:
        """It steps in a thread of its own, so that the times at which tokens came are looked at afterwards: from when
        all have their first token until one has all."""
        times = [result.timestamps for result in self._run(prompts, tokens + len(prompts) + 1)]
        began, ended = max(each[0] for each in times), min(each[-1] for each in times)
        counted = sum(began < time <= ended for each in times for time in each)
        clock.seconds += (ended - began) * len(prompts) * tokens / counted

    def _run(self, prompts: Prompts, tokens: int) -> list[Any]:
        ids = self._manager.add_requests(prompts, max_new_tokens=tokens, record_timestamps=True)
        found: dict[str, Any] = {}
        while len(found) < len(ids):
            result = self._manager.get_result(timeout=1)
            if result is None and not self._manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped")
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                found[result.request_id] = result
        return [found[each] for each in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--type", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    serve(lambda: TransformersEngine(options.model, options.type, options.threads))


if __name__ == "__main__":
    main()
