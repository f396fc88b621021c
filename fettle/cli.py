"""The command `fettle`. Each command is one small function that imports what it needs when it runs.

What all commands have in common, such as exit codes, is `fettle.console`.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.models import TyperInfo

from fettle import __version__
from fettle.console import INTERRUPTED, Commands, checked, fail, print_json
from fettle.family_commands import FamilyArgument, JsonOption
from fettle.family_commands import commands as family_commands
from fettle.key_commands import commands as key_commands
from fettle.load_commands import commands as load_commands
from fettle.rollout_commands import commands as rollout_commands

if TYPE_CHECKING:
    from fettle.family import Family
    from optimize.progress import Progress

app = typer.Typer(
    cls=Commands,
    name="fettle",
    help="Make measured, cheaper variants of a transformer, and serve them on Ray behind one router.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


app.registered_commands += [*family_commands.registered_commands, *load_commands.registered_commands]
app.registered_groups += [TyperInfo(rollout_commands, name="rollout"), TyperInfo(key_commands, name="keys")]


class DemoTask(StrEnum):
    ENCODERS = "encoders"
    GENERATION = "generation"


def main() -> None:
    app(prog_name="fettle")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fettle {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def optimize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id or a directory in Hugging Face format.")],
    out: Annotated[Path, typer.Option(help="The family's directory; an unfinished one there is completed.")],
    data: Annotated[Path | None, typer.Option(help="A sample of the traffic; Fettle splits it.")] = None,
    train: Annotated[Path | None, typer.Option(help="Instead of --data: rows to train on.")] = None,
    validation: Annotated[Path | None, typer.Option(help="Instead of --data: rows to tune on.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Instead of --data: rows for certificates.")] = None,
    test: Annotated[Path | None, typer.Option(help="Instead of --data: rows that figures are reported on.")] = None,
    text_column: Annotated[str | None, typer.Option(help="The column with the text.  [default: text]")] = None,
    pair_column: Annotated[str | None, typer.Option(help="The column with the second text of a pair.")] = None,
    label_column: Annotated[str | None, typer.Option(help="The column with the label.  [default: label]")] = None,
    task: Annotated[
        str | None, typer.Option(help="classify, embed or generate; read from the model by default.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="For text: what the model is asked, with {text} or another column in it.")
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            help="For text: what of it is compared: text (all of it), labels (one of the data's), pattern=REGEX or "
            "function=module:name.  [default: text]"
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="For text: tokens of a generated text, at most.")] = 64,
    votes: Annotated[
        int | None, typer.Option(help="For text: certify votes among so many sampled answers.", show_default="none")
    ] = None,
    vote_temperature: Annotated[float, typer.Option(help="At which the answers of a vote are sampled.")] = 1.0,
    name: Annotated[str | None, typer.Option(help="The family's name; the model's last path part by default.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Build only this variant; may be repeated.")] = None,
    effort: Annotated[str, typer.Option(help="quick (minutes), standard (about an hour) or thorough.")] = "quick",
    time_budget: Annotated[
        float | None, typer.Option(help="Minutes; no recipe is begun that would not fit.", show_default="none")
    ] = None,
    level: Annotated[
        list[float] | None,
        typer.Option(help="A share of changed answers to certify; may be repeated.  [default: 0.005 0.01 0.02 0.05]"),
    ] = None,
    delta: Annotated[float, typer.Option(help="1 - the confidence of a certificate.")] = 0.05,
    cosine_floor: Annotated[
        float, typer.Option(help="For embeddings: a lower cosine to the original's vector is a changed answer.")
    ] = 0.98,
    threads: Annotated[int, typer.Option(help="Threads of one engine, as it will be served.")] = 1,
    max_rows: Annotated[int, typer.Option(help="Rows of test that figures are reported on, at most.")] = 4000,
    seed: Annotated[int, typer.Option(help="Decides the split of --data and the choice of rows.")] = 0,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure again what was measured before.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a family of measured variants of a model, and certify how far each way to answer departs from it.

    Data are JSONL (also .gz), CSV or Parquet, with a text on each row and, if you have them, labels.
    A run that was interrupted goes on where it stopped when you give the same command again.

    Example: `fettle optimize ./my-classifier --data texts.jsonl --out ./family`

    A language model is asked the rows' texts, or what --prompt makes of them:
    `fettle optimize ./my-model --data texts.jsonl --prompt "Which topic?\\n{text}" --answer labels --out ./family`
    """
    given = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    from fettle.config import OptimizeConfig

    config = checked(
        OptimizeConfig,
        model=model,
        out=out,
        files={
            **{"data": data, "train": train, "validation": validation, "calibration": calibration, "test": test},
            # Only what was given: a column that the user named must exist.
            **{key: value for key, value in given.items() if value is not None},
        },
        task=task,
        name=name,
        recipes=recipe or None,
        effort=effort,
        time_budget_minutes=time_budget,
        **({"levels": level} if level else {}),
        delta=delta,
        cosine_floor=cosine_floor,
        threads=threads,
        max_rows=max_rows,
        prompt=prompt,
        answer=answer,
        max_tokens=max_tokens,
        votes=votes,
        vote_temperature=vote_temperature,
        remeasure=remeasure,
        seed=seed,
    )
    progress = _progress()
    from optimize.pipeline import run

    try:
        family = run(config, progress)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here", INTERRUPTED)
    _print_family(family, as_json)
    if not as_json:
        typer.echo(f"\nThe family is in {out}. Serve it with: fettle serve {out}", err=True)


@app.command()
def show(directory: FamilyArgument, as_json: JsonOption = False) -> None:
    """Show a family's variants: size, speed, and how faithful each is to the original.

    Example: `fettle show ./family`
    """
    from fettle.family import Family

    _print_family(Family.open(directory), as_json)


@app.command()
def predict(
    directory: FamilyArgument,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Texts; standard input by default.")] = None,
    max_disagreement: Annotated[
        str, typer.Option(help="The share of answers that may differ from the original's, or exact.")
    ] = "0.01",
    variant: Annotated[str | None, typer.Option(help="This variant answers, without a promise.")] = None,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help='Each line is an object with "text" and, for pairs, "pair".')
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads on CPU.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Answer texts without a server: one text a line in, one line of JSON a text out, as they come.

    The cheapest way that is certified at --max-disagreement answers, and the original where none is. Every line is a
    text, empty lines too, so that line n of the output answers line n of the input.

    Example: `fettle predict ./family < texts.txt`
    """
    from contextlib import nullcontext

    from fettle.local import load, predict_lines
    from fettle.promise import share

    tolerance = share(max_disagreement)
    source = file.open("rb") if file else nullcontext(sys.stdin.buffer)
    with source as lines, load(directory, threads=threads, device=device) as local:
        for answers in predict_lines(local, lines, tolerance, variant, jsonl=jsonl):
            sys.stdout.buffer.write(answers)
            sys.stdout.buffer.flush()


@app.command()
def report(
    directory: FamilyArgument,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a family's report.html again, from what its manifests say.

    Example: `fettle report ./family --open`
    """
    from fettle.family import Family
    from optimize.report import write_report

    path = write_report(Family.open(directory))
    if as_json:
        print_json({"report": str(path)})
    else:
        typer.echo(path)
    if open_it:
        typer.launch(path.resolve().as_uri())


@app.command()
def serve(
    families: Annotated[list[str], typer.Argument(metavar="FAMILY...", help="Directories, or URLs such as s3://.")],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 opens the service to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Serve this variant; may be repeated. By default those that no other beats."),
    ] = None,
    max_disagreement: Annotated[
        str, typer.Option(help="The class of requests that name none: a share of changed answers, or exact.")
    ] = "0.01",
    default: Annotated[
        str | None, typer.Option(help="Instead of a class: this variant answers requests that name none.")
    ] = None,
    min_replicas: Annotated[int, typer.Option(min=0, help="Replicas of each variant that always run.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Replicas of each variant under load; one for each core by default.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one replica on CPU.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    max_queue: Annotated[float, typer.Option(help="Seconds of work that may wait before requests get 429.")] = 2.0,
    objective: Annotated[
        float, typer.Option(help="Milliseconds that a request should not exceed; near it cheaper points take over.")
    ] = 100.0,
    shadow: Annotated[
        float, typer.Option(min=0, max=1, help="Share of answers that are compared with the original's, later.")
    ] = 0.01,
    evidence: Annotated[
        str | None, typer.Option(help="Where the comparisons are kept, if not in the family's directory.")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Clients need one of these for all but /health; at least 8 characters.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="Clients need one of the keys in this file, which `fettle keys` writes.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray to join; by default one is started.")] = None,
    dashboard: Annotated[bool, typer.Option(help="Run the Ray dashboard.")] = True,
    fast: Annotated[bool, typer.Option(help="Use Serve's fast path: HAProxy and gRPC.")] = True,
    verbose: Annotated[bool, typer.Option(help="Show Ray's own log.")] = False,
) -> None:
    """Serve families behind one HTTP address until Ctrl-C.

    Example: `fettle serve ./family --port 8000`
    """
    from deployments.server import ServerOptions, running, wait_for_signal
    from deployments.welcome import welcome
    from fettle.config import ServeConfig
    from fettle.machine import usable_cores
    from fettle.promise import EXACT, share

    level = share(max_disagreement)
    config = checked(
        ServeConfig,
        families=[
            {"path": path, "variants": variant or None, "default": default, "max_disagreement": level or EXACT}
            for path in families
        ],
        replicas={
            "min_replicas": min_replicas,
            "max_replicas": max_replicas or max(min_replicas, usable_cores()),
            "threads": threads,
            "device": device,
        },
        batch={"max_queue_s": max_queue},
        gears={"objective_ms": objective},
        monitor={"share": shadow, "directory": evidence},
        api_keys=api_key or [],
        # Ctrl-C waits no longer for texts under way.
        drain_s=30,
        keys_file=None if keys is None else str(keys.resolve()),
    )
    where = ServerOptions(host=host, port=port, address=address, fast=fast, dashboard=dashboard, verbose=verbose)
    typer.echo("starting Ray and the replicas ...", err=True)
    with running(config, where) as url:
        typer.echo("\n".join(welcome(url, config)))
        wait_for_signal()
        typer.echo("stopping ...", err=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the models and families are left; a second run reuses them.")] = Path(
        "fettle-demo"
    ),
    task: Annotated[
        DemoTask, typer.Option(help="encoders: a classifier and an embedding model; generation: a language model.")
    ] = DemoTask.ENCODERS,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    questions: Annotated[int, typer.Option(min=1, max=3434, help="Requests to each variant, or class.")] = 300,
    training_rows: Annotated[int, typer.Option(min=32, help="Texts that the classifier is fine-tuned on.")] = 2500,
) -> None:
    """From a real model to measured variants that answer over HTTP, in a few minutes on two cores.

    The last line on standard output is one JSON object.

    Example: `fettle demo --task generation --out ./fettle-demo`
    """
    from rich.console import Console

    from examples import demo as encoders
    from examples import text_demo as texts

    if task is DemoTask.GENERATION:
        found = texts.figures(texts.TextDemoOptions(out, port, questions), Console())
    else:
        found = encoders.figures(encoders.DemoOptions(out, port, questions, training_rows=training_rows), Console())
    print_json({"directory": str(out), "task": task, "questions": questions, **found})


def _progress() -> Progress:
    from optimize.progress import Progress

    return Progress()


def _print_family(family: Family, as_json: bool) -> None:
    from fettle import display

    if as_json:
        print_json(display.as_json(family))
    else:
        display.print_table(family)


if __name__ == "__main__":
    main()
