"""The exact tests behind every promise: an operating point disagrees on at most alpha, at confidence 1 - delta.

Pure functions of counts. `optimize.certify` decides with them what is promised; whoever reads a manifest can recompute
what it says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import bdtr, betaincinv

from fettle.errors import UsageError
from fettle.manifest import Certificate


def p_value(errors: int, rows: int, alpha: float) -> float:
    """P(Bin(rows, alpha) <= errors): how likely so few errors are where the true disagreement is alpha or more.

    Valid for independent rows from the traffic that the promise is about (the binomial tail test; Angelopoulos et al.,
    "Learn then Test", 2021, section 2).
    """
    _check(errors, rows, alpha)
    return 1.0 if errors >= rows else float(bdtr(errors, rows, alpha))


def upper_bound(errors: int, rows: int, delta: float) -> float:
    """The disagreement that is exceeded with probability delta at most: BetaInv(1 - delta; errors + 1, rows - errors).

    One-sided bound of Clopper and Pearson (Biometrika 26, 1934); 1 where every row is an error. It is at most alpha
    exactly where `p_value(errors, rows, alpha) <= delta`.
    """
    _check(errors, rows, delta)
    return 1.0 if errors >= rows else float(betaincinv(errors + 1, rows - errors, 1 - delta))


def rows_needed(alpha: float, delta: float) -> int:
    """The fewest rows with which anything can be certified: without one error, (1 - alpha)^rows <= delta."""
    _check(0, 1, alpha)
    _check(0, 1, delta)
    rows = max(1, math.ceil(math.log(delta) / math.log1p(-alpha)))
    # The quotient may be off in its last digit where it is a whole number.
    while rows > 1 and p_value(0, rows - 1, alpha) <= delta:
        rows -= 1
    while p_value(0, rows, alpha) > delta:
        rows += 1
    return rows


def certify(errors: int, rows: int, alpha: float, delta: float) -> Certificate:
    """The outcome of one test, passed or not; see `holds`."""
    return Certificate(
        alpha=alpha,
        delta=delta,
        rows=rows,
        errors=errors,
        p_value=p_value(errors, rows, alpha),
        upper_bound=upper_bound(errors, rows, delta),
    )


def holds(certificate: Certificate) -> bool:
    """Whether the test was passed, so that `alpha` is promised."""
    return certificate.p_value <= certificate.delta


def fixed_sequence(errors: Sequence[int], rows: int, alpha: float, delta: float) -> int:
    """How many of a path's points are certified: those before the first whose test fails.

    The path is fixed before the rows are seen. Each test may then spend the whole delta, since the first true
    hypothesis to be rejected on the way bounds the error of all (Bauer, "Multiple testing in clinical trials",
    Statistics in Medicine 10, 1991; fixed-sequence testing in "Learn then Test"). A point behind a failed one is not
    certified, however few errors it has.
    """
    passed = 0
    for count in errors:
        if p_value(count, rows, alpha) > delta:
            break
        passed += 1
    return passed


def hoeffding_bentkus(mean_loss: float, rows: int, alpha: float) -> float:
    """A p-value for "the mean of a loss in [0, 1] is alpha or more", from the mean over `rows` rows.

    min(exp(-n h1(min(R, alpha), alpha)), e P(Bin(n, alpha) <= ceil(n R))), h1 the relative entropy of two coins
    (Bates et al., "Distribution-free, risk-controlling prediction sets", 2021, section 3.1). For 0/1 losses `p_value`
    is exact and smaller.
    """
    if not 0 <= mean_loss <= 1:
        raise UsageError(f"a mean loss of {mean_loss} is outside [0, 1]; scale the loss before it is certified")
    _check(0, rows, alpha)
    hoeffding = math.exp(-rows * _relative_entropy(min(mean_loss, alpha), alpha))
    # A mean that was computed in floating point must not be rounded up to the next error.
    bentkus = math.e * float(bdtr(min(rows, math.ceil(rows * mean_loss - 1e-9)), rows, alpha))
    return min(1.0, hoeffding, bentkus)


def _relative_entropy(a: float, b: float) -> float:
    """a ln(a/b) + (1-a) ln((1-a)/(1-b)), for 0 < b < 1."""
    first = a * math.log(a / b) if a > 0 else 0.0
    second = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
    return first + second


def _check(errors: int, rows: int, share: float) -> None:
    if rows < 1 or not 0 <= errors <= rows:
        raise UsageError(f"{errors} errors in {rows} rows: there must be a row, and no more errors than rows")
    if not 0 < share < 1:
        raise UsageError(f"{share} is no share between 0 and 1; give a level such as 0.01 and a delta such as 0.05")
