"""The products of wrapped layers that read the same x, forward and backward, by the two routes of routes.py.

    y  = x W^T + bias + scale * (x A^T) B^T     x (rows, d_in), y and dy (rows, d_out)
    dx = dy W + scale * (dy B) A                = dy (W + delta)
    dA = scale * (dy B)^T x                     (r, d_in)
    dB = scale * dy^T (x A^T)                   (d_out, r)

One implementation for n >= 1 layers. Saved for the backward pass: x once, and the parameters themselves; never x A^T,
nor W in another dtype, nor W + delta, unless the layer caches it anyway.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from relora.method.base_weights import WeightFormat
from relora.method.choices import Kernels, Route
from relora.method.triton_extra import triton_kernels

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """Sizes that suit the caches of a device.

    Attributes:
        block_rows: W + delta is formed and rounded this many rows at a time.
        line_bytes: fp32 rows of a product begin at multiples of this many bytes.
    """

    block_rows: int
    line_bytes: int


# Formed in blocks, the fp32 sum stays in the cache instead of going to memory and back (2048 x 5461, r = 128, two
# AMD EPYC cores: 18 ms instead of 26). Rows that begin within a cache line are written slowly (4096 x 2048 x 5461, the
# same cores: 704 ms instead of 490).
CPU_LAYOUT = Layout(block_rows=256, line_bytes=64)
GPU_LAYOUT = Layout(block_rows=sys.maxsize, line_bytes=1)  # in one block, rows without gaps

_cpu_layout: ContextVar[Layout] = ContextVar("cpu_layout", default=CPU_LAYOUT)


@contextmanager
def layout(of_cpu: Layout) -> Iterator[None]:
    """Use `of_cpu` for tensors on the CPU, e.g. GPU_LAYOUT to rehearse there, without values, a run on a GPU."""
    token = _cpu_layout.set(of_cpu)
    try:
        yield
    finally:
        _cpu_layout.reset(token)


@dataclass(frozen=True, eq=False)
class Projection:
    """The product of one layer: x -> x W^T + bias + scale * (x A^T) B^T. Its tensors come first.

    Attributes:
        weight: W as it is stored.
        bias: (d_out,), or None.
        A: (r, d_in).
        B: (d_out, r).
        merged: W + delta in the layout of W and the dtype of x, from the layer's cache, for the merged route only;
            None to form it at each use.
        transposed: W is (d_in, d_out) instead of (d_out, d_in).
        kernels: which compute y and dx of the factored route, and W + delta.
    """

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    merged: Tensor | None
    weight_format: WeightFormat
    scale: float
    transposed: bool
    route: Route
    kernels: Kernels

    def scaled_B(self, dtype: torch.dtype) -> Tensor:
        """scale * B, (d_out, r), scaled before it is rounded to `dtype`."""
        return (self.B * self.scale).to(dtype)

    def right(self, dtype: torch.dtype) -> Tensor:
        """The large right factor of x, (d_in, d_out): W + delta on the merged route, W on the factored one."""
        if self.route == "factored":
            W = frozen_weight(self.weight, self.weight_format, dtype)
        else:
            W = self.form(dtype) if self.merged is None else self.merged
        return W if self.transposed else W.T

    def form(self, dtype: torch.dtype) -> Tensor:
        """W + delta in the layout of W: summed in at least fp32, rounded once to `dtype`."""
        wide = torch.promote_types(self.weight.dtype, torch.promote_types(self.A.dtype, torch.float32))
        W = frozen_weight(self.weight, self.weight_format, wide)
        A, B = self.A.to(wide), self.B.to(wide)
        left, right = (A.T, B.T) if self.transposed else (B, A)  # left @ right has the layout of W
        if self.kernels == "triton":
            return cast(Tensor, triton_kernels().form_merged(W, left, right, self.scale, dtype))
        if dtype == wide or W.device.type != "cpu" or torch.compiler.is_compiling():
            return torch.addmm(W, left, right, alpha=self.scale).to(dtype)
        rows, formed = _cpu_layout.get().block_rows, torch.empty(W.shape, dtype=dtype, device=W.device)
        for start in range(0, len(W), rows):
            block = slice(start, start + rows)
            formed[block] = torch.addmm(W[block], left[block], right, alpha=self.scale)
        return formed


def frozen_weight(weight: Tensor, weight_format: WeightFormat, dtype: torch.dtype) -> Tensor:
    """W in its own shape and in `dtype`; the stored tensor itself where nothing has to be done.

    Args:
        weight: as it is stored: of a float dtype, or quantized, (num_bytes,) in uint8.
    """
    return weight.to(dtype) if weight.is_floating_point() else weight_format.dequantize(weight, dtype)


def product(
    left: Tensor, right: Tensor, *, added: Tensor | None = None, into: Tensor | None = None, low: Pair | None = None
) -> Tensor:
    """left (m, k) @ right (k, n) + added, or the product added in place to `into`; (m, n).

    On a CPU each fp32 row of a new result begins at a cache line, if need be with a gap between the rows.

    Args:
        low: (m, r) and (r, n), whose product is added too, all by one Triton kernel; then `into` is read only.
    """
    if low is not None:
        return cast(Tensor, triton_kernels().fused_product(left, right, *low, added if into is None else into))
    if into is not None:
        return into.addmm_(left, right)
    columns, size, place = right.shape[1], left.dtype.itemsize, None
    if left.device.type == "cpu" and size >= 4 and not torch.compiler.is_compiling():
        line = _cpu_layout.get().line_bytes
        if columns * size % line != 0:
            stride = -(-columns * size // line) * line // size  # rounded up to whole lines
            place = left.new_empty_strided((len(left), columns), (stride, 1))
    return torch.mm(left, right, out=place) if added is None else torch.addmm(added, left, right, out=place)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype within autocast, else that of x; float64 stays float64, as in torch's own layers."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Disable autocast; the meta device has none to disable."""
    has_autocast = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if has_autocast else nullcontext()


def project(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Apply each projection to x, in `compute_dtype(x)`.

    Args:
        x: (..., d_in).
        projections: all of one d_in and r.

    Returns:
        For each (..., d_out), on a CPU perhaps with a gap between the rows (`product`).
    """
    rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
    # Autograd must see every tensor as an argument of its own; the rest is static under torch.compile.
    static = tuple((p.weight_format, p.scale, p.transposed, p.route, p.kernels) for p in projections)
    tensors = [tensor for p in projections for tensor in (p.weight, p.bias, p.A, p.B, p.merged)]
    outputs: tuple[Tensor, ...] = _Project.apply(static, rows, *tensors)  # type: ignore[no-untyped-call]
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def project_dropped(x: Tensor, dropped: Tensor, projection: Projection) -> Tensor:
    """The factored route where A reads another input than W: x W^T + bias + scale * (dropped A^T) B^T.

    Args:
        x: (..., d_in).
        dropped: x after dropout.

    Returns:
        (..., d_out).
    """
    dtype, p = compute_dtype(x), projection
    rows, low = (t.reshape(-1, x.shape[-1]).to(dtype) for t in (x, dropped))  # (rows, d_in) both
    with no_autocast(x.device.type):
        low = low @ p.A.to(dtype).T @ p.scaled_B(dtype).T  # (rows, d_out)
        static = p.weight_format, p.transposed
        y: Tensor = _AddFrozen.apply(static, rows, p.weight, low)  # type: ignore[no-untyped-call]
        y = y if p.bias is None else y + p.bias.to(dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


_NUM_TENSORS = 5
_WEIGHT, _BIAS, _A, _B, _MERGED = range(_NUM_TENSORS)  # the order of a projection's tensors


def _unpack(static: Sequence[tuple[Any, ...]], tensors: Sequence[Any]) -> list[Projection]:
    """The projections whose tensors, `_NUM_TENSORS` each, stand one after the other in `tensors`.

    Args:
        static: weight_format, scale, transposed, route and kernels of each projection.
    """
    starts = range(0, len(tensors), _NUM_TENSORS)
    return [Projection(*tensors[i : i + _NUM_TENSORS], *rest) for i, rest in zip(starts, static, strict=True)]


class _Project(torch.autograd.Function):
    """All products with one x: (rows, d_in) -> (rows, d_out) each."""

    @staticmethod
    def forward(
        ctx: Any, static: tuple[tuple[Any, ...], ...], x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.static = static
        ctx.set_materialize_grads(False)  # an output that nothing has read gets None, not zeros
        ctx.save_for_backward(x, *tensors)
        layers, outputs = _unpack(static, tensors), []
        with no_autocast(x.device.type):
            # 1. h = x A^T (rows, r) where the route is factored, all by one product.
            hs = _times_A(x, [p.A if p.route == "factored" else None for p in layers])
            # 2. y (rows, d_out) = x (W + delta)^T + bias, or x W^T + h (scale B)^T + bias. No W gets a name here, so
            #    that it is gone before the next one is made.
            for p, h in zip(layers, hs, strict=True):
                bias = None if p.bias is None else p.bias.to(x.dtype)
                if h is None:
                    y = product(x, p.right(x.dtype), added=bias)
                elif p.kernels == "triton":
                    y = product(x, p.right(x.dtype), added=p.bias, low=(h, p.scaled_B(x.dtype).T))
                elif p.bias is None or x.dtype.itemsize >= 4:
                    y = product(x, p.right(x.dtype), into=product(h, p.scaled_B(x.dtype).T, added=bias))
                else:  # in 16 bits the bias comes last and unrounded
                    y = product(x, p.right(x.dtype), into=product(h, p.scaled_B(x.dtype).T)).add_(p.bias)
                outputs.append(y)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        _, needs_dx, *needs = ctx.needs_input_grad
        dx: Tensor | None = None
        gradients: list[Tensor | None] = [None] * len(tensors)
        # The layers whose output has a gradient dy (rows, d_out), each with the index of its first tensor.
        layers = zip(range(0, len(tensors), _NUM_TENSORS), _unpack(ctx.static, tensors), dys, strict=True)
        used = [(i, p, dy) for i, p, dy in layers if dy is not None]
        with no_autocast(x.device.type):
            # 1. g = scale * dy B (rows, r): for dA, and for dx where the route is factored.
            gs = [
                dy @ p.scaled_B(dy.dtype) if needs[i + _A] or (needs_dx and p.route == "factored") else None
                for i, p, dy in used
            ]
            # 2. dx (rows, d_in): the sum of g A where the route is factored, and of all dy W or dy (W + delta), of
            #    which one W at a time is in memory.
            if needs_dx:
                for (_, p, dy), g in zip(used, gs, strict=True):
                    if g is not None and p.route == "factored" and p.kernels == "torch":
                        dx = product(g, p.A.to(dy.dtype), into=dx)
                for (_, p, dy), g in zip(used, gs, strict=True):
                    low = None if g is None or p.kernels == "torch" or p.route == "merged" else (g, p.A.to(dy.dtype))
                    dx = product(dy, p.right(dy.dtype).T, into=dx, low=low)
            # 3. dA (r, d_in) = g^T x, all by one product.
            wanted = [(i, p, g) for (i, p, _), g in zip(used, gs, strict=True) if g is not None and needs[i + _A]]
            of_A = [g for *_, g in wanted]
            dAs = (torch.cat(of_A, dim=1).T @ x).chunk(len(of_A)) if len(of_A) > 1 else [g.T @ x for g in of_A]
            for (i, p, _), dA in zip(wanted, dAs, strict=True):
                gradients[i + _A] = dA.to(p.A.dtype)
            # 4. dB (d_out, r) = scale * dy^T h, with h = x A^T computed again.
            hs = _times_A(x, [p.A if needs[i + _B] else None for i, p, _ in used])
            for (i, p, dy), h in zip(used, hs, strict=True):
                if h is not None:
                    gradients[i + _B] = (dy.T @ h).to(p.B.dtype).mul_(p.scale)
                # 5. The gradients of a bias, and of a W that trains although it is wrapped.
                if p.bias is not None and needs[i + _BIAS]:
                    gradients[i + _BIAS] = dy.sum(0, dtype=p.bias.dtype)
                if needs[i + _WEIGHT]:
                    gradients[i + _WEIGHT] = x.T @ dy if p.transposed else dy.T @ x
        return None, dx, *gradients


def _times_A(x: Tensor, As: Sequence[Tensor | None]) -> list[Tensor | None]:
    """h = x A^T, (rows, r), for each A, all by one product; None where A is None."""
    wanted = [A.to(x.dtype) for A in As if A is not None]
    hs = [x @ A.T for A in wanted] if len(wanted) < 2 else (x @ torch.cat(wanted).T).chunk(len(wanted), dim=1)
    # Dense copies: on the CPU a 16-bit product with a strided slice costs several times that with a dense matrix.
    found = iter([h.contiguous() for h in hs])
    return [None if A is None else next(found) for A in As]


class _AddFrozen(torch.autograd.Function):
    """low (rows, d_out) + x W^T for a frozen W. Saves W as it is stored, and x only if W trains."""

    @staticmethod
    def forward(ctx: Any, static: tuple[WeightFormat, bool], x: Tensor, weight: Tensor, low: Tensor) -> Tensor:
        ctx.static = static
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[2] else None)
        weight_format, transposed = static
        W = frozen_weight(weight, weight_format, x.dtype)
        return product(x, W if transposed else W.T, added=low)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight, x), (weight_format, transposed) = ctx.saved_tensors, ctx.static
        dx = dW = None
        with no_autocast(dy.device.type):
            if x is not None:
                dW = x.T @ dy if transposed else dy.T @ x
            if ctx.needs_input_grad[1]:
                W = frozen_weight(weight, weight_format, dy.dtype)
                dx = product(dy, W.T if transposed else W)
        return None, dx, dW, dy
