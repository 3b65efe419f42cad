"""What an update costs in FLOPs, in full rank and in low rank. A multiplication and an addition are two.

Products alone are counted: what is done number by number takes time too, the same in both. The layers' own formulas
are those by which they choose their route (`relora/method/routes.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relora.method.routes import Forward, Route, choose_route, factored_flops, full_rank_flops, merged_flops

Shape = tuple[int, int]  # (d_out, d_in)


@dataclass(frozen=True)
class LayerWork:
    """The products of a model.

    Attributes:
        wrapped: (d_out, d_in) of the layers that the low-rank stage wraps.
        rest: FLOPs per token, forward and backward, of what is not wrapped (output head), as each stage trains it.
        attention: FLOPs per token of the products between tokens.
        can_merge: W is stored exactly and there is no dropout.
        forward: which route is asked for.
        num_forms: as in `merged_flops`.
        form_cost: what a FLOP of W + delta costs beside one of a product, where routes are compared.
    """

    wrapped: Sequence[Shape]
    rest_full: float
    rest_low: float
    attention: float
    can_merge: bool
    forward: Forward
    num_forms: float = 2.0
    form_cost: float = 1.0


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
    wrapped = sum(_low_rank_layer(work, num_tokens, d_in, d_out, r) for d_out, d_in in work.wrapped)
    return _update(num_calls, wrapped, work.rest_low * num_tokens, work.attention * num_tokens)


def num_merged(work: LayerWork, *, num_tokens: int, r: int) -> int:
    """How many of the wrapped layers compute with W + delta."""
    return sum(_route(work, num_tokens, d_in, d_out, r) == "merged" for d_out, d_in in work.wrapped)


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


def _low_rank_layer(work: LayerWork, num_tokens: int, d_in: int, d_out: int, r: int) -> float:
    if _route(work, num_tokens, d_in, d_out, r) == "merged":
        return merged_flops(num_tokens, d_in, d_out, r, num_forms=work.num_forms)
    return factored_flops(num_tokens, d_in, d_out, r)


def _route(work: LayerWork, num_tokens: int, d_in: int, d_out: int, r: int) -> Route:
    return choose_route(
        num_tokens,
        d_in,
        d_out,
        r,
        forward=work.forward,
        can_merge=work.can_merge,
        num_forms=work.num_forms * work.form_cost,
    )


def _update(num_calls: int, wrapped: float, rest: float, attention: float) -> UpdateFlops:
    return UpdateFlops(num_calls * wrapped, num_calls * rest, num_calls * attention)
