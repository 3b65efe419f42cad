"""Which storages are alive: every tensor that torch makes is seen by its dispatcher, and let go of when it dies."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within `with FakeTensorMode(), LiveBytes() as live:` counts the bytes of the storages made and still alive.

    Fake tensors have no values, but for a few constants: any other number that the program asks one for is 0.

    Attributes:
        now: bytes alive, without those that were claimed.
        gradients: bytes alive of what was claimed as gradients.
        history: (now, gradients) whenever something had been made; `restart` empties it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.gradients = 0, 0
        self.history: list[tuple[int, int]] = []
        self._sizes: dict[int, int] = {}
        self._claimed: set[int] = set()

    def restart(self) -> None:
        """Begin a new history, at what is alive now."""
        self.history = [(self.now, self.gradients)]

    def claim(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these as gradients from now on; those that already are stay so."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._sizes and key not in self._claimed:
                self._claimed.add(key)
                self.now -= self._sizes[key]
                self.gradients += self._sizes[key]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = function(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if function.name() != "aten::_local_scalar_dense":
                raise
            return 0.0 if args[0].is_floating_point() else 0
        leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)
        made = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if sum(self._is_new(tensor) for tensor in made):
            self.history.append((self.now, self.gradients))
        return result

    def _is_new(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return False
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._died, key)
        return True

    def _died(self, key: int) -> None:
        size = self._sizes.pop(key)
        if key in self._claimed:
            self._claimed.remove(key)
            self.gradients -= size
        else:
            self.now -= size
