"""HTML that cannot be broken by a label or a model's name: text is escaped wherever it enters, once.

Only what the report needs: elements, tables, and figures as text. Knows nothing of families.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Generic, TypeVar

ABSENT = "–"
# HTML only: in SVG such a tag would swallow what follows.
VOID = {"meta"}

Item = TypeVar("Item")


class Html(str):
    """Markup that is already safe; any other string is text and gets escaped."""

    __slots__ = ()


Child = str | float | None
Attribute = str | float | None


def tag(name: str, *children: Child, **attributes: Attribute) -> Html:
    """One element. `class_` is the attribute `class`, other underscores are dashes; None leaves child or attribute out.

    The names are the program's own; children and values may be anybody's.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>" if name in VOID else f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    return Html("".join(_escaped(child) for child in children if child is not None))


def paragraph(*children: Child, class_: str | None = None) -> Html:
    return tag("p", *children, class_=class_)


def listing(items: Iterable[Child], kind: str = "ul", class_: str | None = None) -> Html | None:
    """A list, or None if there are no items."""
    entries = [tag("li", item) for item in items]
    return tag(kind, *entries, class_=class_) if entries else None


def details(summary: str, *children: Child) -> Html:
    return tag("details", tag("summary", summary), *children)


@dataclass(frozen=True, slots=True)
class Column(Generic[Item]):
    """`cell` makes the content of a row; figures are aligned right and their unit stands in the header."""

    title: str
    cell: Callable[[Item], Child]
    unit: str = ""
    figure: bool = True


def table(
    columns: Sequence[Column[Item]],
    rows: Sequence[Item],
    *,
    cards: bool = False,
    row_class: Callable[[Item], str | None] | None = None,
) -> Html:
    """A table whose first column names the row. With `cards`, a narrow screen shows each row as a block of its own."""
    head = tag("tr", *(_header(column) for column in columns))
    body = [
        tag(
            "tr",
            *(_cell(column, row, index) for index, column in enumerate(columns)),
            class_=row_class(row) if row_class else None,
        )
        for row in rows
    ]
    inner = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="wide cards" if cards else "wide")


def bar(share: float) -> Html:
    """A bar of a cell's width times `share`."""
    return tag("span", tag("i", style=f"width:{100 * min(max(share, 0.0), 1.0):.1f}%"), class_="bar")


# Figures. Units are in the headers of tables, and behind a no-break space in prose.


def fixed(value: float | None, digits: int = 2) -> str:
    return ABSENT if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def whole(value: float | None) -> str:
    return fixed(value, 0)


def percent(share: float | None, digits: int = 2) -> str:
    """A share in [0, 1] as a figure in %, without the sign."""
    return ABSENT if share is None else fixed(100 * share, digits)


def percent_of(share: float | None) -> str:
    """A share in prose: 0.5 %, 23 %, at most two digits that count below 10 %."""
    if share is None:
        return ABSENT
    value = 100 * share
    return f"{value:.0f}\u00a0%" if value >= 10 else f"{value:.2g}\u00a0%"


def times(ratio: float | None) -> str:
    return ABSENT if ratio is None else f"{ratio:.1f}×" if ratio < 100 else f"{ratio:.0f}×"


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"


def _header(column: Column[Item]) -> Html:
    unit = tag("small", column.unit) if column.unit else None
    return tag("th", column.title, unit, scope="col", class_="n" if column.figure else None)


def _cell(column: Column[Item], row: Item, index: int) -> Html:
    content = column.cell(row)
    if index == 0:
        return tag("th", content, scope="row", class_="n" if column.figure else None)
    label = f"{column.title}, {column.unit}" if column.unit else column.title
    return tag("td", content, class_="n" if column.figure else None, data_label=label)


def _escaped(child: str | float) -> str:
    return child if isinstance(child, Html) else escape(_number(child))


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
