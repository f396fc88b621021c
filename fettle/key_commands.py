"""`fettle keys`: make API keys, list them with what they have used, change, revoke and remove them.

A running service takes up every change within a second or two.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fettle.console import checked, print_json
from fettle.errors import UsageError

if TYPE_CHECKING:
    from fettle.keys import KeyRecord
    from fettle.usage import Used

commands = typer.Typer(help="API keys: make, list, change, revoke and remove them.", no_args_is_help=True)

FileOption = Annotated[Path, typer.Option("--file", help="The file of keys, as `fettle serve --keys` is given.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is; in logs and figures.")]
Whole = Annotated[int | None, typer.Option(min=1, show_default="none")]
DEFAULT_FILE = Path("keys.json")
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@commands.command()
def create(
    name: NameArgument,
    file: FileOption = DEFAULT_FILE,
    weight: Annotated[float, typer.Option(help="Its share of a machine that is short, beside other keys.")] = 1.0,
    max_concurrent: Whole = None,
    tokens_per_second: Annotated[float | None, typer.Option(min=0, show_default="none")] = None,
    requests_per_day: Whole = None,
    requests_per_month: Whole = None,
    tokens_per_day: Whole = None,
    tokens_per_month: Whole = None,
    expires: Annotated[str | None, typer.Option(help="A day (2030-01-31, UTC), or a time from now (90d, 12h).")] = None,
) -> None:
    """Make a key and print it, once: it is kept nowhere, and the file has only its hash.

    Example: `fettle keys create search --tokens-per-day 2000000 --expires 90d`
    """
    from fettle import keys
    from fettle.key_terms import KeyTerms

    terms: KeyTerms = checked(
        KeyTerms, name=name, weight=weight, max_concurrent=max_concurrent, tokens_per_second=tokens_per_second
    )
    quotas = keys.Quotas(
        requests_per_day=requests_per_day,
        requests_per_month=requests_per_month,
        tokens_per_day=tokens_per_day,
        tokens_per_month=tokens_per_month,
    )
    now = keys.now_utc()
    ends = None if expires is None else when(expires, now)
    with keys.changing(file) as write:
        known = keys.read(file).keys if file.exists() else []
        if any(record.name == name for record in known):
            raise UsageError(f"there is a key {name!r} in {file}; choose another name, or remove that one")
        made = keys.create(terms, quotas, ends, now)
        write([*known, made.record])
    typer.echo(made.key)
    typer.echo(f"key {name!r} is in {file}; it is not shown again", err=True)


@commands.command("list")
def list_keys(file: FileOption = DEFAULT_FILE, as_json: JsonOption = False) -> None:
    """All keys with their limits, and what they have used on this day and in this month (UTC).

    Example: `fettle keys list --file keys.json`
    """
    from fettle import keys
    from fettle.usage import Ledger, ledger_path

    now = keys.now_utc()
    path, used = ledger_path(file), {}
    if path.exists():
        ledger = Ledger(path, now.timestamp())
        used = ledger.used(now.timestamp())
        ledger.close()
    shown = [_shown(record, used.get(record.name), now) for record in keys.read(file).keys]
    if as_json:
        print_json(shown)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "state", "expires", "today", "this month")
    for key in shown:
        ends = (key["expires"] or "never")[:10]
        table.add_row(key["name"], key["state"], ends, _used(key, "today", "day"), _used(key, "month", "month"))
    Console().print(table)


@commands.command()
def revoke(name: NameArgument, file: FileOption = DEFAULT_FILE) -> None:
    """Refuse a key from now on; it stays in the list.

    Example: `fettle keys revoke search`
    """
    from fettle import keys

    now = keys.now_utc()
    _change(file, name, lambda record: [record.model_copy(update={"revoked": record.revoked or now})])


@commands.command()
def extend(
    name: NameArgument,
    expires: Annotated[str, typer.Option(help="A day (2030-01-31, UTC), a time from now (90d, 12h), or never.")],
    file: FileOption = DEFAULT_FILE,
) -> None:
    """Give a key another end.

    Example: `fettle keys extend search --expires 90d`
    """
    from fettle import keys

    ends = None if expires == "never" else when(expires, keys.now_utc())
    _change(file, name, lambda record: [record.model_copy(update={"expires": ends})])


@commands.command()
def remove(name: NameArgument, file: FileOption = DEFAULT_FILE) -> None:
    """Take a key out of the file.

    Example: `fettle keys remove search`
    """
    _change(file, name, lambda _: [])


def when(text: str, now: datetime) -> datetime:
    """A day or a time from now. Raises UsageError: it is neither, or past."""
    found = re.fullmatch(r"(\d{1,6})([dh])", text)
    if found:
        amount = int(found[1])
        ends = now + (timedelta(days=amount) if found[2] == "d" else timedelta(hours=amount))
    else:
        try:
            ends = datetime.fromisoformat(text)
        except ValueError:
            raise UsageError(
                f"--expires: {text!r} is no day such as 2030-01-31, and no time such as 90d or 12h"
            ) from None
        ends = ends if ends.tzinfo is not None else ends.replace(tzinfo=UTC)
    if ends <= now:
        raise UsageError(f"--expires: {text!r} is past")
    return ends


def _change(file: Path, name: str, change: Any) -> None:
    from fettle import keys

    with keys.changing(file) as write:
        known = keys.read(file).keys
        if all(record.name != name for record in known):
            raise UsageError(f"there is no key {name!r} in {file}; `fettle keys list` shows them")
        write([new for record in known for new in (change(record) if record.name == name else [record])])


def _shown(record: KeyRecord, used: Used | None, now: datetime) -> dict[str, Any]:
    from fettle import keys
    from fettle.usage import Used, day_of

    used = used or Used(day_of(now.timestamp()))
    hidden = {"salt", "sha256"}
    return {
        **record.model_dump(mode="json", exclude=hidden),
        "state": keys.state(record, now),
        "used": {"today": asdict(used.today), "month": asdict(used.month)},
    }


def _used(shown: dict[str, Any], span: str, word: str) -> str:
    """Requests and tokens, each with its quota where it has one."""
    parts = []
    for kind, count in shown["used"][span].items():
        quota = shown["quotas"][f"{kind}_per_{word}"]
        parts.append(f"{count} {kind}" if quota is None else f"{count} of {quota} {kind}")
    return ", ".join(parts)
