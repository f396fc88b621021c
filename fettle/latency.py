"""What a call costs, read from a measured latency table. Pure functions; the batcher and the planner use them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from fettle.manifest import LatencyTable

# Of the most tokens a second; what the last percents cost is that everyone waits for twice as many rows.
NEARLY_BEST = 0.95


def estimate_ms(table: LatencyTable, batch: int, length: int) -> float:
    """Milliseconds of one call of `batch` rows padded to `length` tokens.

    Exact at the measured cells, bilinear between them, in proportion to the tokens beyond them. Below the smallest
    cell its own time is returned, since the fixed cost of a call does not shrink.
    """
    rows: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for cell in table.cells:
        rows[cell.batch].append((cell.length, cell.median_ms))
    # Large batches of long rows may not have been measured: each batch size is extended on its own first.
    return _interpolate(sorted((size, _interpolate(sorted(points), length)) for size, points in rows.items()), batch)


def best_tokens_per_call(table: LatencyTable, call_ms: float, length: int) -> int:
    """The smallest padded size of a batch (rows x tokens) with at least 95 % of the best tokens a second.

    Of rows of `length` tokens, in the measured batch sizes: tokens of short rows are cheaper, which says nothing about
    the size. Smaller batches wait less and waste less on padding. `call_ms` is what each call costs beside the engine's
    own time; without it a CPU engine would be best served one row at a time.
    """
    sizes = {cell.batch for cell in table.cells}
    rates = {size: size * length / (estimate_ms(table, size, length) + call_ms) for size in sizes}
    best = max(rates.values())
    return length * min(size for size, rate in rates.items() if rate >= NEARLY_BEST * best)


def tokens_within(table: LatencyTable, ms: float) -> int:
    """Padded tokens that one call does in so many milliseconds, at the best measured rate; at least one."""
    rate = max(cell.batch * cell.length / cell.median_ms for cell in table.cells)
    return max(1, int(rate * ms))


def full_call_ms(table: LatencyTable, tokens: int) -> float:
    """A call of so many padded tokens in rows of the longest measured length, or the slowest measured call."""
    longest = max(cell.length for cell in table.cells)
    full = estimate_ms(table, max(1, tokens // longest), longest)
    return max(full, *(cell.p95_ms for cell in table.cells))


def best_rows_per_second(table: LatencyTable, length: int) -> float:
    """Rows a second at `length` tokens, in the measured batch size that suits it best."""
    return max(1000 * batch / estimate_ms(table, batch, length) for batch in {cell.batch for cell in table.cells})


@dataclass(frozen=True, slots=True)
class TextCosts:
    """Predicted ms of a text generator whose replicas decode `rows` texts together.

    `prompts` has what feeding a prompt takes, `steps` one step of decoding by (rows, tokens before it).
    """

    prompts: LatencyTable
    steps: LatencyTable
    rows: int
    length: int

    def prompt_ms(self, tokens: int) -> float:
        return estimate_ms(self.prompts, 1, tokens)

    @property
    def step_ms(self) -> float:
        """One step of full slots; each text has a token of it."""
        return estimate_ms(self.steps, self.rows, self.length)

    @property
    def token_ms(self) -> float:
        """One text's part of it."""
        return self.step_ms / self.rows


def _interpolate(points: list[tuple[int, float]], at: int) -> float:
    """Through sorted `(x, y)`: constant before the first, linear between, proportional to x after the last."""
    first, last = points[0], points[-1]
    if at <= first[0]:
        return first[1]
    if at >= last[0]:
        return last[1] * at / last[0]
    right = next(index for index, (x, _) in enumerate(points) if x >= at)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
