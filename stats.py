"""Intervals for means over seeds, by Student's t.

    mean, low, high = interval([93.1, 94.0, 92.7])                      # 95 % of the mean
    mean, low, high, n = paired_difference({0: 93.1, 1: 94.0}, {0: 92.5, 1: 93.8})

Two methods with the same seeds share batches and heads: their difference, seed by seed, varies less
than either does. `compare` does that for a whole table.
"""

from __future__ import annotations

import math
import re
import statistics

from files import RunError

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


def compare(rows: list, words: str) -> None:
    """Fill in, in place, the paired difference of each table.Row to one configuration of its table.

    `words` are the method's name, settings as in mask_prob=0, or both, and fit one configuration. A
    mean of tasks is compared if both are over all tasks. Raises RunError, listing what there is,
    if they fit none or several in every table.
    """
    tables: dict[tuple, list] = {}
    for row in rows:
        tables.setdefault((row.benchmark, row.split), []).append(row)
    found = []
    for members in tables.values():
        fit = {row.configuration for row in members if fits(row, words)}
        found += sorted(fit)
        if len(fit) != 1:
            continue
        others = {row.task: row for row in members if row.configuration in fit}
        for row in members:
            other = others.get(row.task)
            if not other or other is row or row.of > 1 and not (row.official and other.official):
                continue
            *numbers, row.pairs = paired_difference(row.scores, other.scores)
            row.difference, row.low, row.high = map(rounded, numbers)
            row.against = other.configuration
    if not any(row.against for row in rows):
        names = ", ".join(found or sorted({row.configuration for row in rows}))
        problem = "fits several" if found else "fits none"
        raise RunError(f"--against {words!r} {problem} of these configurations: {names}")


def fits(row, words: str) -> bool:
    """Whether all of these words are in the row's configuration, numbers compared as numbers."""
    own = set(map(plain, row.configuration.split()))
    return {plain(word) for word in words.split()} <= own


def plain(word: str) -> str:
    """A setting as in mask_prob=0.0 in one spelling: mask_prob=0."""
    name, equals, value = word.lstrip("-").partition("=")
    try:
        value = f"{float(value):g}"
    except ValueError:  # no number
        pass
    return f"{name.replace('-', '_')}{equals}{value}"


def natural(words: str) -> list:
    """A key that sorts text by the numbers in it: rank=2 before rank=16."""
    pieces = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", words)  # every second one is a number
    return [float(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def rounded(value: float | None) -> float | None:
    """To two digits, without a zero's minus."""
    return None if value is None else round(value, 2) + 0.0
