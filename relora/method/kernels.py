"""The products of wrapped layers that read the same x, forward and backward, by the two routes of routes.py.

One implementation for n >= 1 layers. For the backward pass it keeps x once and the parameters themselves: never
x A^T, nor W in another dtype, nor W + delta, unless it is handed one that the layer keeps anyway.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from relora.method.base_weights import WeightFormat
from relora.method.choices import Route

# A wide W + delta that is to be rounded stays in a CPU's cache, some rows at a time: the whole one would go to memory
# and back (2048 x 5461, r = 128, two AMD EPYC cores: 18 ms in place of 26).
BLOCK_ROWS = 256

# fp32 rows of a product that begin anywhere in a CPU's cache lines are written slowly (4096 x 2048 x 5461, the same
# cores: 704 ms in place of 490).
LINE_BYTES = 64


@dataclass(frozen=True)
class Fixed:
    """What of a projection is no tensor.

    Attributes:
        grid: how W is stored.
        transposed: W is (d_in, d_out).
    """

    weight_format: WeightFormat
    scale: float
    transposed: bool
    route: Route


@dataclass(frozen=True, eq=False)
class Projection:
    """x -> x W^T + bias + scale * (x A^T) B^T.

    Attributes:
        weight: W as it is stored.
        bias: (d_out,), or None.
        A: (r, d_in).
        B: (d_out, r).
        kept: W + delta in the dtype of x, for the merged route alone; None if it is to be formed.
    """

    fixed: Fixed
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    kept: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.A, self.B, self.kept

    @property
    def is_merged(self) -> bool:
        return self.fixed.route == "merged"

    def merged_output(self, x: Tensor) -> Tensor:
        return product(x, self.merged(x.dtype), added=None if self.bias is None else self.bias.to(x.dtype))

    def factored_output(self, x: Tensor, h: Tensor) -> Tensor:
        """h: x A^T."""
        B, W = self.scaled_B(x.dtype), self.frozen(x.dtype)
        if self.bias is not None and x.dtype.itemsize >= 4:
            return product(h, B.T, added=self.bias.to(x.dtype)).addmm_(x, W)
        y = product(h, B.T).addmm_(x, W)
        return y if self.bias is None else y.add_(self.bias)

    def scaled_B(self, dtype: torch.dtype) -> Tensor:
        return (self.B * self.fixed.scale).to(dtype)

    def frozen(self, dtype: torch.dtype) -> Tensor:
        """W as the right factor of x: (d_in, d_out)."""
        return as_right(self.fixed.weight_format.dequantize(self.weight, dtype), self.fixed)

    def merged(self, dtype: torch.dtype) -> Tensor:
        """W + delta as the right factor of x."""
        return as_right(self.form(dtype) if self.kept is None else self.kept, self.fixed)

    def form(self, dtype: torch.dtype) -> Tensor:
        """W + delta in the layout of W: formed in at least fp32, and rounded once."""
        wide = torch.promote_types(self.weight.dtype, torch.promote_types(self.A.dtype, torch.float32))
        W, A, B = self.fixed.weight_format.dequantize(self.weight, wide), self.A.to(wide), self.B.to(wide)
        left, right = (A.T, B.T) if self.fixed.transposed else (B, A)
        rows = BLOCK_ROWS if dtype != wide and W.device.type == "cpu" else len(W)
        if len(W) <= rows or torch.compiler.is_compiling():
            return torch.addmm(W, left, right, alpha=self.fixed.scale).to(dtype)
        formed = torch.empty(W.shape, dtype=dtype, device=W.device)
        for start in range(0, len(W), rows):
            block = slice(start, start + rows)
            formed[block] = torch.addmm(W[block], left[block], right, alpha=self.fixed.scale)
        return formed


def as_right(W: Tensor, fixed: Fixed) -> Tensor:
    """W as the right factor of x: (d_in, d_out), a view."""
    return W if fixed.transposed else W.T


def product(left: Tensor, right: Tensor, *, added: Tensor | None = None) -> Tensor:
    """left @ right + added; on a CPU each row begins at a cache line, if need be with space between the rows."""
    place = _place_of(left, right)
    return torch.mm(left, right, out=place) if added is None else torch.addmm(added, left, right, out=place)


def _place_of(left: Tensor, right: Tensor) -> Tensor | None:
    """Where left @ right is to be written; None for anywhere."""
    columns, size = right.shape[1], left.dtype.itemsize
    is_slow = left.device.type == "cpu" and size >= 4 and columns * size % LINE_BYTES != 0
    if not is_slow or torch.compiler.is_compiling():
        return None
    in_line = LINE_BYTES // size
    return left.new_empty_strided((len(left), columns), (-(-columns // in_line) * in_line, 1))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype within autocast, else that of x; float64 stays what it is, as in torch's own layers."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    # Not every device has autocast: meta has none.
    has_autocast = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if has_autocast else nullcontext()


_NUM_TENSORS = 5  # of a projection


def project(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """What each projection makes of x, in `compute_dtype(x)`.

    Args:
        x: (..., d_in).
        projections: all of one d_in and r.

    Returns:
        For each (..., d_out), on a CPU perhaps with space between the rows (`product`).
    """
    rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
    fixed, tensors = tuple(p.fixed for p in projections), [t for p in projections for t in p.tensors]
    outputs: tuple[Tensor, ...] = _Project.apply(fixed, rows, *tensors)  # type: ignore[no-untyped-call]
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def project_dropped(x: Tensor, dropped: Tensor, projection: Projection) -> Tensor:
    """The factored route where A reads another input than W: x W^T + bias + scale * (dropped A^T) B^T."""
    dtype, p = compute_dtype(x), projection
    rows, low = (t.reshape(-1, x.shape[-1]).to(dtype) for t in (x, dropped))
    with no_autocast(x.device.type):
        low = low @ p.A.to(dtype).T @ p.scaled_B(dtype).T
        y: Tensor = _AddFrozen.apply(p.fixed, rows, p.weight, low)  # type: ignore[no-untyped-call]
        y = y if p.bias is None else y + p.bias.to(dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Project(torch.autograd.Function):
    """All products with one x: (rows, d_in) -> (rows, d_out) each."""

    @staticmethod
    def forward(ctx: Any, fixed: tuple[Fixed, ...], x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.fixed = fixed
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *tensors)
        members = _members(fixed, tensors)
        with no_autocast(x.device.type):
            hs = iter(_low(x, [m.A for m in members if not m.is_merged]))
            return tuple(m.merged_output(x) if m.is_merged else m.factored_output(x, next(hs)) for m in members)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        _, needs_dx, *needs = ctx.needs_input_grad
        members = zip(_members(ctx.fixed, tensors), dys, _by_member(needs), strict=True)
        used = [_Used(member, dy, *needed) for member, dy, needed in members if dy is not None]
        with no_autocast(x.device.type):
            gs = [m.g() if m.needs_a or (needs_dx and not m.own.is_merged) else None for m in used]
            dx = _sum_of_products(_terms_of_dx(used, gs)) if needs_dx and used else None
            dAs = iter(_gradients_of_A(x, [g for m, g in zip(used, gs, strict=True) if m.needs_a and g is not None]))
            hs = iter(_low(x, [m.own.A for m in used if m.needs_b]))
            found = iter([m.gradients(x, dAs, hs) for m in used])
        none = (None,) * _NUM_TENSORS
        return None, dx, *(gradient for dy in dys for gradient in (none if dy is None else next(found)))


class _AddFrozen(torch.autograd.Function):
    """low + x W^T for a frozen W: keeps W as it is stored, and x not at all."""

    @staticmethod
    def forward(ctx: Any, fixed: Fixed, x: Tensor, weight: Tensor, low: Tensor) -> Tensor:
        ctx.fixed = fixed
        ctx.save_for_backward(weight)
        W = as_right(fixed.weight_format.dequantize(weight, x.dtype), fixed)
        return product(x, W, added=low)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            return None, None, None, dy
        [weight] = ctx.saved_tensors
        with no_autocast(dy.device.type):
            W = as_right(ctx.fixed.weight_format.dequantize(weight, dy.dtype), ctx.fixed)
            return None, product(dy, W.T), None, dy


@dataclass(frozen=True, eq=False)
class _Used:
    """A projection whose output got a gradient dy, and what of its own wants one."""

    own: Projection
    dy: Tensor
    needs_weight: bool
    needs_bias: bool
    needs_a: bool
    needs_b: bool
    needs_kept: bool

    def g(self) -> Tensor:
        """scale * dy B, (rows, r)."""
        return self.dy @ self.own.scaled_B(self.dy.dtype)

    def gradients(self, x: Tensor, dAs: Iterator[Tensor], hs: Iterator[Tensor]) -> tuple[Tensor | None, ...]:
        """Those of the projection's tensors; the next of `dAs` and `hs` is this one's, if it needs one."""
        own, dy = self.own, self.dy
        dW = (x.T @ dy if own.fixed.transposed else dy.T @ x) if self.needs_weight else None
        dbias = dy.sum(0, dtype=cast(Tensor, own.bias).dtype) if self.needs_bias else None
        dA = next(dAs).to(own.A.dtype) if self.needs_a else None
        dB = (dy.T @ next(hs)).to(own.B.dtype).mul_(own.fixed.scale) if self.needs_b else None
        return dW, dbias, dA, dB, None


def _low(x: Tensor, As: Sequence[Tensor]) -> Sequence[Tensor]:
    """x A^T for each A, by one product."""
    if len(As) < 2:
        return [x @ A.to(x.dtype).T for A in As]
    stacked = x @ torch.cat([A.to(x.dtype) for A in As]).T
    # Apart: on the CPU a 16-bit product with a strided slice costs several times that with a dense matrix.
    return [h.contiguous() for h in stacked.chunk(len(As), dim=1)]


def _gradients_of_A(x: Tensor, gs: Sequence[Tensor]) -> Sequence[Tensor]:
    """g^T x for each g, by one product."""
    if len(gs) < 2:
        return [g.T @ x for g in gs]
    return (torch.cat(list(gs), dim=1).T @ x).chunk(len(gs))


def _terms_of_dx(used: Sequence[_Used], gs: Sequence[Tensor | None]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of factors whose products sum to dx, the small ones first; each W is made when it is asked for."""
    for m, g in zip(used, gs, strict=True):
        if not m.own.is_merged:
            yield cast(Tensor, g), m.own.A.to(m.dy.dtype)
    for m in used:
        W = m.own.merged(m.dy.dtype) if m.own.is_merged else m.own.frozen(m.dy.dtype)
        yield m.dy, W.T


def _sum_of_products(terms: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    left, right = next(terms)
    total = product(left, right)
    for left, right in terms:
        total.addmm_(left, right)
    return total


def _members(fixed: Sequence[Fixed], tensors: Sequence[Tensor | None]) -> list[Projection]:
    return [Projection(f, *own) for f, own in zip(fixed, _by_member(tensors), strict=True)]


def _by_member(values: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [tuple(values[i : i + _NUM_TENSORS]) for i in range(0, len(values), _NUM_TENSORS)]
