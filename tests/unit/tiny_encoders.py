"""Tiny random scorers of every architecture in memory, deeper than the checkpoints of `tiny_models`, and a batch."""

from __future__ import annotations

import torch
import transformers as hf

from fettle.manifest import Head, Task, TaskKind
from tests.unit import tiny_models
from workers.torch_encoder import Scorer

ARCHITECTURES = list(tiny_models.CLASSIFIERS)
DEPTH, HEADS, SIZE, HIDDEN, NEURONS = 4, 4, 8, 32, 48
CLASSIFY = Task(kind=TaskKind.CLASSIFY, head=Head.SINGLE_LABEL, labels=tiny_models.LABELS, width=4)
EMBED = Task(kind=TaskKind.EMBED, width=HIDDEN, pooling="mean", normalized=True)


def tiny_scorer(name: str, task: Task = CLASSIFY, seed: int = 0, **settings: object) -> Scorer:
    kind, classifier, extra = tiny_models.CLASSIFIERS[name]
    sizes = tiny_models.DISTILBERT_SIZES if name == "distilbert" else tiny_models.SIZES
    depth = {"n_layers" if name == "distilbert" else "num_hidden_layers": DEPTH}
    shared = {"vocab_size": tiny_models.VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 40, "num_labels": 4}
    config = kind(**{**sizes, **depth, **shared, **extra, **settings})
    model = classifier(config) if task.kind is TaskKind.CLASSIFY else hf.AutoModel.from_config(config)
    if task.kind is TaskKind.EMBED and getattr(model, "pooler", None) is not None:
        model.pooler = None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            # Norms too: a gain of one everywhere would hide a wrong slice.
            mean = 1.0 if weight.ndim == 1 and path.endswith("weight") else 0.0
            weight.copy_(mean + torch.randn(weight.shape, generator=generator) * (0.3 if weight.ndim > 1 else 0.1))
    return Scorer(model, task).eval().requires_grad_(False)


def padded_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 19, 7, 2 and 12 tokens, padded with 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([19, 7, 2, 12])
    mask = (torch.arange(19) < lengths[:, None]).long()
    return torch.randint(5, tiny_models.VOCABULARY, mask.shape, generator=generator) * mask, mask


def parameter_count(scorer: Scorer) -> int:
    return sum(weight.numel() for weight in scorer.parameters())


def answers(scorer: Scorer, seed: int = 0) -> torch.Tensor:
    with torch.inference_mode():
        return scorer(*padded_batch(seed))


def difference(scorer: Scorer, expected: torch.Tensor) -> float:
    """Largest absolute difference, in units of the largest expected value where that exceeds 1."""
    return float((answers(scorer) - expected).abs().max() / max(1.0, float(expected.abs().max())))
