"""Commands about a family that is there: whether it is intact, and new certificates for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fettle.console import FAILED, print_json
from fettle.errors import FettleError

FamilyArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A family, made by `fettle optimize`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
commands = typer.Typer()


@commands.command()
def verify(directory: FamilyArgument, as_json: JsonOption = False) -> None:
    """Recompute every hash of a family; exit with 1 and the file's name if one differs.

    Example: `fettle verify ./family`
    """
    from fettle.family import Family

    try:
        problems = [error.message for error in Family.open(directory).verify()]
    except FettleError as error:
        problems = [error.message]
    if as_json:
        print_json({"intact": not problems, "problems": problems})
    elif not problems:
        typer.echo(f"{directory}: intact")
    else:
        for problem in problems:
            typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(FAILED)


@commands.command()
def recertify(
    directory: FamilyArgument,
    point: Annotated[
        str | None, typer.Option(help="The operating point; by default the one that is revoked, or the only one.")
    ] = None,
    max_disagreement: Annotated[
        float | None, typer.Option(help="The level to certify; by default the point's own.", show_default=False)
    ] = None,
    quality: Annotated[
        Path | None, typer.Option("--directory", help="Where the monitor keeps its evidence, if not in the family.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The name it is served under, if not the family's own.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Certify an operating point anew, on pairs of answers that a running service collected.

    After an alarm only pairs since then count. A running service takes the new certificate up within seconds. Asking
    often does no harm: the test holds at all times together.

    Example: `fettle recertify ./family --point within-0.01 --max-disagreement 0.02`
    """
    from fettle import display
    from fettle.recertify import recertify as certify_anew

    made = certify_anew(directory, point=point, max_disagreement=max_disagreement, quality=quality, name=name)
    if as_json:
        print_json({**made.point.model_dump(mode="json"), "since_alarm": made.since_alarm})
    else:
        typer.echo(display.certificate_in_words(made.point))
        typer.echo(f"report.html is of before; `fettle report {directory}` writes it again", err=True)
