"""One wrapped layer as the kernels see it: its tensors, and the products that both of its passes are made of.

x is (rows, d_in), and everything is computed in its dtype. In a 16-bit dtype the small term is the one that is rounded
by itself, and x W^T is added to it in the accumulator: added to a rounded x W^T, most of a small update would be
rounded away.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relora.method.base_weights import Grid
from relora.method.routes import Route

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

    grid: Grid
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
        return as_right(self.fixed.grid.decode(self.weight, dtype), self.fixed)

    def merged(self, dtype: torch.dtype) -> Tensor:
        """W + delta as the right factor of x."""
        return as_right(self.form(dtype) if self.kept is None else self.kept, self.fixed)

    def form(self, dtype: torch.dtype) -> Tensor:
        """W + delta in the layout of W: formed in at least fp32, and rounded once."""
        wide = torch.promote_types(self.weight.dtype, torch.promote_types(self.A.dtype, torch.float32))
        W, A, B = self.fixed.grid.decode(self.weight, wide), self.A.to(wide), self.B.to(wide)
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
