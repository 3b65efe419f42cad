"""How A and B are drawn, at injection (index 0) and at every restart (index 1, 2, ...).

B is always zero and A never is. Zero for both would be a dead point: the gradient of each factor is a
product with the other.
"""

import hashlib
import math
from typing import get_args

import torch
from torch import Tensor

from relora.method.choices import ReinitName


def keyed_generator(seed: int, index: int, purpose: str, name: str) -> torch.Generator:
    """A CPU generator that depends on nothing but its key: the same on every rank, engine and resume."""
    digest = hashlib.sha256(f"{seed}|{index}|{purpose}|{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big"))


def draw_lora_A(
    r: int, d_in: int, *, reinit: ReinitName, seed: int, index: int, name: str, draw_index: int = 0
) -> Tensor:
    """A fresh A of shape (r, d_in), float32, on the CPU.

    `kaiming` is PEFT's and the paper's kaiming_uniform with a = sqrt(5), that is U(-1, 1) / sqrt(d_in).
    `orthogonal` has orthogonal rows of the length that kaiming's rows have on average, sqrt(1/3), so that a
    learning rate tuned for the one serves the other.

    Args:
        name: canonical name of the wrapped layer, part of the key.
        stream: which of several independent draws under the same key.
    """
    require_reinit(reinit)
    generator = keyed_generator(seed, index, f"lora_A/{draw_index}" if draw_index else "lora_A", name)
    A = torch.empty(r, d_in, dtype=torch.float32)
    if reinit == "kaiming":
        return torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    return torch.nn.init.orthogonal_(A, gain=math.sqrt(1 / 3), generator=generator)


def residual_factors(residual: Tensor, r: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) such that scale * B @ A is nearly the best rank-r approximation of `residual`.

    The rows of A are those singular directions, orthogonal and as long as `orthogonal` draws them, so that training
    finds the same A as after any other restart; B has the rest. By randomized subspace iteration (arXiv 0909.4061),
    which torch.svd_lowrank is, from a generator of its own.

    Args:
        residual: (d_out, d_in).
    """
    with torch.random.fork_rng(devices=[residual.device] if residual.is_cuda else []):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        U, S, V = torch.svd_lowrank(residual.float(), q=r, niter=2)
    length = math.sqrt(1 / 3)
    return V.T * length, U * (S / (scale * length))


def require_reinit(reinit: str) -> None:
    """ValueError for a name that is none of ours; asked before a model is touched."""
    if reinit not in get_args(ReinitName):
        raise ValueError(f"reinit must be one of {get_args(ReinitName)}, not {reinit!r}")
