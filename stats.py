"""Intervals for means over seeds, by Student's t.

    mean, low, high = interval([93.1, 94.0, 92.7])                      # 95 % of the mean
    mean, low, high, n = paired_difference({0: 93.1, 1: 94.0}, {0: 92.5, 1: 93.8})

Two methods with the same seeds share batches and heads: their difference, seed by seed, varies less
than either does.
"""

from __future__ import annotations

import math
import statistics

SHARE = 0.95  # of an interval


def cosine_area(angle: float, power: int) -> float:
    """The integral of cos(x) ** power from 0 to the angle, in radians, for a power from 0."""
    if power == 0:
        return angle
    area = angle if power % 2 == 0 else math.sin(angle)
    for k in range(2 + power % 2, power + 1, 2):
        area = math.cos(angle) ** (k - 1) * math.sin(angle) / k + (k - 1) / k * area
    return area


def student(share: float, freedom: int) -> float:
    """The t with P(|T| <= t) = share, a number in [0, 1), for T of Student's distribution.

    With T = sqrt(freedom) tan(x) the density of x is proportional to cos(x) ** (freedom - 1), whose
    area has a closed form; halving finds the angle. Raises ValueError for a freedom below 1.
    """
    if freedom < 1 or not 0 <= share < 1:
        raise ValueError(f"no Student's t with a share {share} and {freedom} degrees of freedom")
    low, high = 0.0, math.pi / 2
    whole = cosine_area(high, freedom - 1)
    for _ in range(60):  # below the spacing of floats
        middle = (low + high) / 2
        if cosine_area(middle, freedom - 1) < share * whole:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def interval(values: list[float]) -> tuple[float, float | None, float | None]:
    """(mean, low, high): the 95 % interval of the mean of at least one value, None of one alone."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, None, None
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = student(SHARE, len(values) - 1) * error
    return mean, mean - half, mean + half


def paired_difference(
    a: dict[int, float], b: dict[int, float]
) -> tuple[float | None, float | None, float | None, int]:
    """(mean, low, high, n) of a - b over the n seeds that both {seed: value} have.

    low and high are the mean's 95 % interval, None of one seed; without a common seed all are None.
    """
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    if not differences:
        return None, None, None, 0
    return *interval(differences), len(differences)
