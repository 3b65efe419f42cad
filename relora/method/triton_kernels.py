"""Two Triton kernels for wrapped layers, used where `LoRAConfig.kernels` is triton. Imported on use only.

    fused_product    left right + low_left low_right + added    y of the factored route, and its dx
    form_merged      W + scale * left right                     W + delta of the merged route

Each sums in fp32, rounds once, and writes its large result once. The graph is split where LoRAFusion splits it (arXiv
2510.00206): the small h = x A^T and g = scale * dy B, (tokens, r), are products of torch. Matrices may have any
strides, so that none is copied to be transposed.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# With TRITON_INTERPRET=1 when this module is imported, the kernels run on a CPU, one block after the other, by NumPy.
# It knows no bfloat16: a product multiplies the bits as integers, a conversion cuts them off. So there all operands are
# in fp32, which holds the same values, and torch rounds the result.
INTERPRETED: bool = triton.knobs.runtime.interpret
# So many blocks of rows are computed beside each other, for whose shared columns the L2 cache is read, not memory.
GROUP = tl.constexpr(8)


def _choices(*sizes: tuple[int, int, int, int]) -> list[triton.Config]:
    """Blocks of (rows, columns, warps, stages); on a GPU each is timed at the first call of a shape.

    None changes STEP, so that whichever is the fastest adds the terms of an entry in the same steps.
    """
    if INTERPRETED:
        return [triton.Config({"ROWS": 16, "COLUMNS": 32})]
    return [
        triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in sizes
    ]


@triton.jit
def _own_block(num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row indices (ROWS,) and column indices (COLUMNS,) of this program, some perhaps beyond the edge.

    int64, because a matrix may have more than 2^31 entries.
    """
    blocks_down, blocks_across = (num_rows + ROWS - 1) // ROWS, (num_columns + COLUMNS - 1) // COLUMNS
    group, place = tl.program_id(0) // (GROUP * blocks_across), tl.program_id(0) % (GROUP * blocks_across)
    height = min(blocks_down - group * GROUP, GROUP)
    rows = (group * GROUP + place % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (place // height).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    return rows, columns


@triton.jit
def _place(matrix, strides, rows, columns):
    """Pointers to the entries of a matrix, (len(rows), len(columns))."""
    return matrix + rows[:, None] * strides[0] + columns[None, :] * strides[1]


@triton.jit
def _add_product(
    total, left, left_strides, right, right_strides, rows, columns, size, STEP: tl.constexpr, PRECISION: tl.constexpr
):
    """total + left[rows, :size] @ right[:size, columns], all (len(rows), len(columns)), STEP terms at a time."""
    inner = tl.arange(0, STEP)
    left, right = _place(left, left_strides, rows, inner), _place(right, right_strides, inner, columns)
    for start in range(0, size, STEP):
        is_inside = inner < size - start
        a = tl.load(left, mask=is_inside[None, :], other=0.0)
        b = tl.load(right, mask=is_inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += STEP * left_strides[1]
        right += STEP * right_strides[0]
    return total


@triton.autotune(
    _choices((128, 256, 8, 3), (256, 128, 8, 3), (128, 128, 4, 4), (128, 64, 4, 4), (64, 128, 4, 4), (64, 64, 4, 4)),
    key=["num_columns", "size", "rank", "rows_log2"],
)
@triton.jit(do_not_specialize=["rows_log2"])
def _fused_product(
    left,
    left_strides,
    right,
    right_strides,
    low_left,
    low_left_strides,
    low_right,
    low_right_strides,
    added,
    added_strides,
    out,
    out_strides,
    num_rows,
    num_columns,
    size,
    rank,
    rows_log2,  # noqa: ARG001  # a key alone: another choice of blocks for twice the tokens
    IS_ADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns = _own_block(num_rows, num_columns, ROWS, COLUMNS)
    is_inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    # Beyond the edge the first rows and columns are read again; what comes of them is not stored.
    i, j = rows % num_rows, columns % num_columns
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    total = _add_product(total, left, left_strides, right, right_strides, i, j, size, STEP, PRECISION)
    total = _add_product(total, low_left, low_left_strides, low_right, low_right_strides, i, j, rank, STEP, PRECISION)
    if IS_ADDED:
        total += tl.load(_place(added, added_strides, i, j)).to(tl.float32)
    tl.store(_place(out, out_strides, rows, columns), total.to(out.dtype.element_ty), mask=is_inside)


@triton.autotune(
    _choices((128, 128, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 4, 3), (32, 64, 4, 3)),
    key=["num_rows", "num_columns", "rank"],
)
@triton.jit
def _form_merged(
    W,
    W_strides,
    left,
    left_strides,
    right,
    right_strides,
    out,
    out_strides,
    num_rows,
    num_columns,
    rank,
    scale,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns = _own_block(num_rows, num_columns, ROWS, COLUMNS)
    is_inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    i, j = rows % num_rows, columns % num_columns
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    total = _add_product(total, left, left_strides, right, right_strides, i, j, rank, STEP, "ieee")
    total = tl.load(_place(W, W_strides, i, j)) + scale * total
    tl.store(_place(out, out_strides, rows, columns), total.to(out.dtype.element_ty), mask=is_inside)


@torch.library.custom_op("relora::fused_product", mutates_args=())
def fused_product(
    left: Tensor, right: Tensor, low_left: Tensor, low_right: Tensor, added: Tensor | None = None
) -> Tensor:
    """left right + low_left low_right + added, (m, n): summed in fp32, rounded once to the dtype of `left`.

    On a GPU fp32 matrices are multiplied in TF32 if torch may do so, else in full.

    Args:
        left: (m, k); `right` is (k, n).
        low_left: (m, r); `low_right` is (r, n). All four are of one dtype.
        added: (n,) or (m, n), of any float dtype.

    Raises:
        ValueError: the dtype is none that the kernels compute in.
    """
    dtype, (m, k), n = _computed(left.dtype), left.shape, right.shape[1]
    assert all(matrix.dtype == dtype for matrix in (right, low_left, low_right))
    if INTERPRETED:
        left, right, low_left, low_right = left.float(), right.float(), low_left.float(), low_right.float()
    out = left.new_empty(m, n)
    addend = out if added is None else added.expand(m, n)  # where nothing is added, any pointer
    with torch.cuda.device_of(left):
        _fused_product[_grid(m, n)](
            *_with_strides(left, right, low_left, low_right, addend, out),
            m,
            n,
            k,
            low_left.shape[1],
            m.bit_length(),
            IS_ADDED=added is not None,
            PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            STEP=_step(left),
        )
    return out.to(dtype)


@torch.library.custom_op("relora::form_merged", mutates_args=())
def form_merged(W: Tensor, left: Tensor, right: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W + scale * left right, (m, n): summed in fp32, whatever precision torch allows, and rounded once to `dtype`.

    Args:
        W: (m, n), float32.
        left: (m, r), float32; `right` is (r, n).

    Raises:
        ValueError: a dtype is none that the kernels compute in.
    """
    (m, n), written = W.shape, torch.float32 if INTERPRETED else _computed(dtype)
    out = torch.empty(m, n, dtype=written, device=W.device)
    assert _computed(W.dtype) == left.dtype == right.dtype == torch.float32
    with torch.cuda.device_of(W):
        _form_merged[_grid(m, n)](*_with_strides(W, left, right, out), m, n, left.shape[1], scale, STEP=_step(W))
    return out.to(dtype)


@fused_product.register_fake
def _(left: Tensor, right: Tensor, *_rest: object) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


@form_merged.register_fake
def _(W: Tensor, _left: Tensor, _right: Tensor, _scale: float, dtype: torch.dtype) -> Tensor:
    return W.new_empty(W.shape, dtype=dtype)


def _computed(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"kernels = triton: computes in float32, bfloat16 or float16, not in {name}")
    return dtype


def _with_strides(*matrices: Tensor) -> list[Any]:
    """The matrices as the kernels take them: each followed by its two strides."""
    return [argument for matrix in matrices for argument in (matrix, matrix.stride())]


def _step(matrix: Tensor) -> int:
    """STEP: 128 bytes of a row of the left matrix; at least the 16 that `tl.dot` asks for."""
    return 16 if INTERPRETED else 128 // matrix.dtype.itemsize


def _grid(num_rows: int, num_columns: int) -> Callable[[dict[str, int]], tuple[int]]:
    """How many programs there are, one a block, for the kernel's choice of ROWS and COLUMNS."""
    return lambda chosen: (-(-num_rows // chosen["ROWS"]) * -(-num_columns // chosen["COLUMNS"]),)
