"""The cheaper way for a wrapped layer to compute, in FLOPs: a multiplication and an addition count as two.

T tokens, W (d_out, d_in), rank r. Two routes give the same y and the same gradients:
- factored: y = x W^T + scale * (x A^T) B^T; x alone is saved, and x A^T computed again in the backward pass.
- merged: W + scale * B A is formed in fp32 and rounded once; one product for y, one for dx.
Both compute the factors' gradients through the low rank: dA = scale * (dy B)^T x and dB = scale * dy^T (x A^T).
All functions are pure: a layer caches the answer for its shape.
"""

import torch

from relora.method.choices import Forward, Route

# Cost of a FLOP in fp32, relative to one in bf16 or fp16, where W + delta is formed. CPU: measured with AVX512-BF16,
# to form and cast at d = 1024 and 2048, r = 128 took 1.8 and 2.5. CUDA: about 16 on the data sheets of A100 and
# H100 (tensor cores against fp32 units); not measured.
FORM_COST = {"cpu": 2.0, "cuda": 16.0}


def full_rank_flops(num_tokens: int, d_in: int, d_out: int) -> int:
    """Forward and backward pass of the plain layer whose weight trains: y = x W^T, dx = dy W, dW = dy^T x."""
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
        num_forms: how often W + delta is formed: 2 if again in the backward pass, 1 if cached for it, 1 / n if cached
            for the n micro-batches of an update. A FLOP that costs more counts as several.
    """
    formed = 2 * r * d_in * d_out * num_forms
    if not with_gradients:
        return 2 * num_tokens * d_in * d_out + formed
    return 4 * num_tokens * d_in * d_out + formed + 4 * num_tokens * r * (d_in + d_out)


def form_cost(device_type: str, dtype: torch.dtype) -> float:
    """Cost of a FLOP of forming W + delta, in fp32 or wider, relative to one of a product in `dtype`."""
    return 1.0 if dtype.itemsize >= 4 else FORM_COST.get(device_type, FORM_COST["cuda"])


def layer_route(
    num_tokens: int,
    d_in: int,
    d_out: int,
    r: int,
    *,
    forward: Forward,
    weight_format: str | None,
    weight_dtype: torch.dtype,
    dropout: float,
    device_type: str,
    dtype: torch.dtype,
    num_forms: float,
    with_gradients: bool,
) -> Route:
    """The route of one call of a layer, from everything that it depends on.

    Args:
        weight_format, weight_dtype, dropout: as in `merge_problem`.
        device_type, dtype: where, and in which dtype, the products are computed.
        num_forms: as in `merged_flops`, every FLOP counted as one.

    Raises:
        ValueError: the merged route is asked for, and impossible.
    """
    problem = merge_problem(weight_format, weight_dtype, dropout)
    if problem is not None and forward == "merged":
        raise ValueError(f"forward = merged: {problem}")
    return choose_route(
        num_tokens,
        d_in,
        d_out,
        r,
        forward=forward,
        can_merge=problem is None,
        num_forms=num_forms * form_cost(device_type, dtype),
        with_gradients=with_gradients,
    )


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
    """The route that `forward` asks for, or the cheaper one.

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
        weight_format: name of the format of W, None for its original dtype.
        dtype: of the stored W.
        dropout: 0 where it is not active.
    """
    if weight_format not in (None, "float32") or not dtype.is_floating_point or dtype.itemsize < 4:
        return f"a weight stored as {weight_format or str(dtype).removeprefix('torch.')} rounds small updates away"
    return f"lora_dropout = {dropout} drops inputs of A alone" if dropout > 0 else None


def flop_limit(num_tokens: int, d_in: int, d_out: int, r: int) -> float:
    """The least FLOPs that either route can reach, as a fraction of full rank's.

    Factored with x A^T saved for the backward pass; merged with W + delta cached. For a square layer the lesser of
    2/3 + 2 r / d and 2/3 + (4/3) r / d + r / (3 T).
    """
    factored = factored_flops(num_tokens, d_in, d_out, r) - 2 * num_tokens * r * d_in
    merged = merged_flops(num_tokens, d_in, d_out, r, num_forms=1)
    return min(factored, merged) / full_rank_flops(num_tokens, d_in, d_out)


def break_even_rank(num_tokens: int, d_in: int, d_out: int) -> float:
    """The rank at which `flop_limit` is 1: from there on full rank is at least as fast as either route. About d / 4."""
    saved = 2 * num_tokens * d_in * d_out
    factored = saved / (6 * num_tokens * (d_in + d_out))
    return max(factored, saved / (2 * d_in * d_out + 4 * num_tokens * (d_in + d_out)))
