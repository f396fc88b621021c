"""Plain observations about the levers, each derived from measured figures."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import JsonValue

from fettle.manifest import Precision, Runtime
from optimize.report_facts import Facts, Lever, Tried, lever_of_pass
from optimize.report_html import fixed, percent_of

NOTHING_GAINED = 0.95
CLEARLY_SMALLER = 0.8
SAME_METRIC = 0.005
MANY_ANSWERS = 0.01
# Levers that leave the original's weights as they are, up to rounding.
UNTRAINED = (Lever.QUANTIZED, Lever.HARDWARE)


def remarks(facts: Facts, lever: Lever) -> list[str]:
    """What a reader of the lever's table should not miss."""
    if lever is Lever.REFERENCE:
        return []
    items = [item for item in facts.tried.values() if item.lever is lever]
    lines = [_size_against_time(facts, item) for item in items]
    return [line for line in [*lines, _exits(lever), _batching(items), _metric(items)] if line is not None]


def _exits(lever: Lever) -> str | None:
    if lever is not Lever.EXITS:
        return None
    return (
        "The cost above is that of a row that goes through all stages. What exits save depends on the thresholds, and "
        "the operating points show it."
    )


def _batching(items: Sequence[Tried]) -> str | None:
    found = [
        f"{item.id} ({percent_of(item.manifest.measured.batching.changed)})"
        for item in items
        if item.manifest.measured is not None
        and not item.manifest.measured.batching.invariant
        and item.manifest.measured.batching.changed > 0
    ]
    if not found:
        return None
    return (
        f"Some answers depend on which rows share the batch: {', '.join(found)}. A certificate that such a variant is "
        "part of must hold for the worst of several batchings."
    )


def _metric(items: Sequence[Tried]) -> str | None:
    """The task's metric can stay the same while answers change: wrong ones become right and right ones wrong."""
    found, name, original = [], None, None
    for item in items:
        quality = None if item.manifest.measured is None else item.manifest.measured.quality
        if quality is None or quality.metric is None or quality.reference_metric is None:
            continue
        if quality.metric >= quality.reference_metric - SAME_METRIC and quality.disagreement >= MANY_ANSWERS:
            name, original = quality.metric_name, quality.reference_metric
            found.append(f"{item.id} {fixed(quality.metric, 3)}, {percent_of(quality.disagreement)} differ")
    if not found:
        return None
    return f"The {name} hides changed answers. The original has {fixed(original, 3)}; {'; '.join(found)}."


def _size_against_time(facts: Facts, item: Tried) -> str | None:
    other = _compared_with(facts, item)
    if other is None or item.cost is None or other.cost is None or not other.manifest.size_bytes:
        return None
    size, cost = item.manifest.size_bytes / other.manifest.size_bytes, item.cost / other.cost
    if cost > 1 / NOTHING_GAINED:
        return f"{item.id} is slower: it takes {percent_of(cost)} of {other.id}’s time."
    if size < CLEARLY_SMALLER and cost > NOTHING_GAINED:
        what = "sharing" if item.lever is Lever.RESHAPED else "it"
        return (
            f"{item.id} has {percent_of(size)} of {other.id}’s size and takes {percent_of(cost)} of its time: "
            f"{what} saves memory and not time."
        )
    if item.lever is not Lever.PRUNED:
        return None
    if size > NOTHING_GAINED:
        return (
            f"{item.id} is as large as {other.id} and takes {percent_of(cost)} of its time: weights were set to zero, "
            "not removed, and a dense kernel multiplies zeros as well."
        )
    return (
        f"{item.id} is physically smaller: {percent_of(size)} of {other.id}’s size, and it takes {percent_of(cost)} of "
        "its time."
    )


def _compared_with(facts: Facts, item: Tried) -> Tried | None:
    """A variant that differs in the lever alone: same runtime and, but for quantization, same precision.

    The parent if it is one; else the original's own weights in that precision, in the same quantization if it exists.
    """
    parent, wanted = facts.parent(item), _likeness(item)
    if item.lever in UNTRAINED:
        same = parent is not None and parent.manifest.runtime is item.manifest.runtime
        return parent if same else facts.baseline
    if parent is not None and _likeness(parent)[:2] == wanted[:2]:
        return parent
    plain = [other for other in facts.tried.values() if other.lever in UNTRAINED and _likeness(other)[:2] == wanted[:2]]
    return next((other for other in plain if _likeness(other) == wanted), plain[0] if plain else None)


def _likeness(item: Tried) -> tuple[Runtime, Precision, list[dict[str, JsonValue]]]:
    passes = [record for record in item.manifest.recipe if lever_of_pass(record) is Lever.QUANTIZED]
    # Without parameters it is not the scheme of the products.
    quantized = [record.parameters for record in passes if record.parameters]
    return item.manifest.runtime, item.manifest.precision, quantized
