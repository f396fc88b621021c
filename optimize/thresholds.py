"""Search for cheap ways to answer, on the tuning rows alone: temperatures, and thresholds of exits and cascades.

An operating point is seen as one list of gates, the stages of its variants in order. For a price on errors, the best
threshold of one gate, the others given, follows from one cumulative sum over the rows by score; going through the gates
from the back until nothing changes, for falling and then for rising prices, gives each structure's trade of cost
against disagreement. Nothing here is promised: `optimize.certify` tests what was found on rows that were not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from fettle.manifest import Gate, Step, Task
from fettle.points import NEVER, has_scores
from optimize.grading import Bools, Graded, expected_cost, gates_of, worst_errors

Found = dict[tuple[Any, ...], "Policy"]

PRICES = 64
SWEEPS = 2
# How far down its grid one gate is moved at a time, and how many such moves fill a budget.
REACH = 4
MOVES = 8
# Beyond this many variants, only the best of them are tried in cascades of three.
WIDEST = 8
LONGEST = 3


@dataclass(frozen=True, slots=True)
class Policy:
    """A way to answer, with what it costs a row on average in ms and the share that it changes on the tuning rows."""

    steps: tuple[Step, ...]
    cost_ms: float
    disagreement: float


def search(
    graded: Mapping[str, Sequence[Graded]],
    reference: str,
    budgets: Sequence[float],
    task: Task,
    report: Callable[[float], None],
) -> list[Policy]:
    """Policies of every structure that lie within the largest budget of disagreement, in no order, each once."""
    costs = {name: sum(stage.cost_ms for stage in stages) for name, stages in graded.items()}
    others = sorted((name for name in graded if name != reference), key=lambda name: costs[name])
    found: Found = {}
    if not has_scores(task):
        _collect(((name,) for name in graded), graded, budgets, costs[reference], found)
        report(1.0)
        return list(found.values())
    short = [(name,) for name in (*others, reference)] + [(name, reference) for name in others]
    _collect(short, graded, budgets, costs[reference], found)
    report(0.1)
    kept = _most_useful(others, list(found.values()), budgets)
    long = _cascades(kept, reference)
    for number, structure in enumerate(long):
        _collect([structure], graded, budgets, costs[reference], found)
        report(0.1 + 0.8 * (number + 1) / len(long))
    for number, budget in enumerate(sorted(budgets)):
        _fill(budget, graded, found)
        report(0.9 + 0.1 * (number + 1) / len(budgets))
    return list(found.values())


def cheapest(policies: Iterable[Policy], budget: float) -> Policy | None:
    """The cheapest that changes at most `budget`; of equally cheap ones, the one that changes least."""
    within = (policy for policy in policies if policy.disagreement <= budget)
    return min(within, key=lambda policy: (policy.cost_ms, policy.disagreement), default=None)


def _cascades(variants: Sequence[str], reference: str) -> list[tuple[str, ...]]:
    """Two or three variants from cheap to dear, the reference at most as the last; those of `search` left out."""
    found: list[tuple[str, ...]] = []
    for length in range(2, LONGEST + 1):
        found += combinations(variants, length)
        if length > 2:
            found += [(*chosen, reference) for chosen in combinations(variants, length - 1)]
    return found


def _most_useful(variants: list[str], policies: list[Policy], budgets: Sequence[float]) -> list[str]:
    """The variants that lead, on their own or before the reference, to the cheapest answers over the budgets."""
    if len(variants) <= WIDEST:
        return variants

    def mean_cost(name: str) -> float:
        mine = [policy for policy in policies if policy.steps[0].variant == name]
        best = [cheapest(mine, budget) for budget in budgets]
        return sum(policy.cost_ms if policy else float("inf") for policy in best)

    useful = set(sorted(variants, key=mean_cost)[:WIDEST])
    return [name for name in variants if name in useful]


def _collect(
    structures: Iterable[tuple[str, ...]],
    graded: Mapping[str, Sequence[Graded]],
    budgets: Sequence[float],
    unit_ms: float,
    found: Found,
) -> None:
    seen = set(found)
    for structure in structures:
        gates = [stage for name in structure for stage in graded[name]]
        for thresholds in set(_descend(gates, unit_ms)):
            steps = _trimmed(_steps(gates, thresholds), graded)
            if (key := _key(steps)) not in seen:
                seen.add(key)
                policy = _evaluated(steps, graded)
                if policy.disagreement <= max(budgets):
                    found[key] = policy


def _fill(budget: float, graded: Mapping[str, Sequence[Graded]], found: Found) -> None:
    """Spend what a budget leaves: from its cheapest policy, lower single thresholds while that makes it cheaper.

    A price per error finds only the corners of the trade; between two corners a budget would be left unspent.
    """
    best = cheapest(found.values(), budget)
    for _ in range(MOVES if best else 0):
        assert best is not None
        tried = (_evaluated(steps, graded) for steps in _lowered(best.steps, graded))
        better = cheapest(tried, budget)
        if better is None or better.cost_ms >= best.cost_ms:
            break
        best = better
        found[_key(best.steps)] = best


def _lowered(steps: tuple[Step, ...], graded: Mapping[str, Sequence[Graded]]) -> Iterator[tuple[Step, ...]]:
    """The same with one threshold (not the very last) up to `REACH` places further down its grid."""
    gates = gates_of(steps, graded)
    stages, thresholds = [stage for stage, _ in gates], [threshold for _, threshold in gates[:-1]]
    for number, threshold in enumerate(thresholds):
        grid = stages[number].grid
        at = int(np.searchsorted(-grid, -threshold))
        for lower in grid[at + 1 : at + 1 + REACH]:
            yield _steps(stages, [*thresholds[:number], float(lower), *thresholds[number + 1 :]])


def _evaluated(steps: tuple[Step, ...], graded: Mapping[str, Sequence[Graded]]) -> Policy:
    return Policy(steps, expected_cost(steps, graded), float(worst_errors(steps, graded).mean()))


def _key(steps: tuple[Step, ...]) -> tuple[Any, ...]:
    return tuple((step.variant, *(gate.threshold for gate in step.gates)) for step in steps)


def _descend(gates: Sequence[Graded], unit_ms: float) -> Iterator[tuple[float, ...]]:
    """Thresholds of all gates but the last, for each price of an error; no row leaves early at first."""
    prices = unit_ms * np.geomspace(1000, 0.3, PRICES)
    chosen = [0] * (len(gates) - 1)
    yield tuple(NEVER for _ in chosen)
    for price in (*prices, *prices[::-1]):
        for _ in range(SWEEPS):
            before = list(chosen)
            _sweep(gates, chosen, float(price))
            if chosen == before:
                break
        yield tuple(float(gate.grid[index]) for gate, index in zip(gates, chosen, strict=False))


def _sweep(gates: Sequence[Graded], chosen: list[int], price: float) -> None:
    """Improve each gate's threshold in turn, from the back; `chosen` holds places in the gates' grids."""
    reach: list[Bools] = [np.ones(len(gates[0].lowest), bool)]
    for gate, index in zip(gates, chosen, strict=False):
        reach.append(reach[-1] & (gate.lowest < gate.grid[index]))
    # What a row costs from a stage on, errors at their price.
    onward = gates[-1].cost_ms + price * gates[-1].ever_wrong
    for number in reversed(range(len(chosen))):
        gate = gates[number]
        here = price * gate.ever_wrong
        gain = np.where(reach[number], here - onward, 0.0)[gate.order]
        total = np.concatenate([[0.0], np.cumsum(gain)])
        chosen[number] = int(np.argmin(total[gate.cuts]))
        onward = gate.cost_ms + np.where(gate.lowest >= gate.grid[chosen[number]], here, onward)


def _steps(gates: Sequence[Graded], thresholds: Sequence[float]) -> tuple[Step, ...]:
    """The last gate takes whatever reaches it."""
    by_variant: dict[str, list[Gate]] = {}
    for gate, threshold in zip(gates, (*thresholds, 0.0), strict=True):
        by_variant.setdefault(gate.variant, []).append(Gate(threshold=threshold, temperature=gate.temperature))
    return tuple(Step(variant=variant, gates=kept) for variant, kept in by_variant.items())


def _trimmed(steps: tuple[Step, ...], graded: Mapping[str, Sequence[Graded]]) -> tuple[Step, ...]:
    """Without variants that answer nothing and without those that nothing reaches."""
    kept = [step for step in steps[:-1] if any(gate.threshold <= 1 for gate in step.gates)] + [steps[-1]]
    reach: Any = 1.0
    for number, step in enumerate(kept):
        for stage, gate in zip(graded[step.variant], step.gates, strict=True):
            reach = reach * (~stage.taken(gate.threshold)).mean(axis=0)
        if not np.any(reach):
            last = step.model_copy(
                update={"gates": [*step.gates[:-1], step.gates[-1].model_copy(update={"threshold": 0.0})]}
            )
            return (*kept[:number], last)
    return tuple(kept)
