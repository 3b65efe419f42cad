"""The order of the samples: pure functions of the seed and the position, in plain integers.

Which source sample i comes from: R. Tijdeman, "The chairman assignment problem" (1980). Which row of it: a keyed
permutation, by a Feistel network on Z_a x Z_b (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), or by
Fisher and Yates's shuffle where the rows are few.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

LONGEST_PERIOD = 2**16
ROUNDS = 6
# So few rows are shuffled: six rounds would prefer some of their orders (of 5 rows, some come three times as often as
# others).
MOST_SHUFFLED = 9
MASK = 2**64 - 1


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights -> integer shares of a period, their sum, at most LONGEST_PERIOD.

    Exact if the common denominator allows, reading 0.1 as one tenth; else rounded by largest remainder, at least 1
    each. Raises ValueError if there are no weights, too many, or one that is not positive.
    """
    if not 0 < len(weights) <= LONGEST_PERIOD or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights {list(weights)[:8]} must be 1 to {LONGEST_PERIOD} positive numbers")
    exact = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(exact)
    parts = [weight / total for weight in exact]
    period = math.lcm(*(part.denominator for part in parts))
    units = [int(part * period) for part in parts] if period <= LONGEST_PERIOD else rounded(parts)
    common = math.gcd(*units)
    return tuple(unit // common for unit in units)


def rounded(parts: Sequence[Fraction]) -> list[int]:
    """Parts of 1 -> integers >= 1 with sum LONGEST_PERIOD: one each, the rest by largest remainder."""
    spare = LONGEST_PERIOD - len(parts)
    above = [max(part * LONGEST_PERIOD - 1, Fraction(0)) for part in parts]
    scale = spare / sum(above) if sum(above) else Fraction(0)
    units = [1 + int(part * scale) for part in above]
    by_remainder = sorted(range(len(parts)), key=lambda k: (int(above[k] * scale) - above[k] * scale, k))
    for k in by_remainder[: LONGEST_PERIOD - sum(units)]:
        units[k] += 1
    return units


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


@dataclass(frozen=True)
class Mixture:
    """The source of each sample, periodic in the sample number.

    Attributes:
        units: [sources], samples of each source in one period.
        owners: [period], the source of each slot.
        before: [period], the number of earlier slots of the same source.
    """

    units: tuple[int, ...]
    owners: np.ndarray
    before: np.ndarray

    @classmethod
    def of(cls, weights: Sequence[float]) -> "Mixture":
        units = shares(weights)
        owners = np.asarray(chairman_assignment(units), dtype=np.int64)
        before = np.empty_like(owners)
        for k, unit in enumerate(units):
            before[owners == k] = np.arange(unit)
        return cls(units, owners, before)

    def locate(self, i: int) -> tuple[int, int]:
        """Sample i -> (its source, the number of samples before i from that source)."""
        period, slot = divmod(i, len(self.owners))
        source = int(self.owners[slot])
        return source, period * self.units[source] + int(self.before[slot])

    def counts(self, i: int) -> list[int]:
        """The number of the first i samples that come from each source."""
        period, slot = divmod(i, len(self.owners))
        rest = np.bincount(self.owners[:slot], minlength=len(self.units))
        return [period * unit + int(more) for unit, more in zip(self.units, rest, strict=True)]


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
