"""What every training of a student does the same way: the optimizer, its schedule, and looking at the loss.

What is trained, and towards what, is the business of `optimize.distill` for encoders and `optimize.decoder_distill` for
language models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fettle.errors import PassError

# How often the loss is read (which waits for the GPU), checked and reported.
STEPS_PER_REPORT: Final = 10
PLAIN_ATTENTION_TOKENS: Final = 128

Report = Callable[[float], None]


def adamw(weights: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW without decay on vectors (biases and norms); fused, on a CPU six times faster than the others."""
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=True)


def slope(steps: int, warm_up: float) -> Callable[[int], float]:
    """The share of the learning rate at a step: up over the first `warm_up` of them, then down to 0, both linear."""
    rising = max(1.0, warm_up * steps)
    return lambda step: min((step + 1) / rising, (steps - step) / max(1.0, steps - rising), 1.0)


@contextmanager
def plain_attention(student: nn.Module) -> Iterator[None]:
    """Attention as plain matrix products while training: with a mask, torch's fused one is twice as slow backward on
    a CPU. It keeps every attention map, so it is for short rows only."""
    model = next((module for module in student.modules() if isinstance(module, PreTrainedModel)), None)
    if model is None:
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def check_loss(total: Tensor, step: int, learning_rate: float) -> None:
    """Raises PassError where the sum of the losses so far is no number."""
    if not bool(torch.isfinite(total)):
        raise PassError(
            f"the training loss is no longer a number after {step} steps at learning rate {learning_rate:g}; "
            "lower learning_rate or set bf16 to false"
        )
