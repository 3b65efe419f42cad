"""What an update costs in FLOPs, in full rank and in low rank. A multiplication and an addition are two.

T tokens, W (d_out, d_in), rank r. Products alone are counted: what is done number by number takes time too, the
same in both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

Shape = tuple[int, int]  # (d_out, d_in)


def full_rank_flops(num_tokens: int, d_in: int, d_out: int) -> int:
    """Forward and backward of a plain layer that is trained."""
    return 6 * num_tokens * d_in * d_out


def factored_flops(num_tokens: int, d_in: int, d_out: int, r: int) -> int:
    """y = x W^T + (x A^T) B^T, with x A^T computed again in the backward pass."""
    return 4 * num_tokens * d_in * d_out + num_tokens * r * (8 * d_in + 6 * d_out)


def merged_flops(num_tokens: int, d_in: int, d_out: int, r: int) -> int:
    """W + B A formed once in the forward and once in the backward pass; dA and dB by the low-rank way."""
    return 4 * num_tokens * d_in * d_out + 4 * r * d_in * d_out + 4 * num_tokens * r * (d_in + d_out)


@dataclass(frozen=True)
class LayerWork:
    """The products of a model.

    Attributes:
        wrapped: (d_out, d_in) of the layers that the low-rank stage wraps.
        rest: FLOPs per token, forward and backward, of what is not wrapped (output head), as each stage trains it.
        attention: FLOPs per token of the products between tokens.
        can_merge: W is stored exactly and there is no dropout.
        forward: auto, merged or factored.
    """

    wrapped: Sequence[Shape]
    rest_full: float
    rest_low: float
    attention: float
    can_merge: bool
    forward: str


@dataclass(frozen=True)
class UpdateFlops:
    """FLOPs of one update over all processes, by what computes them."""

    wrapped: float
    rest: float
    attention: float

    @property
    def total(self) -> float:
        return self.wrapped + self.rest + self.attention


def full_rank_update(work: LayerWork, *, num_calls: int, num_tokens: int) -> UpdateFlops:
    """An update of `num_calls` micro-batches of `num_tokens`, all weights trained."""
    wrapped = sum(full_rank_flops(num_tokens, d_in, d_out) for d_out, d_in in work.wrapped)
    return _update(num_calls, wrapped, work.rest_full * num_tokens, work.attention * num_tokens)


def low_rank_update(work: LayerWork, *, num_calls: int, num_tokens: int, r: int) -> UpdateFlops:
    """The same, the wrapped layers frozen beside factors of rank r."""
    cost = partial(_low_rank_layer, num_tokens=num_tokens, r=r, can_merge=work.can_merge, forward=work.forward)
    wrapped = sum(cost(d_in=d_in, d_out=d_out) for d_out, d_in in work.wrapped)
    return _update(num_calls, wrapped, work.rest_low * num_tokens, work.attention * num_tokens)


def num_merged(work: LayerWork, *, num_tokens: int, r: int) -> int:
    """How many of the wrapped layers compute with W + delta."""
    return sum(
        _route(num_tokens, d_in, d_out, r, work.can_merge, work.forward) is merged_flops for d_out, d_in in work.wrapped
    )


def break_even_rank(work: LayerWork, *, num_tokens: int) -> int:
    """The largest r at which low-rank updates need no more FLOPs than full-rank ones; 0 if there is none."""
    full = full_rank_update(work, num_calls=1, num_tokens=num_tokens).total

    def is_worth_it(r: int) -> bool:
        return low_rank_update(work, num_calls=1, num_tokens=num_tokens, r=r).total <= full

    return _last(is_worth_it, most=min(min(shape) for shape in work.wrapped))


def _last(holds: Callable[[int], bool], *, most: int) -> int:
    """The largest number in 1..most for which `holds`, which is true up to some number; 0 if for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _low_rank_layer(*, num_tokens: int, d_in: int, d_out: int, r: int, can_merge: bool, forward: str) -> int:
    return _route(num_tokens, d_in, d_out, r, can_merge, forward)(num_tokens, d_in, d_out, r)


def _route(
    num_tokens: int, d_in: int, d_out: int, r: int, can_merge: bool, forward: str
) -> Callable[[int, int, int, int], int]:
    if forward != "auto" or not can_merge:
        return merged_flops if forward == "merged" and can_merge else factored_flops
    return min(factored_flops, merged_flops, key=lambda flops: flops(num_tokens, d_in, d_out, r))


def _update(num_calls: int, wrapped: float, rest: float, attention: float) -> UpdateFlops:
    return UpdateFlops(num_calls * wrapped, num_calls * rest, num_calls * attention)
