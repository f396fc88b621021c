"""Trains a language model like the bundled one from scratch, on the bundled Debian package descriptions.

    python -m examples.train_language_model ./my-lm --minutes 10

A byte-level BPE tokenizer, a small Llama, and a plain training loop on whole conversations: which section a description
belongs to, and a description for a section. It stands for the model that a user already has, and is an ordinary
checkpoint in the end. What is learnt depends on the settings and the seed alone (on one machine), however often the
training was interrupted: the same command goes on where it was. Does not evaluate answers; `fettle optimize` does.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from examples.finetune import read_rows
from fettle.errors import UsageError
from fettle.store import new_directory
from optimize.decoder_resume import Notebook, Written

END_OF_TEXT, START, END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
SECTION_QUESTION = "Which section does this package belong to?\n{text}"
DESCRIBE = "Describe a package from the section {label}."
STATE, MODEL = "state", "model"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
HELD_OUT_ROWS = 200
SECONDS_BETWEEN_LINES = 5.0

Ids = NDArray[np.int64]
Report = Callable[["Training"], None]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the model; 6.0 million parameters by default, the embeddings shared by input and output."""

    layers: int = 6
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    neurons: int = 704
    vocabulary: int = 6144
    context: int = 1024


@dataclass(frozen=True, slots=True)
class Recipe:
    """`epochs` over the conversations, packed into sequences of `length` tokens, `batch` of them a step."""

    epochs: float = 2.8
    batch: int = 32
    length: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.03
    seed: int = 0
    shape: Shape = Shape()


@dataclass
class Training:
    """A training under way: `done` of `steps`, and the loss of each step so far in nats a token."""

    steps: int
    done: int = 0
    losses: list[float] = field(default_factory=list)

    def recent(self, steps: int = 20) -> float:
        """The mean loss of the last steps."""
        some = self.losses[-steps:]
        return sum(some) / len(some) if some else math.nan


def train(
    out: Path,
    recipe: Recipe,
    rows: Sequence[dict[str, str]],
    *,
    seconds: float = math.inf,
    report: Report = lambda _: None,
) -> Training:
    """Train, or go on, for at most so many seconds; the model so far is in `out/model` afterwards.

    Raises:
        UsageError: `out` holds a training with other settings.
    """
    deadline = time.monotonic() + seconds
    notebook = Notebook(out / STATE)
    tokenizer = language_tokenizer(conversations(rows), recipe.shape.vocabulary)
    texts = [np.array(encoding.ids) for encoding in tokenizer.encode_batch(conversations(rows))]
    per_epoch = max(1, sum(map(len, texts)) // recipe.length // recipe.batch)
    training = Training(steps=max(1, round(recipe.epochs * per_epoch)))
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config_of(recipe.shape)).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
    # As JSON gives it back.
    settings = json.loads(json.dumps({"recipe": asdict(recipe), "rows": len(rows), "steps": training.steps}))
    take_up(notebook, settings, training, model, optimizer)
    for batch in batches(texts, recipe, per_epoch, range(training.done, training.steps)):
        if time.monotonic() >= deadline:
            break
        training.losses.append(step(model, optimizer, batch, learning_rate(recipe, training)))
        training.done += 1
        report(training)
        if notebook.due:
            write_down(notebook, settings, training, model, optimizer)
    write_down(notebook, settings, training, model, optimizer)
    save(out / MODEL, model, tokenizer)
    return training


def step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor, rate: float) -> float:
    """One step on int64 ids [sequences, tokens], every token a target; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = mean_loss(model, ids)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def mean_loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Nats a token, of each but the first of every sequence."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def learning_rate(recipe: Recipe, training: Training) -> float:
    """Rises linearly, then falls along a cosine to a tenth."""
    warmup = max(1, round(recipe.warmup * training.steps))
    if training.done < warmup:
        return recipe.learning_rate * (training.done + 1) / warmup
    past = (training.done - warmup) / max(1, training.steps - warmup)
    return recipe.learning_rate * (0.55 + 0.45 * math.cos(math.pi * past))


def conversations(rows: Iterable[dict[str, str]]) -> list[str]:
    """Two of each row, as the chat template writes them."""
    pairs = []
    for row in rows:
        pairs.append((SECTION_QUESTION.format(text=row["text"]), row["label"]))
        pairs.append((DESCRIBE.format(label=row["label"]), row["text"]))
    turn = START + "{role}\n{content}" + END + "\n"
    return [
        turn.format(role="user", content=asked) + turn.format(role="assistant", content=answer)
        for asked, answer in pairs
    ]


def language_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE, so that it can spell anything; at most so many tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches(texts: Sequence[Ids], recipe: Recipe, per_epoch: int, steps: range) -> Iterator[Tensor]:
    """int64 [batch, length] for each step; epoch by epoch the texts in another order, packed without gaps."""
    epoch, packed = -1, torch.empty(0)
    for number in steps:
        if number // per_epoch != epoch:
            epoch = number // per_epoch
            order = np.random.default_rng([recipe.seed, epoch]).permutation(len(texts))
            packed = packed_ids([texts[index] for index in order], recipe.length)
        place = number % per_epoch * recipe.batch
        yield packed[place : place + recipe.batch]


def packed_ids(texts: Sequence[Ids], length: int) -> Tensor:
    """int64 [sequences, length]; the rest at the end is left out, and a few texts alone are one short sequence."""
    flat = np.concatenate(texts).astype(np.int64)
    count = max(1, len(flat) // length)
    return torch.from_numpy(flat[: count * length].reshape(count, -1))


@torch.no_grad()
def held_out_loss(out: Path, rows: Sequence[dict[str, str]], length: int) -> float:
    """Nats a token of the model in `out/model` on rows that it has not seen."""
    model = LlamaForCausalLM.from_pretrained(out / MODEL, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / MODEL)
    ids = tokenizer(conversations(rows), add_special_tokens=False).input_ids
    sequences = packed_ids([np.array(each) for each in ids], length)
    parts = [sequences[first : first + 16] for first in range(0, len(sequences), 16)]
    losses = [float(mean_loss(model, part)) for part in parts]
    return float(np.average(losses, weights=list(map(len, parts))))


# What is written.


def config_of(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=SPECIALS.index(END_OF_TEXT),
        eos_token_id=SPECIALS.index(END),
        pad_token_id=SPECIALS.index(END_OF_TEXT),
    )


def save(directory: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """An ordinary checkpoint: configuration, bfloat16 safetensors, tokenizer, chat template."""
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END, pad_token=END_OF_TEXT
    )
    whole.chat_template = CHATML
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    with new_directory(directory) as new:
        rounded.to(torch.bfloat16).save_pretrained(new)
        whole.save_pretrained(new)


def write_down(
    notebook: Notebook,
    settings: dict[str, object],
    training: Training,
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors = {}
    for name, weight in model.named_parameters():
        tensors[f"now.{name}"] = weight
        tensors |= {f"{key}.{name}": optimizer.state[weight][key] for key in MOMENTS if weight in optimizer.state}
    notebook.write(Written(tensors, {"settings": settings, "losses": training.losses}))


def take_up(
    notebook: Notebook,
    settings: dict[str, object],
    training: Training,
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Go on from what was written down, if anything was."""
    written = notebook.read()
    if written is None:
        return
    if written.figures["settings"] != settings:
        raise UsageError("the directory holds a training with other settings; give the same ones, or another directory")
    training.losses = written.figures["losses"]
    training.done = len(training.losses)
    for name, weight in model.named_parameters():
        weight.data.copy_(written.tensors[f"now.{name}"])
        if f"step.{name}" in written.tensors:
            optimizer.state[weight] = {key: written.tensors[f"{key}.{name}"] for key in MOMENTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "out", type=Path, help="the checkpoint is in OUT/model; OUT/state, what a training goes on from"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; the same command goes on")
    parser.add_argument("--epochs", type=float, default=Recipe().epochs)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    recipe = Recipe(epochs=arguments.epochs, seed=arguments.seed)
    logging.disable_progress_bar()
    started, first, told = time.monotonic(), -1, 0.0

    def report(training: Training) -> None:
        nonlocal first, told
        first = training.done - 1 if first < 0 else first
        now = time.monotonic()
        if now - told > SECONDS_BETWEEN_LINES or training.done == training.steps:
            told = now
            left = (now - started) / (training.done - first) * (training.steps - training.done) / 60
            print(
                f"step {training.done} of {training.steps}, {training.recent():.3f} nats a token, {left:.0f} min left",
                flush=True,
            )

    try:
        training = train(arguments.out, recipe, read_rows("train"), seconds=60 * arguments.minutes, report=report)
    except UsageError as error:
        parser.exit(2, f"error: {error.message}\n")
    figures = {
        "steps": training.done,
        "of": training.steps,
        "nats_a_token": round(training.recent(), 4),
        "held_out": round(held_out_loss(arguments.out, read_rows("validation")[:HELD_OUT_ROWS], recipe.length), 4),
        "model": str(arguments.out / MODEL),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
