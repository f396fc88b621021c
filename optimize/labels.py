"""The data's labels in the model's terms: names or indices to numbers, and a count of what the model does not know."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fettle.manifest import Head, Task

SHOWN = 3


@dataclass(frozen=True, slots=True)
class Targets:
    """Labels as numbers: `known` bool [rows]; `values` int64 [known] | bool [known, labels] | float64 [known]."""

    known: NDArray[np.bool_]
    values: NDArray[Any]
    warning: str | None


def map_labels(labels: list[Any], task: Task) -> Targets:
    """The data's labels in the model's terms; a row whose label the model does not know is not `known`.

    A label is the model's name for it or its index; for a multi-label model a list of those, or a 0/1 vector with
    one number for each label; for regression a number.
    """
    indices = {name: index for index, name in enumerate(task.labels)}
    values: list[Any] = []
    unknown: Counter[str] = Counter()
    known = np.zeros(len(labels), np.bool_)
    for row, label in enumerate(labels):
        if label is None:
            continue
        value = _target(label, task, indices)
        if value is None:
            unknown[str(label)] += 1
        else:
            known[row] = True
            values.append(value)
    return Targets(known, np.array(values), _unknown_warning(unknown, len(labels)))


def _target(label: Any, task: Task, indices: dict[str, int]) -> Any:
    match task.head:
        case Head.REGRESSION:
            return _number(label)
        case Head.MULTI_LABEL:
            return _label_set(label, indices)
        case _:
            return _label_index(label, indices)


def _label_index(label: Any, indices: dict[str, int]) -> int | None:
    if isinstance(label, str) and label in indices:
        return indices[label]
    number = _number(label)
    return int(number) if number is not None and number in range(len(indices)) else None


def _label_set(label: Any, indices: dict[str, int]) -> NDArray[np.bool_] | None:
    if isinstance(label, str) and label.startswith("["):  # a list in a CSV cell
        try:
            label = json.loads(label)
        except json.JSONDecodeError:
            return None
    members = label if isinstance(label, list) else [label]
    if len(members) == len(indices) and all(member in (0, 1) for member in members):
        return np.array(members, np.bool_)
    found = [_label_index(member, indices) for member in members]
    if None in found:
        return None
    return np.isin(np.arange(len(indices)), np.array(found, np.int64))


def _number(label: Any) -> float | None:
    try:
        number = float(label)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _unknown_warning(unknown: Counter[str], rows: int) -> str | None:
    if not unknown:
        return None
    names = ", ".join(f"{name!r} ({count})" for name, count in unknown.most_common(SHOWN))
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    return (
        f"{unknown.total()} of {rows} rows have labels that the model does not know, and do not count "
        f"in its metric: {names}{more}"
    )
