"""What the user sees while a run works: a bar for the step and for the whole, and an estimate of the time left.

On a terminal the bars move; elsewhere each step is one plain line. Everything goes to standard error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich import progress as bars
from rich.console import Console

STEPS = 1000
TRUST_SECONDS = 10.0


class Progress:
    """Steps announced by `plan`, then done one by one with `step` or left out with `skip`."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._expected: dict[str, float] = {}
        self._finished: set[str] = set()
        self._spent = 0.0
        self._foreseen = 0.0
        self._started = time.monotonic()
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TaskProgressColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("[dim]{task.fields[left]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._whole = self._bars.add_task("[bold]in all", total=STEPS, left="", start=False)

    def __enter__(self) -> Progress:
        self._bars.start()
        self._bars.start_task(self._whole)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def plan(self, expected_seconds: dict[str, float]) -> None:
        """Announce steps with a first guess of their seconds; the guesses are corrected by the steps' real times."""
        self._expected.update(expected_seconds)

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[float], None]]:
        """Do one step; the block may report how far it is, from 0 to 1."""
        started = time.monotonic()
        task = self._bars.add_task(f"  {name}", total=1.0, left="")

        def report(done: float) -> None:
            self._bars.update(task, completed=done)
            self._show_whole(name, done)

        report(0.0)
        try:
            yield report
        finally:
            self._bars.remove_task(task)
        seconds = time.monotonic() - started
        self._spent += seconds
        self._foreseen += self._expected.get(name, 0.0)
        self._end(name, f"{seconds:.1f} s")

    def skip(self, name: str, reason: str) -> None:
        """A step that needs no work."""
        self._end(name, reason)

    def fail(self, name: str, reason: str) -> None:
        self._finished.add(name)
        self.say(f"[red]✗[/] {name}: {_plain(reason)}")

    def warn(self, message: str) -> None:
        self.say(f"[yellow]![/] {_plain(message)}")

    def say(self, line: str) -> None:
        """A line of rich markup that stays above the bars."""
        self._bars.console.print(line, soft_wrap=True, highlight=False)

    def seconds_left(self, step: str | None = None, done: float = 0.0) -> float:
        """Expected seconds of what is not finished, at the pace of what is; `done` is the share of the present step."""
        left = {name: seconds for name, seconds in self._expected.items() if name not in self._finished}
        if step in left:
            left[step] *= 1 - done
        # The first steps are short and say little, so the guesses keep some weight.
        pace = (self._spent + TRUST_SECONDS) / (self._foreseen + TRUST_SECONDS)
        return sum(left.values()) * pace

    def _end(self, name: str, outcome: str) -> None:
        self._finished.add(name)
        left = "" if self._bars.disable is False else f", {_in_words(self.seconds_left())} left"
        self.say(f"[green]✓[/] {name} [dim]({outcome}{left})[/]")
        self._show_whole()

    def _show_whole(self, step: str | None = None, done: float = 0.0) -> None:
        left = self.seconds_left(step, done)
        elapsed = time.monotonic() - self._started
        self._bars.update(
            self._whole, completed=STEPS * elapsed / max(elapsed + left, 1e-9), left=f"{_in_words(left)} left"
        )


def _in_words(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"


def _plain(text: str) -> str:
    """Keep rich from reading brackets in a message as markup."""
    return text.replace("[", r"\[")
