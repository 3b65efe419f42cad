"""The order of the samples: pure functions of the seed and the position, in plain integers.

Which source sample i comes from: R. Tijdeman, "The chairman assignment problem" (1980), or `quota_tree` where shares
have no short period. Which row of it: a keyed permutation, by a Feistel network on Z_a x Z_b (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002), or by Fisher and Yates's shuffle where the rows are few.
"""

import hashlib
import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from relora.data import quota_tree
from relora.data.quota_tree import Tree

# A longer period takes seconds to assign, so it is the last choice.
LONGEST_PERIOD = 2**16
LONGEST_PERIOD_AT_ALL = 2**20
ROUNDS = 6
# So few rows are shuffled: six rounds would prefer some of their orders (of 5 rows, some come three times as often as
# others).
MOST_SHUFFLED = 9
MASK = 2**64 - 1


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights -> integer shares of their sum, the period, reading 0.1 as one tenth.

    Raises ValueError if there are no weights, too many, or one that is not positive.
    """
    if not 0 < len(weights) <= LONGEST_PERIOD or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights {list(weights)[:8]} must be 1 to {LONGEST_PERIOD} positive numbers")
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    units = [int(weight * scale) for weight in exact]
    common = math.gcd(*units)
    return tuple(unit // common for unit in units)


def chairman_assignment(units: Sequence[int]) -> list[int]:
    """The source of each slot of one period, such that |count_k(i) - i * w_k| < 1 for all i and k.

    Tijdeman's bound is 1 - 1/(2m - 2) for m sources. It gives the x-th sample of a source a first and a last slot;
    serving the earliest last slot first meets them all.
    """
    if len(units) == 1:
        return [0] * units[0]
    period, slack = sum(units), 2 * len(units) - 2
    # (first slot, last slot, source, x) of each source's next sample; slots count from 1.
    waiting = [(*slots(x=0, unit=unit, period=period, slack=slack), k, 0) for k, unit in enumerate(units)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    owners = []
    for slot in range(1, period + 1):
        while waiting and waiting[0][0] <= slot:
            _, last, k, x = heapq.heappop(waiting)
            heapq.heappush(ready, (last, k, x))
        last, k, x = heapq.heappop(ready)
        assert last >= slot, "the bound of the assignment is broken"
        owners.append(k)
        heapq.heappush(waiting, (*slots(x=x + 1, unit=units[k], period=period, slack=slack), k, x + 1))
    return owners


def slots(*, x: int, unit: int, period: int, slack: int) -> tuple[int, int]:
    """First and last slot for the sample after x ones: i*w - x >= 1/slack, and i*w - x <= 1 - 1/slack until it."""
    first = -(-period * (slack * x + 1) // (slack * unit))
    last = period * (slack * x + slack - 1) // (slack * unit) + 1
    return first, last


class Mixture(ABC):
    """The source of each sample: for every source k of share w_k and every i, |count_k(i) - i * w_k| < `bound`.

    Attributes:
        units: [sources], the shares as integers.
        bound: in samples; 1 but for five or more sources whose shares have neither a short period nor a good tree.
    """

    units: tuple[int, ...]
    bound: float

    @staticmethod
    @lru_cache(maxsize=8)
    def of(weights: tuple[float, ...]) -> "Mixture":
        """The mixture of these weights, hashable for the cache. Raises ValueError as `shares`."""
        units = shares(weights)
        if sum(units) <= LONGEST_PERIOD:
            return PeriodicMixture(units)
        tree = quota_tree.quota_tree(units)
        if quota_tree.bound(tree) >= 1 and sum(units) <= LONGEST_PERIOD_AT_ALL:
            return PeriodicMixture(units)
        return NestedMixture(units, tree)

    @abstractmethod
    def locate(self, i: int) -> tuple[int, int]:
        """Sample i -> (its source, the number of samples before i from that source)."""

    @abstractmethod
    def counts(self, i: int) -> list[int]:
        """The number of the first i samples that come from each source."""


class PeriodicMixture(Mixture):
    """A mixture with a short period, all of whose slots are assigned at once.

    owners: [period], the source of each slot; before: [period], the number of earlier slots of the same source.
    """

    bound = 1.0

    def __init__(self, units: tuple[int, ...]) -> None:
        self.units = units
        self.owners = np.asarray(chairman_assignment(units), dtype=np.int32)
        self.before = np.empty_like(self.owners)
        for k, unit in enumerate(units):
            self.before[self.owners == k] = np.arange(unit)

    def locate(self, i: int) -> tuple[int, int]:
        period, slot = divmod(i, len(self.owners))
        source = int(self.owners[slot])
        return source, period * self.units[source] + int(self.before[slot])

    def counts(self, i: int) -> list[int]:
        period, slot = divmod(i, len(self.owners))
        rest = np.bincount(self.owners[:slot], minlength=len(self.units))
        return [period * unit + int(more) for unit, more in zip(self.units, rest, strict=True)]


class NestedMixture(Mixture):
    """A mixture of any shares, by a tree of two-way quotas."""

    def __init__(self, units: tuple[int, ...], tree: Tree) -> None:
        self.units = units
        self.tree = tree
        self.bound = max(1.0, float(quota_tree.bound(tree)))

    def locate(self, i: int) -> tuple[int, int]:
        return quota_tree.locate(self.tree, i)

    def counts(self, i: int) -> list[int]:
        found = quota_tree.counts(self.tree, i)
        return [found[k] for k in range(len(self.units))]


def mix(x: int) -> int:
    """splitmix64's finalizer: 64 bits -> 64 bits, every bit of one dependent on every bit of the other."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@lru_cache(maxsize=1024)
def round_keys(seed: int, source: int, passed: int) -> tuple[int, ...]:
    """The keys of the Feistel rounds for one pass over one source."""
    digest = hashlib.sha256(f"order/{seed}/{source}/{passed}".encode()).digest()
    start = int.from_bytes(digest[:8], "big")
    step = int.from_bytes(digest[8:16], "big") | 1
    return tuple(mix((start + number * step) & MASK) for number in range(ROUNDS))


def permuted(index: int, n: int, keys: tuple[int, ...]) -> int:
    """The image of `index` under a keyed permutation of [0, n), on a domain a*b < n + sqrt(n) + 1."""
    if n <= MOST_SHUFFLED:
        rows = list(range(n))
        for last in range(n - 1, 0, -1):
            other = mix(keys[0] ^ mix(keys[1] ^ last)) % (last + 1)
            rows[last], rows[other] = rows[other], rows[last]
        return rows[index]
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    while True:
        left, right = divmod(index, b)
        for number in range(0, ROUNDS, 2):
            left = (left + mix(keys[number] ^ right)) % a
            right = (right + mix(keys[number + 1] ^ left)) % b
        index = left * b + right
        if index < n:  # else follow the cycle, which returns to [0, n)
            return index


def row_of(*, seed: int, source: int, count: int, num_rows: int) -> int:
    """The row of a source's sample number `count`: every row once per pass, in an order of its own."""
    passed, index = divmod(count, num_rows)
    return permuted(index, num_rows, round_keys(seed, source, passed))
