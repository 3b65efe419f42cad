"""How A and B begin, at injection (index 0) and at every restart (index 1, 2, ...).

A policy returns the factors of one layer. Most draw A and leave B at zero. With B != 0 the restart takes
scale * B @ A out of W: the function of the model stays the same, and the next merge is the ordinary one. A and B are
never both zero: the gradient of each is a product with the other, so neither would ever change.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Length of a row of a kaiming A on average, whatever d_in. Other policies make rows as long, so that a learning rate
# tuned for one serves the others.
ROW_LENGTH = math.sqrt(1 / 3)

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DrawKey:
    """The key of a random draw. A draw depends on nothing else: it is the same on every process, engine and resume.

    Attributes:
        seed: of the run.
        index: number of the restart; 0 is the beginning.
        name: canonical name of the layer or factor.
        draw_index: which of several independent draws; processes that train separately take their process index.
    """

    seed: int
    index: int
    name: str
    draw_index: int = 0

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator for one purpose; each purpose has a sequence of its own."""
        purpose = f"{purpose}/{self.draw_index}" if self.draw_index else purpose
        digest = hashlib.sha256(f"{self.seed}|{self.index}|{purpose}|{self.name}".encode()).digest()
        return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big"))


@dataclass(frozen=True)
class LayerView:
    """The facts that a policy may use about the layer whose factors it makes.

    Attributes:
        name: canonical name of the layer.
        r, in_features, out_features: the shapes of A (r, in_features) and B (out_features, r).
        scale: the update is scale * B @ A.
        read_weight: gives a copy of the exact W with all updates merged, (out_features, in_features), in at least
            float32. Where W is sharded all processes must call it.
    """

    name: str
    r: int
    in_features: int
    out_features: int
    scale: float
    read_weight: Callable[[], Tensor]


class Reinit(ABC):
    """A policy: what the new factors of a layer are.

    Attributes:
        carries_residual: True: `factors` is handed the rounding error of a quantized W, which is then left as it is.
            False: a quantized W is rounded again once scale * B @ A is out of the exact one.
    """

    carries_residual: bool = False

    @abstractmethod
    def factors(self, layer: LayerView, key: DrawKey, residual: Tensor | None) -> Factors:
        """A (r, in_features) and B (out_features, r), not both zero, the same on every process.

        Args:
            key: of all random draws.
            residual: exact W less its quantized form, (out_features, in_features), float32; None if W is not
                quantized, or the policy does not carry the residual.
        """


class Kaiming(Reinit):
    """PEFT's and the paper's A: kaiming_uniform with a = sqrt(5), which is U(-1, 1) / sqrt(d_in). B = 0."""

    def factors(self, layer: LayerView, key: DrawKey, residual: Tensor | None) -> Factors:  # noqa: ARG002
        A = torch.empty(layer.r, layer.in_features)
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=key.generator("lora_A"))
        return A, torch.zeros(layer.out_features, layer.r)


class Orthogonal(Reinit):
    """Orthogonal rows of A, as long as kaiming's are on average. B = 0."""

    def factors(self, layer: LayerView, key: DrawKey, residual: Tensor | None) -> Factors:  # noqa: ARG002
        A = torch.empty(layer.r, layer.in_features)
        torch.nn.init.orthogonal_(A, gain=ROW_LENGTH, generator=key.generator("lora_A"))
        return A, torch.zeros(layer.out_features, layer.r)


class Offset(Reinit):
    """Orthogonal rows of A and columns of B, all of one length: the singular values of scale * B @ A are all `norm`.

    Both factors learn from the first update on. With B = 0 the gradient of A is zero at first, and an optimizer that
    needs the inverse of B^T B has none. SwitchLoRA (arXiv 2406.06564) swaps single vectors so, at any time.

    Args:
        norm: |scale * B @ A|_2, in the units of W.
    """

    def __init__(self, norm: float = 0.1) -> None:
        if not 0 < norm < math.inf:
            raise ValueError(f"norm must be > 0 and finite, not {norm}")
        self.norm = norm

    def factors(self, layer: LayerView, key: DrawKey, residual: Tensor | None) -> Factors:  # noqa: ARG002
        A, B = torch.empty(layer.r, layer.in_features), torch.empty(layer.out_features, layer.r)
        length = math.sqrt(self.norm / layer.scale)
        torch.nn.init.orthogonal_(A, gain=length, generator=key.generator("lora_A"))
        torch.nn.init.orthogonal_(B, gain=length, generator=key.generator("lora_B"))
        return A, B


class Residual(Reinit):
    """Factors whose product is nearly the best rank-r approximation of what quantization rounded away.

    The rows of A are the first right singular vectors of the residual, as long as `Orthogonal` makes them, so that
    training finds the same kind of A as after any other restart; B has the rest.

    Args:
        inner: the policy for layers that are not quantized.
    """

    carries_residual = True

    def __init__(self, inner: Reinit) -> None:
        self.inner = inner

    def factors(self, layer: LayerView, key: DrawKey, residual: Tensor | None) -> Factors:
        if residual is None:
            return self.inner.factors(layer, key, None)
        seed = int(torch.randint(2**62, (), generator=key.generator("residual")))
        U, S, V = first_singular_vectors(residual.float(), layer.r, seed)  # (d_out, r), (r,), (d_in, r)
        # scale * B @ A = U diag(S) V^T
        return V.T * ROW_LENGTH, U * (S / (layer.scale * ROW_LENGTH))


def first_singular_vectors(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, rank), S (rank,) and V (n, rank) of a matrix (m, n), nearly, by subspace iteration (arXiv 0909.4061).

    As `torch.svd_lowrank`, which however draws on the matrix's device: a GPU draws other numbers than a CPU.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    start = torch.randn(tall.shape[1], rank, generator=torch.Generator().manual_seed(seed)).to(tall.device)
    basis = torch.linalg.qr(tall @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(tall.T @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    U, S, Vh = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    left, right = basis @ U, Vh.T
    return (left, S, right) if tall is matrix else (right, S, left)


REINITS: Mapping[str, Reinit] = {"kaiming": Kaiming(), "orthogonal": Orthogonal(), "offset": Offset()}
