import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest

from relora.data.mixture import LONGEST_PERIOD, Mixture, permuted, round_keys, row_of, shares

WEIGHTS = [
    [1.0],
    [0.9, 0.1],
    [1, 1],
    [0.5, 0.3, 0.2],
    [1, 1, 1, 1, 1, 1, 1],
    [10, 1, 1, 1, 1],
    [0.7, 0.1, 0.1, 0.05, 0.05],
    [math.pi, math.e, 1.0, 1e-9],
    [1e-12, 1.0],
    [0.123457, 0.654321, 0.222222],
    [float(k) for k in range(1, 30)],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_source_is_within_one_sample_of_its_share(weights):
    units = shares(weights)
    period = sum(units)
    mixture = Mixture.of(weights)
    counts = [0] * len(weights)
    for i in range(min(2 * period, 140_000)):
        source, count = mixture.locate(i)
        assert count == counts[source]
        counts[source] += 1
        assert all(abs(counts[k] * period - (i + 1) * unit) < period for k, unit in enumerate(units))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_far_away_the_counts_still_agree_with_the_shares(weights):
    mixture, i = Mixture.of(weights), 10**9
    period = sum(mixture.units)
    assert sum(mixture.counts(i)) == i
    assert all(abs(c * period - i * unit) < period for c, unit in zip(mixture.counts(i), mixture.units, strict=True))
    source, count = mixture.locate(i)
    assert count == mixture.counts(i)[source]


def test_shares_are_exact_where_the_denominator_allows():
    assert shares([0.9, 0.1]) == (9, 1)
    assert shares([0.1, 0.2, 0.3]) == (1, 2, 3)
    assert shares([5.0]) == (1,)


def test_shares_are_rounded_to_the_grid_elsewhere():
    weights = [math.pi, math.e, 1.0, 1e-9]
    units = shares(weights)
    assert sum(units) == LONGEST_PERIOD and min(units) == 1
    for unit, weight in zip(units, weights, strict=True):
        assert abs(Fraction(unit, LONGEST_PERIOD) - Fraction(weight) / Fraction(sum(weights))) < Fraction(
            2, LONGEST_PERIOD
        )


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0], [math.inf, 1.0], [math.nan]])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="positive"):
        shares(weights)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1000, 4099])
def test_each_pass_reads_every_row_once_in_an_order_of_its_own(n):
    orders = []
    for passed in range(3):
        rows = [row_of(seed=1, source=0, count=passed * n + i, num_rows=n) for i in range(n)]
        assert sorted(rows) == list(range(n))
        orders.append(rows)
    if n >= 16:
        assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])


def test_seed_and_source_change_the_order():
    orders = {
        (seed, source): tuple(row_of(seed=seed, source=source, count=i, num_rows=50) for i in range(50))
        for seed in (0, 1)
        for source in (0, 1)
    }
    assert len(set(orders.values())) == 4


def test_the_permutation_looks_random():
    n = 10_000
    order = [permuted(i, n, round_keys(3, 0, 0)) for i in range(n)]
    steps = [(b - a) % n for a, b in itertools.pairwise(order)]
    assert len(set(steps)) > 0.6 * n  # of random ones 1 - 1/e are distinct
    mean = sum(i * row for i, row in enumerate(order)) / n
    spread = (n * n - 1) / 12  # variance of either
    assert abs(mean - ((n - 1) / 2) ** 2) / spread < 0.05  # correlation, 5 standard deviations


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_every_order_of_a_few_rows_is_as_likely(n):
    orders, num_keys = Counter(), 12_000
    for seed in range(num_keys):
        keys = round_keys(seed, 0, 0)
        orders[tuple(permuted(i, n, keys) for i in range(n))] += 1
    num_orders = math.factorial(n)
    expected = num_keys / num_orders
    counts = [*orders.values(), *[0] * (num_orders - len(orders))]
    chi_squared = sum((count - expected) ** 2 / expected for count in counts)
    degrees = num_orders - 1
    assert chi_squared < degrees + 5 * math.sqrt(2 * degrees)


def test_order_is_pinned():
    """A resumed run must meet the order that it began with: a change here needs a new format version."""
    mixture = Mixture.of([0.6, 0.3, 0.1])
    assert [mixture.locate(i)[0] for i in range(10)] == [0, 1, 0, 0, 1, 0, 2, 0, 0, 1]
    assert [row_of(seed=0, source=0, count=i, num_rows=10) for i in range(10)] == PINNED
    assert row_of(seed=2**62, source=1, count=10**15, num_rows=10**9 + 7) == PINNED_FAR


PINNED = [5, 0, 6, 2, 8, 1, 9, 4, 7, 3]
PINNED_FAR = 929612681
