# SPDX-License-Identifier: Apache-2.0
"""How sure a measurement is: intervals of scores, spread of timings."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


# How many units there are, and the statistic of some of them, given by number (with repetitions).
Statistic = tuple[int, Callable[[np.ndarray], float]]


def interval(parts: Sequence[Statistic], resamples: int = 1000, seed: int = 0) -> list[float]:
    """Return [low, high], the 95 % percentile bootstrap interval of the mean of some statistics (of one, or one a set).

    The units of each (pairs of a set, queries) are drawn again with replacement, each set on its own. It says how far another
    sample of units could move the score, not how far another seed of training could. Encoders that are scored on the same
    units move together, so a difference between two of them is surer than their intervals look.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile interval).

    Args:
        parts: The statistics, each with the number of its units.
        resamples: How often the units are drawn.
        seed: Of the draws.
    """
    draws = np.random.default_rng(seed)
    means = [np.mean([statistic(draws.integers(size, size=size)) for size, statistic in parts]) for _ in range(resamples)]
    return np.percentile(means, [2.5, 97.5]).tolist()


def timings(
    encoders: Mapping[str, Callable[[list[str]], Any]], texts: list[str], rounds: int = 3
) -> dict[str, dict[str, float]]:
    """Return texts per second of each encoder, and how many times the first one's speed that is, measured side by side.

    The encoders take turns, so that what else the machine does slows all of them; a first round each is not counted.

    Args:
        encoders: Name -> texts -> vectors.
        texts: What is encoded at once.
        rounds: Turns each.

    Returns:
        Name -> texts_per_s and times_faster (medians), and from and to, the least and greatest ratio of one round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for encode in encoders.values():
        encode(texts)
    for _ in range(rounds):
        for name, encode in encoders.items():
            started = time.perf_counter()
            encode(texts)
            seconds[name].append(time.perf_counter() - started)
    base = next(iter(seconds.values()))
    found = {}
    for name, own in seconds.items():
        ratios = [first / second for first, second in zip(base, own, strict=True)]
        found[name] = {"texts_per_s": len(texts) / statistics.median(own), "times_faster": statistics.median(ratios)}
        found[name] |= {"from": min(ratios), "to": max(ratios)}
    return found
