"""The interval of a paired difference: a bootstrap over seeds and rows."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
CHUNK = 2_000_000  # weights of rows that exist at a time
LEVEL = 0.95

Array = NDArray[np.float64]
WeightedScore = Callable[[Array], Array]
"""From B draws of N rows, as weights (N, B) that sum to 1 over the rows, to the score (B,) of each."""


class Interval(NamedTuple):
    """A difference, and the interval that holds `LEVEL` of its bootstrap draws."""

    difference: float
    low: float
    high: float


def resampled(
    num_rows: int, scores: Sequence[WeightedScore], draws: int = DRAWS, seed: int = 0
) -> Array:
    """Return scores of rows that are drawn with replacement.

    Every score, so every run and every method, gets the same rows in a draw.

    Args:
        num_rows: Number of rows N.
        scores: Those of S runs.
        draws: Number of draws D.
        seed: Of the draws.

    Returns:
        (D, S).
    """
    generator = np.random.default_rng(seed)
    at_once, parts = max(1, CHUNK // num_rows), []
    for start in range(0, draws, at_once):
        size = min(at_once, draws - start)
        drawn = generator.integers(num_rows, size=(size, num_rows))
        flat = (size * drawn + np.arange(size)[:, None]).ravel()
        counts = np.bincount(flat, minlength=num_rows * size).reshape(num_rows, size)
        weights = counts / num_rows
        parts.append(np.stack([score(weights) for score in scores], axis=1))
    return np.concatenate(parts)


def paired_interval(
    scores: Array, reference: Array, drawn: Array, drawn_reference: Array, seed: int = 1
) -> Interval:
    """Return the mean over seeds of a difference of scores, and its interval.

        d_b = 1/S sum_s (m[b, t_bs] - r[b, t_bs]),    t_bs drawn with replacement from the S seeds

    whose draws b have rows of their own; the interval lies between the quantiles of d_b. Seeds and rows are
    drawn independently, since every seed is scored on the same rows; of one seed only the rows are.

    Args:
        scores: (S,) of a method, by seed.
        reference: (S,) of the method that it is compared to, of the same seeds.
        drawn: (D, S) the method's on drawn rows.
        drawn_reference: (D, S) the reference's on the same ones.
        seed: Of the draws of seeds.

    Source: Owen, The pigeonhole bootstrap (2007), for rows and seeds that are crossed.
    """
    differences = drawn - drawn_reference
    draws, seeds = differences.shape
    chosen = np.random.default_rng(seed).integers(seeds, size=(draws, seeds))
    means = np.take_along_axis(differences, chosen, axis=1).mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(np.mean(scores - reference)), float(low), float(high))
