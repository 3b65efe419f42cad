"""Which way a wrapped layer computes, by its cost in FLOPs: a multiplication and an addition count as two.

T tokens, W (d_out, d_in), rank r. Two routes give the same y and the same gradients:
- factored: y = x W^T + scale * (x A^T) B^T; x alone is saved, and x A^T computed again in the backward pass.
- merged: W + scale * B A is formed in fp32 and rounded once; one product for y, one for dx.
The factors' gradients take the low-rank way in both: dA = scale * (dy B)^T x and dB = scale * dy^T (x A^T).
"""

import torch

from relora.method.choices import Forward, Route

# What a FLOP in fp32 costs beside one in bf16 or fp16, where W + delta is formed. CPU: measured with AVX512-BF16,
# form and cast at d = 1024 and 2048, r = 128 took 1.8 and 2.5. CUDA: about 16 on the data sheets of A100 and
# H100 (tensor cores against fp32 units); not measured.
FORM_COST = {"cpu": 2.0, "cuda": 16.0}


def full_rank_flops(num_tokens: int, d_in: int, d_out: int) -> int:
    """Forward and backward of the plain layer, its weight trained."""
    return 6 * num_tokens * d_in * d_out


def factored_flops(num_tokens: int, d_in: int, d_out: int, r: int, *, with_gradients: bool = True) -> int:
    """The factored route, forward and backward, or the forward pass alone."""
    if not with_gradients:
        return 2 * num_tokens * (d_in * d_out + r * (d_in + d_out))
    return 4 * num_tokens * d_in * d_out + num_tokens * r * (8 * d_in + 6 * d_out)


def merged_flops(
    num_tokens: int, d_in: int, d_out: int, r: int, *, num_forms: float = 2, with_gradients: bool = True
) -> float:
    """The merged route, forward and backward, or the forward pass alone.

    Args:
        num_forms: how often W + delta is formed: 2 if anew in the backward pass, 1 if kept for it, 1 / n if kept
            for the n micro-batches of an update. A dearer FLOP counts as several.
    """
    formed = 2 * r * d_in * d_out * num_forms
    if not with_gradients:
        return 2 * num_tokens * d_in * d_out + formed
    return 4 * num_tokens * d_in * d_out + formed + 4 * num_tokens * r * (d_in + d_out)


def form_cost(device_type: str, dtype: torch.dtype) -> float:
    """What a FLOP of W + delta, always fp32 or wider, costs beside one of a product in `dtype`."""
    return 1.0 if dtype.itemsize >= 4 else FORM_COST.get(device_type, FORM_COST["cuda"])


def choose_route(
    num_tokens: int,
    d_in: int,
    d_out: int,
    r: int,
    *,
    forward: Forward = "auto",
    can_merge: bool = True,
    num_forms: float = 2,
    with_gradients: bool = True,
) -> Route:
    """What `forward` asks for, or the cheaper route.

    Args:
        can_merge: W is stored exactly (`merge_problem`), and no dropout is active.
        num_forms: as in `merged_flops`, times `form_cost`.
    """
    if forward != "auto" or not can_merge:
        return "merged" if forward == "merged" else "factored"
    merged = merged_flops(num_tokens, d_in, d_out, r, num_forms=num_forms, with_gradients=with_gradients)
    factored = factored_flops(num_tokens, d_in, d_out, r, with_gradients=with_gradients)
    return "merged" if merged < factored else "factored"


def merge_problem(weight_format: str | None, dtype: torch.dtype, dropout: float) -> str | None:
    """Why a layer cannot take the merged route, or None.

    Args:
        grid: name of the storage of W, None as it came.
        dtype: of the stored W.
        dropout: 0 where it is not active.
    """
    if weight_format not in (None, "float32") or not dtype.is_floating_point or dtype.itemsize < 4:
        return f"a weight stored as {weight_format or str(dtype).removeprefix('torch.')} rounds small updates away"
    return f"lora_dropout = {dropout} drops inputs of A alone" if dropout > 0 else None


def flop_limit(num_tokens: int, d_in: int, d_out: int, r: int) -> float:
    """The least share of full rank's FLOPs that a route can do with.

    Factored with x A^T kept for the backward pass; merged with W + delta kept. For a square layer the lesser of
    2/3 + 2 r / d and 2/3 + (4/3) r / d + r / (3 T).
    """
    factored = factored_flops(num_tokens, d_in, d_out, r) - 2 * num_tokens * r * d_in
    merged = merged_flops(num_tokens, d_in, d_out, r, num_forms=1)
    return min(factored, merged) / full_rank_flops(num_tokens, d_in, d_out)


def break_even_rank(num_tokens: int, d_in: int, d_out: int) -> float:
    """The rank from which on no route can be faster than full rank: where `flop_limit` is 1. About d / 4."""
    spared = 2 * num_tokens * d_in * d_out
    factored = spared / (6 * num_tokens * (d_in + d_out))
    return max(factored, spared / (2 * d_in * d_out + 4 * num_tokens * (d_in + d_out)))
