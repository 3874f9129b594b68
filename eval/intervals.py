"""How sure a score is."""

from scipy.stats import binomtest


def wilson(correct: int, rows: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of `correct` out of `rows`, in percent (E. B. Wilson, 1927)."""
    interval = binomtest(correct, rows).proportion_ci(confidence_level=0.95, method="wilson")
    return 100.0 * float(interval.low), 100.0 * float(interval.high)
