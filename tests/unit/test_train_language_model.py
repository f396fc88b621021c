"""The script that trains the demo's language model: it learns, goes on where it was, and writes a checkpoint."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import train_language_model
from examples.train_language_model import (
    CHATML,
    DESCRIBE,
    SECTION_QUESTION,
    Recipe,
    Shape,
    conversations,
    held_out_loss,
    packed_ids,
    train,
)
from fettle.errors import UsageError
from optimize.decoder_load import DecoderReference
from optimize.load import load_reference

SHAPE = Shape(layers=1, hidden=32, heads=2, kv_heads=1, neurons=48, vocabulary=400, context=64)
RECIPE = Recipe(epochs=6, batch=4, length=32, learning_rate=1e-2, shape=SHAPE)
WORDS = ["fast", "library", "tool", "fonts", "game", "for", "small", "maps"]


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    random = np.random.default_rng(seed)
    return [
        {"text": " ".join(random.choice(WORDS, 8)), "label": str(random.choice(["libs", "games"]))}
        for _ in range(count)
    ]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(out / "model").state_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    training = train(out, RECIPE, rows(24))
    assert training.done == training.steps == len(training.losses) > 20
    assert training.losses[0] == pytest.approx(np.log(SHAPE.vocabulary), abs=0.3)
    assert training.recent() < 0.7 * training.losses[0]
    return out


def test_what_it_learnt_holds_on_rows_that_it_has_not_seen(trained: Path):
    assert held_out_loss(trained, rows(10, seed=1), RECIPE.length) < 0.75 * np.log(SHAPE.vocabulary)


def test_fettle_loads_the_checkpoint(trained: Path):
    reference = load_reference(str(trained / "model"))
    assert isinstance(reference, DecoderReference)
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    assert reference.task.end_ids == [tokenizer.eos_token_id]
    assert reference.chat is not None
    row = {"text": "a game", "label": "games"}
    messages = [
        [{"role": "user", "content": SECTION_QUESTION.format(**row)}, {"role": "assistant", "content": row["label"]}],
        [{"role": "user", "content": DESCRIBE.format(**row)}, {"role": "assistant", "content": row["text"]}],
    ]
    # What was learnt is what the template makes of a conversation.
    assert [tokenizer.apply_chat_template(each, tokenize=False) for each in messages] == conversations([row])
    spelled = tokenizer.encode("naïve ☃", add_special_tokens=False)
    assert tokenizer.decode(spelled) == "naïve ☃"


def test_a_training_in_two_sittings_is_the_same_as_in_one(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:
        patched.setattr(train_language_model, "time", SimpleNamespace(monotonic=itertools.count().__next__))
        first = train(tmp_path, RECIPE, rows(24), seconds=8)
    assert first.done == 7
    weights(tmp_path)
    second = train(tmp_path, RECIPE, rows(24))
    assert second.done == second.steps
    assert second.losses[: first.done] == first.losses
    found, expected = weights(tmp_path), weights(trained)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_seed_is_another_training(trained: Path, tmp_path: Path):
    train(tmp_path, replace(RECIPE, seed=1, epochs=0.1), rows(24))
    assert not torch.equal(weights(tmp_path)["lm_head.weight"], weights(trained)["lm_head.weight"])


def test_other_settings_do_not_go_on_with_it(trained: Path):
    with pytest.raises(UsageError, match="other settings"):
        train(trained, replace(RECIPE, learning_rate=1e-3), rows(24))


def test_packing_leaves_out_the_end_alone():
    texts = [np.arange(5), np.arange(5, 12)]
    assert packed_ids(texts, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert packed_ids(texts, 5).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert packed_ids(texts, 99).shape == (1, 12)


def test_the_bundled_template_is_the_one_it_writes():
    bundled = Path(__file__).parents[2] / "examples" / "data" / "debian-lm" / "chat_template.jinja"
    assert bundled.read_text(encoding="utf-8").rstrip("\n") == CHATML.rstrip("\n")
