"""The bootstrap over seeds and rows, against loops, scipy, cases by hand, and how often it is right."""

from functools import partial

import numpy as np
import pytest
from scipy import stats

from app.commands.compare import bootstrap
from app.commands.compare.bootstrap import paired_interval, resampled


def interval_of(differences, draws=2000):
    """Return the interval of differences (S, N) between a method and one whose scores are zero."""
    scores = [partial(np.matmul, values) for values in differences]
    drawn = resampled(differences.shape[1], scores, draws)
    zero = np.zeros_like(drawn)
    return paired_interval(differences.mean(axis=1), zero[0], drawn, zero)


def test_loops_give_the_same(monkeypatch):
    """Ratios of means, drawn in several parts: row by row and seed by seed."""
    monkeypatch.setattr(bootstrap, "CHUNK", 50)
    generator = np.random.default_rng(3)
    seeds, rows, draws = 3, 7, 40
    method, other = generator.uniform(1, 2, size=(2, seeds, rows, 2))
    drawn_rows = np.random.default_rng(0).integers(rows, size=(draws, rows))
    drawn_seeds = np.random.default_rng(1).integers(seeds, size=(draws, seeds))

    def ratio(features, seed, chosen):
        return sum(features[seed, row, 0] for row in chosen) / sum(
            features[seed, row, 1] for row in chosen
        )

    by_loop = [
        sum(ratio(method, s, chosen) - ratio(other, s, chosen) for s in several) / seeds
        for chosen, several in zip(drawn_rows, drawn_seeds, strict=True)
    ]

    def ratio_of(values, weights):
        return (values[:, 0] @ weights) / (values[:, 1] @ weights)

    scores = [partial(ratio_of, values) for values in (*method, *other)]
    drawn = resampled(rows, scores, draws)
    whole = np.array([score(np.full(rows, 1 / rows)) for score in scores])
    found = paired_interval(whole[:seeds], whole[seeds:], drawn[:, :seeds], drawn[:, seeds:])
    wanted = np.mean(
        [ratio(method, s, range(rows)) - ratio(other, s, range(rows)) for s in range(3)]
    )
    assert found == pytest.approx((wanted, *np.quantile(by_loop, [0.025, 0.975])), rel=1e-12)


def test_by_hand():
    """Two rows, or two seeds, of 0 and 1: the mean of two drawn ones is 0 in a quarter of the draws."""
    assert interval_of(np.array([[0.0, 1.0]])) == (0.5, 0.0, 1.0)
    assert interval_of(np.array([[0.0, 0.0], [1.0, 1.0]])) == (0.5, 0.0, 1.0)
    assert interval_of(np.full((3, 5), 0.25)) == (0.25, 0.25, 0.25)
    # Of three seeds all are the same one in a ninth of the draws, the least one in 1 of 27.
    assert interval_of(np.array([[1.0], [2.0], [6.0]])) == (3.0, 1.0, 6.0)


def test_with_one_seed_it_is_scipys_paired_bootstrap():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 80))
    found = interval_of((a - b)[None], draws=10_000)
    theirs = stats.bootstrap(
        (a, b),
        lambda x, y, axis: (x - y).mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    spread = theirs.high - theirs.low
    assert found[1:] == pytest.approx((theirs.low, theirs.high), abs=0.03 * spread)


@pytest.mark.parametrize(
    ("seeds", "seed_noise", "row_noise", "least", "most"),
    [
        (1, 0.0, 1.0, 0.90, 0.98),
        (12, 1.0, 0.5, 0.86, 0.97),
        (12, 0.5, 2.0, 0.90, 1.0),
        # With seeds alone two and three are known to give 1/2 and 3/4.
        (2, 1.0, 0.0, 0.42, 0.58),
        (3, 1.0, 0.0, 0.68, 0.82),
    ],
)
def test_coverage(seeds, seed_noise, row_noise, least, most):
    """Of 300 simulated comparisons without a difference, as many intervals hold 0 as the report says."""
    generator, rows, inside = np.random.default_rng(0), 60, 0
    for _ in range(300):
        of_seed = seed_noise * generator.normal(size=(seeds, 1))
        of_row = row_noise * generator.normal(size=(1, rows))
        _, low, high = interval_of(of_seed + of_row, draws=1000)
        inside += low <= 0 <= high
    assert least < inside / 300 < most
