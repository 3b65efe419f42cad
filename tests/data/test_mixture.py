import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest

from relora.data import quota_tree
from relora.data.mixture import Mixture, permuted, round_keys, row_of, shares

WEIGHTS = [
    (1.0,),
    (0.9, 0.1),
    (1, 1),
    (0.5, 0.3, 0.2),
    (1, 1, 1, 1, 1, 1, 1),
    (10, 1, 1, 1, 1),
    (0.7, 0.1, 0.1, 0.05, 0.05),
    (0.123457, 0.654321, 0.222222),
    tuple(float(k) for k in range(1, 30)),
]
# Shares that no short period holds: under 2^-16, or without a common denominator.
UNEVEN = [
    (1e-6, 1.0),
    (1e-12, 1.0),
    (math.pi, math.e, 1.0, 1e-9),
    (1.0, 1e-5, 1e-7, 1e-9),
    (0.3, 0.3, 0.399999, 0.000001),
    (1e300, 1e-300, 1.0),
    (123456789, 987654321, 5555, 31415926, 271828),
    (4.1e9, 3.3e9, 1.7e9, 0.9e9, 0.45e9, 0.2e9 + 1),
]


@pytest.mark.parametrize("weights", [*WEIGHTS, *UNEVEN], ids=str)
def test_every_source_is_within_one_sample_of_its_share(weights):
    units = shares(weights)
    period = sum(units)
    mixture = Mixture.of(weights)
    counts = [0] * len(weights)
    for i in range(min(2 * period, 70_000 if weights in WEIGHTS else 5_000)):
        source, count = mixture.locate(i)
        assert count == counts[source]
        counts[source] += 1
        assert all(abs(counts[k] * period - (i + 1) * unit) < period for k, unit in enumerate(units))


@pytest.mark.parametrize("weights", [*WEIGHTS, *UNEVEN], ids=str)
def test_far_away_the_counts_still_agree_with_the_shares(weights):
    mixture = Mixture.of(weights)
    exact = [Fraction(repr(float(weight))) for weight in weights]
    for i in (10**5, 10**6 - 1, 10**6, 10**9, 10**15 + 7):
        counts = mixture.counts(i)
        assert sum(counts) == i
        assert all(abs(c - i * w / sum(exact)) < 1 for c, w in zip(counts, exact, strict=True))
        source, count = mixture.locate(i)
        assert count == counts[source]


def test_a_rare_source_comes_as_often_as_it_should():
    """A share of a millionth, which a period of 2^16 slots can only round up to 2^-16."""
    mixture = Mixture.of((1.0, 1e-6))
    assert mixture.counts(10**9)[1] == 1000  # a millionth of 10^9 is 999.999; 15259 by 2^-16
    assert [mixture.locate(i)[0] for i in range(3)] == [0, 0, 0]


def test_shares_are_exact():
    assert shares([0.9, 0.1]) == (9, 1)
    assert shares([0.1, 0.2, 0.3]) == (1, 2, 3)
    assert shares([5.0]) == (1,)
    assert shares([1.0, 1e-6]) == (10**6, 1)


def test_many_uneven_shares_stay_near_their_quotas():
    """Where no tree keeps a sample's distance, the mixture says how far it may be off, which does not grow."""
    weights = tuple(1.7**k + 1e-7 for k in range(12))
    mixture, exact = Mixture.of(weights), [Fraction(repr(weight)) for weight in weights]
    assert 1 < mixture.bound < 2
    for i in (10**3, 10**6 + 1, 10**12 + 5):
        counts = mixture.counts(i)
        assert sum(counts) == i
        assert all(abs(c - i * w / sum(exact)) <= mixture.bound for c, w in zip(counts, exact, strict=True))


def test_the_tree_found_is_the_better_of_two():
    for units in ((400, 300, 200, 100), (8, 4, 2, 1), (1, 1, 1, 1, 1, 1), (10**9, 3, 10**4, 77, 5)):
        leaves = [quota_tree.Leaf(k, unit) for k, unit in enumerate(units)]
        found = quota_tree.bound(quota_tree.quota_tree(units))
        assert found <= min(quota_tree.bound(quota_tree.huffman(leaves)), Fraction(999, 1000))


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
    mixture = Mixture.of((0.6, 0.3, 0.1))
    assert [mixture.locate(i)[0] for i in range(10)] == [0, 1, 0, 0, 1, 0, 2, 0, 0, 1]
    assert [row_of(seed=0, source=0, count=i, num_rows=10) for i in range(10)] == PINNED
    assert row_of(seed=2**62, source=1, count=10**15, num_rows=10**9 + 7) == PINNED_FAR


PINNED = [5, 0, 6, 2, 8, 1, 9, 4, 7, 3]
PINNED_FAR = 929612681
