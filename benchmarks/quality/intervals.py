"""95 % intervals of shares and of their differences, sound for few samples.

A score lies in [0, 1]; its variance is largest when it is 0 or 1 only, so Wilson's interval of a
share covers means of fractional scores too. Differences and means over tasks are put together
from such intervals by the distances between estimate and bound (MOVER, Zou and Donner 2008):
unlike a bootstrap, they keep a width where all samples agree.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.959964  # two-sided 95 % of the normal distribution
# Two-sided 95 % of Student's t for 1 to 30 degrees of freedom; beyond, the last is used.
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Interval(NamedTuple):
    """An estimate and its 95 % bounds, in the estimate's unit."""

    value: float
    low: float
    high: float


def mean_share(scores: Sequence[float]) -> Interval:
    """Return the mean of scores in [0, 1] and Wilson's interval of it.

    Raises:
        ValueError: if there are none.
    """
    if not scores:
        raise ValueError("there are no scores")
    count, share = len(scores), sum(scores) / len(scores)
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    spread = math.sqrt(max(share * (1 - share), 0) / count + Z * Z / (4 * count * count))
    half = Z * spread / (1 + Z * Z / count)
    return Interval(share, max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0))


def mean_difference(scores: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the mean of scores less others, pair by pair; both in [0, 1].

    What is gained and what is lost are two shares that exclude each other; their intervals are
    combined with the correlation that follows from that.

    Raises:
        ValueError: if there are no pairs, or one has no partner.
    """
    pairs = list(zip(scores, others, strict=True))
    gain = mean_share([max(new - old, 0.0) for new, old in pairs])
    loss = mean_share([max(old - new, 0.0) for new, old in pairs])
    rest = (1 - gain.value) * (1 - loss.value)
    together = -math.sqrt(gain.value * loss.value / rest) if rest > 0 else -1.0

    def distance(one: float, other: float) -> float:
        return math.sqrt(one * one + other * other - 2 * together * one * other)

    value = gain.value - loss.value
    low = value - distance(gain.value - gain.low, loss.high - loss.value)
    high = value + distance(gain.high - gain.value, loss.value - loss.low)
    return Interval(value, max(low, -1.0), min(high, 1.0))


def mean_of(parts: Sequence[Interval]) -> Interval:
    """Return the plain mean of independent estimates (all tasks weigh the same).

    Raises:
        ValueError: if there are none.
    """
    if not parts:
        raise ValueError("there is nothing to average")
    count = len(parts)
    value = sum(part.value for part in parts) / count
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / count
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / count
    return Interval(value, value - below, value + above)


def mean_student(values: Sequence[float]) -> Interval:
    """Return the mean of any numbers and Student's interval; of one number, without bounds (nan).

    Raises:
        ValueError: if there are none.
    """
    if not values:
        raise ValueError("there are no values")
    count, mean = len(values), sum(values) / len(values)
    if count == 1:
        return Interval(mean, math.nan, math.nan)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = T[min(count - 1, len(T)) - 1] * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half)


def mean_clustered(clusters: Sequence[Sequence[float]]) -> Interval:
    """Return the mean of all numbers, and Student's interval with clusters as the samples.

    Numbers of one cluster may depend on each other: mean m of n numbers in k clusters, standard
    error ``sqrt(k / (k - 1) * sum over clusters of (sum of (value - m))^2) / n``, k - 1 degrees of
    freedom. Of one cluster there are no bounds (nan); empty clusters do not count.

    Raises:
        ValueError: if there are no numbers.
    """
    groups = [cluster for cluster in clusters if cluster]
    if not groups:
        raise ValueError("there are no values")
    count, number = len(groups), sum(map(len, groups))
    mean = sum(map(sum, groups)) / number
    if count == 1:
        return Interval(mean, math.nan, math.nan)
    squares = sum((sum(group) - mean * len(group)) ** 2 for group in groups)
    error = math.sqrt(count / (count - 1) * squares) / number
    half = T[min(count - 1, len(T)) - 1] * error
    return Interval(mean, mean - half, mean + half)
