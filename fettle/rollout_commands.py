"""`fettle rollout`: a new version of a family beside the one that is served, until it takes over or is rolled back.

A client of the Ray that the service runs on, and as trusted as that: who may connect to it may do all this. The service
itself decides, so this process may end at any time; `status` says where it stands, and `finish` clears up.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from fettle.console import checked, print_json
from fettle.family_commands import JsonOption

if TYPE_CHECKING:
    from deployments.operate import Service
    from deployments.rollouts import RolloutView

commands = typer.Typer(
    help="Let a new version of a family take over in steps, or go back by itself.", no_args_is_help=True
)

EVERY_S = 2.0
ROLLED_BACK = 3

Family = Annotated[str | None, typer.Option("--family", help="The name it is served under, if there are several.")]
Address = Annotated[str | None, typer.Option(help="The Ray of the service; by default the one on this machine.")]
Application = Annotated[str, typer.Option("--app", help="The Serve application.")]


@commands.command()
def start(
    directory: Annotated[str, typer.Argument(metavar="NEW_DIR", help="The new version, a family.")],
    family: Family = None,
    share: Annotated[float, typer.Option(min=0.001, max=0.99, help="Of the requests, at first.")] = 0.05,
    step: Annotated[
        list[float] | None, typer.Option(help="A later share; may be repeated.  [default: 0.25 0.5]")
    ] = None,
    hold: Annotated[float, typer.Option(min=0, help="Seconds that a step takes at least.")] = 60.0,
    requests: Annotated[int, typer.Option(min=1, help="Requests at the new version, in each step.")] = 200,
    shadow: Annotated[float, typer.Option(min=0, max=1, help="Share of its answers that are compared.")] = 0.2,
    slower: Annotated[float, typer.Option(min=1, help="Times the old version's p90 that it may take.")] = 1.5,
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            help="Share of answers that may differ from the old reference's; else only reported, if it changed."
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for its end.")] = False,
    address: Address = None,
    application: Application = "fettle",
    as_json: JsonOption = False,
) -> None:
    """Serve NEW_DIR beside the version that is served, for a growing share of the requests.

    It is rolled back by itself if it does not load, fails more often, is slower, or breaks its promises; the old
    version goes on all the time. Exits with 3 if it was rolled back.

    Example: `fettle rollout start ./family-2 --family sections --share 0.05`
    """
    from deployments.operate import connected_service
    from fettle.config import RolloutConfig
    from fettle.model_store import absolute

    later = step or [each for each in (0.25, 0.5) if each > share]
    config = checked(
        RolloutConfig,
        path=absolute(directory),
        steps=[share, *later],
        hold_s=hold,
        min_requests=requests,
        shadow=shadow,
        slower=slower,
        max_disagreement=max_disagreement,
        attempt=f"{time.time():.0f}",
    )
    with connected_service(address, application) as service:
        service.start(family, config)
        if not detach:
            _follow(service, as_json)


@commands.command()
def status(address: Address = None, application: Application = "fettle", as_json: JsonOption = False) -> None:
    """Say where the rollouts stand, and on what evidence.

    Example: `fettle rollout status`
    """
    from deployments.operate import connected_service

    with connected_service(address, application) as service:
        _show(service.rollouts(), as_json)


@commands.command()
def promote(
    family: Family = None, address: Address = None, application: Application = "fettle", as_json: JsonOption = False
) -> None:
    """Let the new version answer everything now.

    Example: `fettle rollout promote --family sections`
    """
    _end(family, address, application, as_json, promote=True)


@commands.command()
def abort(
    family: Family = None, address: Address = None, application: Application = "fettle", as_json: JsonOption = False
) -> None:
    """Let the old version answer everything again.

    Example: `fettle rollout abort --family sections`
    """
    _end(family, address, application, as_json, promote=False)


@commands.command()
def finish(address: Address = None, application: Application = "fettle", as_json: JsonOption = False) -> None:
    """Take away the versions that lost, where `start` was ended before it could.

    Example: `fettle rollout finish`
    """
    from deployments.operate import connected_service

    with connected_service(address, application) as service:
        views = service.rollouts()
        service.finish()
        _show(views, as_json)


def _end(family: str | None, address: str | None, application: str, as_json: bool, *, promote: bool) -> None:
    from deployments.operate import connected_service

    with connected_service(address, application) as service:
        service.end(family, promote=promote)
        views = service.rollouts()
        service.finish()
        _show(views, as_json)


def _follow(service: Service, as_json: bool) -> None:
    said = None
    while True:
        views = service.rollouts()
        now = [_line(view) for view in views]
        if now != said and not as_json:
            typer.echo("\n".join(now), err=True)
        said = now
        if views and all(view.position.over for view in views):
            break
        time.sleep(EVERY_S)
    service.finish()
    _show(views, as_json)
    if any(view.position.status == "rolled back" for view in views):
        raise typer.Exit(ROLLED_BACK)


def _show(views: list[RolloutView], as_json: bool) -> None:
    if as_json:
        print_json({"rollouts": [view.model_dump(mode="json") for view in views]})
        return
    if not views:
        typer.echo("no rollout")
    for view in views:
        typer.echo(_line(view))
        for number, tally in sorted(view.tallies.items()):
            old, new, compared = tally.old, tally.new, tally.compared
            typer.echo(
                f"  at {100 * view.config.steps[number]:g} %: new {new.requests} requests, {new.failed} failed, "
                f"{new.slow} slow; old {old.requests}, {old.failed}, {old.slow}; "
                f"{compared.differing} of {compared.rows} compared answers differ from the old reference's"
            )
        found = view.findings
        typer.echo(
            f"  evidence, of {found.alarm_at:g}: failures {found.failures:.3g}, slowness {found.slowness:.3g}, "
            f"promises {found.promises:.3g}, disagreement {found.disagreement:.3g}"
        )


def _line(view: RolloutView) -> str:
    position = view.position
    reason = f": {position.reason}" if position.reason else ""
    return f"{view.family}, {view.old} -> {view.new}: {position.status}, {100 * view.share:g} % of the requests{reason}"
