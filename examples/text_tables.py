"""What the demo of a language model found, and its tables, 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

# What ends a text before its model does.
EARLY = ("early_end", "early_answer", "early_vote")


@dataclass(frozen=True, slots=True)
class AskedTexts:
    """One way of asking the section questions, over HTTP. Shares are of the questions, in [0, 1].

    Attributes:
        wish: what was asked for, in words.
        bound: the weakest that a reply named: certified, 0 for the original's own answers, None for no promise.
        answered: the share that each variant or operating point answered.
        early: the share that was ended before the model itself would have, by what ended it.
        tokens: drawn for an answer on average, the one that ends it too; of a vote those of its winner.
        candidates: drawn for an answer on average; 1 where nothing is voted on.
    """

    wish: str
    bound: float | None
    answered: dict[str, float]
    early: dict[str, float]
    tokens: float
    candidates: float
    alone_ms: float
    answers_per_second: float
    same_as_reference: float
    right: float


@dataclass(frozen=True, slots=True)
class VariantSpeed:
    """One variant as it streams texts of `text_tokens` over HTTP, one at a time and `streams` at a time.

    `same_as_reference` is the share of equal answers as optimize measured it.
    """

    variant: str
    size_mb: float
    same_as_reference: float | None
    alone_first_ms: float
    alone_tokens_per_second: float
    streams: int
    text_tokens: int
    first_ms: float
    tokens_per_second: float


def report_ways(asked: Sequence[AskedTexts], questions: int, streams: int, console: Console) -> None:
    """What was promised, what the answers were, and what was saved; the first is exact, the last a vote."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    for name in ("asked for", "answered by", "bound", "early", "tokens", "ms", "per s", "same", "right"):
        table.add_column(name, justify="left" if name in ("asked for", "answered by") else "right", no_wrap=True)
    for row in asked:
        first = max(row.answered, key=lambda name: row.answered[name])
        table.add_row(
            row.wish,
            first + ("" if len(row.answered) == 1 else f" {row.answered[first]:.0%}"),
            "none" if row.bound is None else f"{row.bound:.2%}" if row.bound else "exact",
            f"{sum(row.early.values()):.0%}",
            f"{row.tokens:.1f}",
            f"{row.alone_ms:.0f}",
            f"{row.answers_per_second:.0f}",
            f"{row.same_as_reference:.1%}",
            f"{row.right:.1%}",
        )
    console.print(table)
    exact, vote = asked[0], asked[-1]
    console.print(
        f"{questions} section questions over HTTP, by what a request asked for. Bound: certified, at most so many "
        "answers differ from the original's, at 95 % confidence; what a client's own rules do is covered by no "
        "certificate. Early: ended before the model itself would have ended it. Tokens: drawn for an answer, the one "
        f"that ends it among them. ms: one client. Per s: answers, {streams} clients. Same: the original's "
        "answer. Right: the archive's section.",
        style="dim",
        highlight=False,
    )
    for row in asked[1:-1]:
        if row.early:
            reasons = ", ".join(f"{name} {share:.0%}" for name, share in row.early.items())
            saved = 1 - row.tokens / exact.tokens
            console.print(f"{row.wish}: {reasons}; {saved:.0%} of the tokens saved.", highlight=False)
    console.print(
        f"{vote.wish}: {vote.candidates:.1f} candidates were drawn on average; the others could not have changed the "
        "winner.",
        highlight=False,
    )


def report_speeds(speeds: Sequence[VariantSpeed], console: Console) -> None:
    """How fast each variant writes; at least one."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("variant", no_wrap=True)
    streams, tokens = speeds[0].streams, speeds[0].text_tokens
    for name in ("MB", "same", "first ms\n1 stream", "tokens/s\n1 stream"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in (f"first ms\n{streams} streams", f"tokens/s\n{streams} streams"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in speeds:
        table.add_row(
            row.variant,
            f"{row.size_mb:.0f}",
            "" if row.same_as_reference is None else f"{row.same_as_reference:.1%}",
            f"{row.alone_first_ms:.0f}",
            f"{row.alone_tokens_per_second:,.0f}",
            f"{row.first_ms:.0f}",
            f"{row.tokens_per_second:,.0f}",
        )
    console.print(table)
    console.print(
        f"Each variant by name, {tokens} tokens a text, streamed. Same: answers as the original's, as optimize "
        "measured. First: from the request to the first piece of text. The client runs on the same cores.",
        style="dim",
        highlight=False,
    )
