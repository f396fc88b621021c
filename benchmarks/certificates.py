"""Does the promise hold? Certificates on simulated traffic whose true risk is known, against the naive rule.

    python -m benchmarks.certificates [--repetitions 200] [--rows 200000] [--tuning 4000] [--calibration 5000]

First the test alone: a path of points with known risks, of which each calibration certifies the last that passes. Then
the whole, as `fettle optimize` does it: a population of rows with the outputs of a staged variant, an int8-like variant
that depends on its batch, and the reference; each repetition draws tuning and calibration rows, searches and certifies,
and the chosen point is judged on the whole population. The naive rule takes the last point whose observed disagreement
is at most the level. No model runs. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fettle import certificates
from fettle.answers import Floats
from fettle.manifest import Head, Task, TaskKind
from optimize.certify import Candidate, Problem, calibration_stages, path, tune
from optimize.grading import Graded, Truth, grade, worst_errors
from optimize.hardware import describe

SIMULATED = 1000
WIDTH = 6
TASK = Task(kind=TaskKind.CLASSIFY, head=Head.SINGLE_LABEL, labels=[f"label{n}" for n in range(WIDTH)], width=WIDTH)
REFERENCE = "reference"
# By variant: the cost of each stage in ms, and the noise of its logits there (the reference's have a scale of 4).
STAGE_MS = {"exits": (2.0, 2.0, 2.0), "int8": (2.5,), REFERENCE: (6.5,)}
NOISE = {"exits": (1.5, 0.7, 0.1), "int8": (0.25,), REFERENCE: (1e-6,)}
BATCHINGS = {"exits": 1, "int8": 2, REFERENCE: 1}


@dataclass(frozen=True, slots=True)
class Population:
    """Rows with the outputs of every variant: [rows, stages, width] for each batching."""

    values: Floats
    traces: dict[str, list[Floats]]

    def candidates(self, tuning: NDArray[np.intp], calibration: NDArray[np.intp]) -> list[Candidate]:
        return [
            Candidate(name, STAGE_MS[name], [trace[tuning] for trace in tried], [trace[calibration] for trace in tried])
            for name, tried in self.traces.items()
        ]


@dataclass(frozen=True, slots=True)
class Tally:
    """Of `repetitions` runs, how often each rule promised a level and how often the truth was above it."""

    repetitions: int
    certified: int
    broken: int
    naive: int
    naive_broken: int
    mean_risk: float
    mean_cost_ms: float | None = None


def population(rows: int, rng: np.random.Generator) -> Population:
    """Logits with a clear first label on most rows; a variant's are the reference's with noise on top."""
    values = rng.normal(0, 4, (rows, WIDTH)).astype(np.float32)
    traces = {}
    for name, noise in NOISE.items():
        shared = np.stack([values + rng.normal(0, level, values.shape) for level in noise], axis=1)
        # What a neighbour in the batch moves.
        moved = [rng.normal(0, 0.05, shared.shape) if BATCHINGS[name] > 1 else 0.0 for _ in range(BATCHINGS[name])]
        traces[name] = [(shared + move).astype(np.float32) for move in moved]
    return Population(values, traces)


def simulate_sequence(
    risks: NDArray[np.float64], rows: int, alpha: float, delta: float, repetitions: int, seed: int
) -> Tally:
    """Calibrations of a path with these true risks, rising; a row that one point gets wrong, all later ones do too."""
    rng = np.random.default_rng(seed)
    tried = np.arange(len(risks))
    tallies = []
    for _ in range(repetitions):
        # Each row has the first point of the path that gets it wrong.
        first = np.searchsorted(risks, rng.random(rows))
        errors = np.cumsum(np.bincount(first, minlength=len(risks) + 1)[: len(risks)])
        exact = certificates.fixed_sequence(errors.tolist(), rows, alpha, delta)
        naive = int((tried[errors / rows <= alpha] + 1).max(initial=0))
        tallies.append([risks[count - 1] if count else np.nan for count in (exact, naive)])
    return _tally(np.array(tallies), alpha)


def simulate_whole(
    everyone: Population, alpha: float, delta: float, sizes: tuple[int, int], repetitions: int, seed: int
) -> Tally:
    """Draw, search, certify, and look at the truth. `sizes`: tuning and calibration rows."""
    rng = np.random.default_rng(seed)
    found, costs = [], []
    for _ in range(repetitions):
        drawn = rng.permutation(len(everyone.values))[: sum(sizes)]
        tuning, calibration = drawn[: sizes[0]], drawn[sizes[0] :]
        problem = Problem(
            TASK,
            REFERENCE,
            everyone.candidates(tuning, calibration),
            everyone.values[tuning],
            everyone.values[calibration],
        )
        tuned = tune(problem, [alpha])
        unseen, truth = calibration_stages(problem, tuned), true_stages(everyone, tuned.stages)
        planned = path(tuned.policies, alpha)
        errors = [int(worst_errors(policy.steps, unseen).sum()) for policy in planned]
        risks = [float(worst_errors(policy.steps, truth).mean()) for policy in planned]
        exact = certificates.fixed_sequence(errors, sizes[1], alpha, delta)
        naive = max((n + 1 for n, count in enumerate(errors) if count / sizes[1] <= alpha), default=0)
        found.append([risks[count - 1] if count else np.nan for count in (exact, naive)])
        costs += [planned[exact - 1].cost_ms] if exact else []
    return _tally(np.array(found), alpha, float(np.mean(costs)) if costs else None)


def true_stages(everyone: Population, stages: dict[str, list[Graded]]) -> dict[str, list[Graded]]:
    """The whole population, scored at the temperatures of a repetition."""
    truth = Truth(everyone.values, TASK)
    return {
        name: grade(name, STAGE_MS[name], everyone.traces[name], truth, [stage.temperature for stage in mine])
        for name, mine in stages.items()
    }


def _tally(risks: NDArray[np.float64], alpha: float, cost_ms: float | None = None) -> Tally:
    """`risks` [repetitions, 2]: of the point that each rule took, NaN where it took none."""
    exact = risks[:, 0][~np.isnan(risks[:, 0])]
    return Tally(
        repetitions=len(risks),
        certified=len(exact),
        broken=int((exact > alpha).sum()),
        naive=int((~np.isnan(risks[:, 1])).sum()),
        naive_broken=int((risks[:, 1] > alpha).sum()),
        mean_risk=float(exact.mean()) if len(exact) else 0.0,
        mean_cost_ms=cost_ms,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200, help="of the whole; the test alone has 1,000")
    parser.add_argument("--rows", type=int, default=200_000, help="of the population")
    parser.add_argument("--tuning", type=int, default=4000)
    parser.add_argument("--calibration", type=int, default=5000)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    everyone = population(options.rows, np.random.default_rng(options.seed))
    sizes = (options.tuning, options.calibration)
    results: dict[str, Tally] = {}
    for alpha in (0.01, 0.05):
        risks = np.linspace(0.3, 1.5, 25) * alpha
        results[f"test alone, {alpha:.0%}"] = simulate_sequence(
            risks, options.calibration, alpha, options.delta, SIMULATED, options.seed
        )
        results[f"search and test, {alpha:.0%}"] = simulate_whole(
            everyone, alpha, options.delta, sizes, options.repetitions, options.seed
        )
    print(f"at most {options.delta:.0%} of the promises may be broken; {options.calibration} calibration rows\n")
    print(f"{'simulation':22} {'runs':>6} {'certified':>10} {'broken':>8} {'naive broken':>13} {'mean risk':>10}")
    for name, tally in results.items():
        print(
            f"{name:22} {tally.repetitions:6} {tally.certified:10} {tally.broken / tally.repetitions:8.1%} "
            f"{tally.naive_broken / tally.repetitions:13.1%} {tally.mean_risk:10.3%}"
        )
    figures = {name: {key: getattr(tally, key) for key in Tally.__slots__} for name, tally in results.items()}
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"hardware": describe().model_dump(), "setting": vars(options), "seconds": seconds} | figures))


if __name__ == "__main__":
    main()
