"""`fettle optimize` for a model that generates text: from the loaded reference to the family.

What `optimize.pipeline` does, with prompts for rows and greedy texts for answers. An answer is what the user's
specification reads from a text; certificates are about it, and about texts of at most so many tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from fettle.chat import CONFIG_FILE, TEMPLATE_FILE, Chat
from fettle.config import OptimizeConfig
from fettle.errors import DataError
from fettle.family import TOKENIZER_FILE, Family
from fettle.instruction import Instruction
from fettle.store import write_atomic
from optimize import finish, recipes
from optimize.build import MEASURE_REFERENCE_SECONDS, MEASURE_SECONDS, build_step, measure_step
from optimize.data import load_splits
from optimize.decoder_data import Form, PromptReader, Prompts
from optimize.decoder_load import DecoderReference
from optimize.pipeline import READ, Outlook, Search, load, wanted_of, write_tokenizer
from optimize.progress import Progress
from optimize.recipes import Recipe
from optimize.report import write_report
from optimize.text_answers import answer_spec, extract_for
from optimize.text_build import TextBuilder
from optimize.text_finish import SPLITS, find_text_points
from optimize.text_recipes import INT4, INT8, text_unavailable
from optimize.text_tracing import trace_step
from optimize.text_votes import certified_votes, check_votes
from optimize.text_work import TextWork
from optimize.train import training_step

# First guesses, of a small language model on one core.
REFERENCE_PER_SECOND, WRITTEN_PER_SECOND, TRAINED_PER_SECOND, CERTIFYING_SECONDS = 30.0, 80.0, 30.0, 20.0


def run_texts(config: OptimizeConfig, progress: Progress, elapsed: Callable[[], float]) -> Family:
    """Make the family; the caller holds its directory.

    Raises: as `optimize.pipeline.run`.
    """
    reference = load(config, progress)
    assert isinstance(reference, DecoderReference)
    work = read_work(config, progress, reference)
    check_votes(work)
    write_tokenizer(config, work.reference)
    write_chat(config, work.reference)
    builder = TextBuilder(work)
    missing = text_unavailable()
    notes = Search(
        work, builder, elapsed, Outlook(lambda recipe: seconds_of(work, recipe), seconds_beside(work), missing)
    ).run()
    findings = find_text_points(work, builder, notes)
    findings.votes, said = certified_votes(work, builder.built)
    findings.analysis = findings.analysis.model_copy(update={"notes": [*findings.analysis.notes, *said]})
    not_built = [*wanted_of(config, missing), *builder.not_built]
    family = finish.write_family(work, builder.built, not_built, findings)
    write_report(family)
    return family


def read_work(config: OptimizeConfig, progress: Progress, reference: DecoderReference) -> TextWork:
    """Read the data as prompts, and find out what their answers are.

    Raises:
        DataError, UsageError: the data or what was asked for cannot be used.
    """
    instruction = None if config.prompt is None else Instruction(config.prompt)
    reader = PromptReader(None if reference.chat is None else Chat(reference.chat), instruction)
    with progress.step(READ):
        splits = load_splits(config.files, config.seed, reader)
    spec = answer_spec(config.answer, splits)
    for warning in [*splits.warnings, *filter(None, [reader.warning])]:
        progress.warn(warning)
    asked = "{text}" if reader.form is Form.TEXT else None
    task = reference.task.model_copy(
        update={"answer": spec, "instruction": asked if instruction is None else instruction.template}
    )
    work = TextWork(
        config,
        progress,
        replace(reference, task=task),
        splits,
        Prompts(reference.tokenizer_json, special=reader.special, context=reference.decoder.context),
        extract_for(spec),
    )
    for name in splits.by_name:
        if len(splits[name]) and not work.rows(name):
            raise DataError(
                f"no prompt of {name} leaves room for {config.max_tokens} tokens in the model's context of "
                f"{reference.decoder.context}; lower --max-tokens or give shorter prompts"
            )
    return work


def write_chat(config: OptimizeConfig, reference: DecoderReference) -> None:
    """Beside the tokenizer, where the service looks for it; nothing where the model has no chat template."""
    folder = (config.out / TOKENIZER_FILE).parent
    if reference.chat is None:
        for name in (TEMPLATE_FILE, CONFIG_FILE):
            (folder / name).unlink(missing_ok=True)
        return
    write_atomic(folder / TEMPLATE_FILE, reference.chat.source.encode())
    write_atomic(folder / CONFIG_FILE, json.dumps(reference.chat.special_tokens, indent=2, sort_keys=True).encode())


def seconds_of(work: TextWork, recipe: Recipe) -> dict[str, float]:
    """A first guess of a recipe's steps."""
    measuring = MEASURE_REFERENCE_SECONDS if recipe.parent is None else MEASURE_SECONDS
    steps = {build_step(recipe.id): recipe.expected_seconds, measure_step(recipe.id): measuring}
    if recipe.plan is not None and work.has("train"):
        for number, change in enumerate(recipe.plan.rounds, start=1):
            steps[training_step(recipe.plan, number)] = change.epochs * len(work.order("train")) / TRAINED_PER_SECOND
    return steps


def seconds_beside(work: TextWork) -> dict[str, float]:
    """Of the steps that belong to no recipe: the variants' texts that certificates are made from."""
    if not work.has(*SPLITS):
        return {}
    rows = {split: len(work.order(split)) for split in SPLITS}
    steps = {trace_step(recipes.REFERENCE, split): count / REFERENCE_PER_SECOND for split, count in rows.items()}
    for name in (recipes.ONNX_REFERENCE, INT8, INT4):
        steps |= {trace_step(name, split): count / WRITTEN_PER_SECOND for split, count in rows.items()}
    return {**steps, finish.CERTIFY: CERTIFYING_SECONDS, finish.TRY_POINTS: 2.0}
