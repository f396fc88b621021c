"""Search for cheap ways to answer with texts, on the tuning rows alone: early stops, cascades, and giving up.

Two structures: one variant that may stop early, and a cheap variant whose answer is taken if its score suffices, before
the reference, both of which may stop early. For each kind of stop, threshold and score the best place to accept follows
from cumulative sums over the rows by score. Nothing here is promised: `optimize.text_certify` tests what was found on
rows that were not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from fettle.findings import AnswerGate, EndGate, Floor, Gate, Step, StopGates, TextFeature, TextGates, TextScore
from fettle.points import NEVER
from fettle.text_scores import FEATURES, Array, fit, fit_weights, scores_of
from optimize.text_tables import ALL_THE_WAY, Ends, Table, accepted, attempt, evaluate, threshold_of, with_threshold
from optimize.thresholds import Policy

# Thresholds tried: of a stop, of acceptance; and how many ways to stop the reference are tried behind a cascade.
STOPS: Final = 24
ACCEPTS: Final = 200
TAILS: Final = 8
ROWS_PER_LEVEL = 10
# Kinds of stop at an answer: its measure, and how often it has to be found.
ANSWERS: Final[tuple[tuple[Literal["product", "lowest"], int], ...]] = (
    ("product", 1),
    ("product", 2),
    ("product", 3),
    ("lowest", 1),
)
# Texts up to this long are looked at after every token, longer ones after every so many.
SHORT, EVERY = 32, 8
# What a score may be made of; several features are weighted by their fit.
SCORES: Final[tuple[tuple[TextFeature, ...], ...]] = (
    ("sum",),
    ("lowest",),
    ("tenth",),
    ("mean",),
    ("lowest", "tenth", "median", "mean", "length"),
)
# Floors are tried after 1, 2, 4, ... tokens, and stand for at least so many attempts given up.
FEWEST_GIVEN_UP = 10


@dataclass(frozen=True, slots=True)
class Stopped:
    """One variant with one way to stop, on all rows."""

    variant: str
    stop: StopGates
    ends: Ends
    cost_ms: Array

    @property
    def mean_cost(self) -> float:
        return float(self.cost_ms.mean())

    @property
    def mean_wrong(self) -> float:
        return float(self.ends.wrong.mean())


def search(tables: Mapping[str, Table], reference: str, budgets: Sequence[float]) -> list[Policy]:
    """The cheapest way within each budget of disagreement, each once, from cheap to dear."""
    best: dict[float, Policy] = {}
    stopped = {name: list(ways_to_stop(name, table)) for name, table in tables.items()}
    for ways in stopped.values():
        for way in ways:
            _offer(best, budgets, (_step(way, 0.0, None),), way.mean_cost, way.mean_wrong)
    tails = _frontier(stopped[reference], max(budgets))
    for name, ways in stopped.items():
        for way in ways if name != reference else ():
            for score in scores(way.ends):
                for tail in tails:
                    _cascade(best, budgets, way, score, tail)
    unique = {steps_key(policy.steps): policy for policy in best.values()}
    return sorted(unique.values(), key=lambda policy: (policy.cost_ms, policy.disagreement))


def ways_to_stop(variant: str, table: Table) -> Iterator[Stopped]:
    """To its own end, and by each kind of stop at each of its thresholds."""
    for kind in kinds(table):
        for threshold in thresholds(table, kind):
            stop = with_threshold(kind, threshold)
            ends = table.ends(stop)
            yield Stopped(variant, stop, ends, table.cost_ms(ends.drawn))


def kinds(table: Table) -> list[StopGates]:
    """Kinds of stop that may pay for texts of this length, their thresholds of no account."""
    long = float(np.median(table.lengths)) > SHORT
    looks = {"first": EVERY, "every": EVERY} if long else {"first": 1, "every": 1}
    answers = [
        StopGates(answer=AnswerGate(threshold=1.0, measure=measure, stable=stable, **looks))
        for measure, stable in ANSWERS
    ]
    return [ALL_THE_WAY, StopGates(end=EndGate(threshold=1.0)), *(answers if table.stops_at_answers else ())]


def thresholds(table: Table, kind: StopGates) -> list[float]:
    """Those worth trying, falling; one, of no account, where nothing stops."""
    if kind == ALL_THE_WAY:
        return [threshold_of(kind)]
    sure = table.options(kind).sure
    early = sure[np.isfinite(sure) & (sure > 0)]
    if not len(early):
        return []
    shares = np.sin(np.linspace(0, np.pi / 2, min(STOPS, len(early)))) ** 2
    return [float(value) for value in np.unique(np.quantile(early, shares, method="higher"))[::-1]]


def scores(ends: Ends) -> Iterator[TextScore]:
    """The scores that may tell good answers from others, fitted to these; equal ones once."""
    seen: list[Array] = []
    for among in SCORES:
        columns = ends.features[:, [FEATURES.index(feature) for feature in among]]
        weights: dict[TextFeature, float] = dict.fromkeys(among, 1.0)
        if len(among) > 1:
            weights = fit_weights(ends.features, ~ends.wrong, among)
            if len(weights) == 1:
                continue
        elif any(np.array_equal(columns[:, 0], other, equal_nan=True) for other in seen):
            continue
        else:
            seen.append(columns[:, 0])
        yield fit(ends.features, ~ends.wrong, weights)


def give_up(policy: Policy, tables: Mapping[str, Table]) -> Policy:
    """The same with floors under which a first attempt is given up, where they make it cheaper on these rows.

    An attempt that is given up would mostly not have been accepted; one that would have costs the next step in vain. To
    give up cannot change an answer to another than the next step's.
    """
    first, *rest = policy.steps
    if not rest or first.text is None:
        return policy
    steps: tuple[Step, ...] = policy.steps
    table = tables[first.variant]
    after = 1
    while after < table.lengths.max():
        floor = _floor(steps, tables, after)
        if floor is not None:
            floors = [*(steps[0].text.floors if steps[0].text is not None else ()), floor]
            text = first.text.model_copy(update={"floors": floors})
            steps = (first.model_copy(update={"text": text}), *rest)
        after *= 2
    return evaluated(steps, tables)


def evaluated(steps: tuple[Step, ...], tables: Mapping[str, Table]) -> Policy:
    found = evaluate(steps, tables)
    return Policy(steps, float(found.cost_ms.mean()), float(found.wrong.mean()))


def steps_key(steps: Sequence[Step]) -> str:
    return "\n".join(step.model_dump_json() for step in steps)


def _floor(steps: tuple[Step, ...], tables: Mapping[str, Table], after: int) -> Floor | None:
    """The floor after so many tokens that saves most, given the floors before it; None where none saves."""
    first, rest = steps[0], steps[1:]
    table = tables[first.variant]
    ends, lost = attempt(first, table, last=False)
    onward = evaluate(rest, tables).cost_ms
    assert first.text is not None
    assert first.text.score is not None
    scored = scores_of(first.text.score, table.features_after(after)).astype(np.float32)
    # Whom the floor meets: also who stops with an answer at this very token, since giving up goes before.
    under_way = np.flatnonzero((ends.kept >= after) & ~np.isnan(scored))
    order = under_way[np.argsort(scored[under_way], kind="stable")]
    saved = table.costs.decode_ms * (ends.drawn - after) - np.where(accepted(first, ends) & ~lost, onward, 0.0)
    totals = np.cumsum(saved[order])
    # A floor lies above all rows of one score or none.
    ranked = scored[order]
    edges = np.flatnonzero(ranked[1:] > ranked[:-1])
    edges = edges[edges + 1 >= FEWEST_GIVEN_UP]
    if not len(edges):
        return None
    best = edges[np.argmax(totals[edges])]
    return Floor(after=after, score=float(ranked[best + 1])) if totals[best] > 0 else None


def _cascade(
    best: dict[float, Policy], budgets: Sequence[float], way: Stopped, score: TextScore, tail: Stopped
) -> None:
    """Offer the cheapest place to accept within each budget."""
    scored = scores_of(score, way.ends.features).astype(np.float32)
    filled = np.nan_to_num(scored, nan=-1.0)
    grid = _grid(filled)
    order = np.argsort(-filled, kind="stable")
    cuts = np.searchsorted(-filled[order], -grid, side="right")
    rows = len(filled)
    errors = (_sum_before(way.ends.wrong[order], cuts) + _sum_after(tail.ends.wrong[order], cuts)) / rows
    cost = way.mean_cost + _sum_after(tail.cost_ms[order], cuts) / rows
    for budget in budgets:
        within = np.flatnonzero(errors <= budget)
        if not len(within):
            continue
        at = within[np.argmin(cost[within])]
        if _better(best.get(budget), float(cost[at]), float(errors[at])):
            steps = (_step(way, float(grid[at]), score), _step(tail, 0.0, None))
            best[budget] = Policy(steps, float(cost[at]), float(errors[at]))


def _grid(scored: NDArray[np.float32]) -> NDArray[np.float32]:
    """Thresholds of acceptance to try, falling, dense at both ends; as `optimize.grading.Graded.grid`."""
    finite = scored[scored >= 0]
    if not len(finite):
        return np.array([NEVER], np.float32)
    shares = np.sin(np.linspace(0, np.pi / 2, min(ACCEPTS, max(2, len(finite) // ROWS_PER_LEVEL)))) ** 2
    return np.unique(np.quantile(finite, shares, method="higher"))[::-1].astype(np.float32)


def _sum_before(values: NDArray[np.generic], cuts: NDArray[np.intp]) -> Array:
    totals: Array = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])[cuts]
    return totals


def _sum_after(values: NDArray[np.generic], cuts: NDArray[np.intp]) -> Array:
    totals = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    rest: Array = totals[-1] - totals[cuts]
    return rest


def _offer(
    best: dict[float, Policy], budgets: Sequence[float], steps: tuple[Step, ...], cost: float, errors: float
) -> None:
    for budget in budgets:
        if errors <= budget and _better(best.get(budget), cost, errors):
            best[budget] = Policy(steps, cost, errors)


def _better(known: Policy | None, cost: float, errors: float) -> bool:
    return known is None or (cost, errors) < (known.cost_ms, known.disagreement)


def _frontier(ways: Sequence[Stopped], largest: float) -> list[Stopped]:
    """Those within the largest budget that no other beats in cost and disagreement, a few of them from end to end."""
    kept: list[Stopped] = []
    for way in sorted(ways, key=lambda way: (way.mean_wrong, way.mean_cost)):
        if way.mean_wrong <= largest and (not kept or way.mean_cost < kept[-1].mean_cost):
            kept.append(way)
    chosen = np.unique(np.linspace(0, len(kept) - 1, min(TAILS, len(kept))).round().astype(int))
    return [kept[index] for index in chosen]


def _step(way: Stopped, accept: float, score: TextScore | None) -> Step:
    text = None
    if way.stop != ALL_THE_WAY or score is not None:
        text = TextGates(end=way.stop.end, answer=way.stop.answer, score=score)
    return Step(variant=way.variant, gates=[Gate(threshold=accept)], text=text)
