"""A stand-in for a GPU: a device of torch whose memory is the host's, so that the path of a device runs anywhere.

It is torch's own device for backends out of tree (PrivateUse1), under the name `standin`: tensors of it are on another
device for all of torch, autograd runs backward passes in a thread of the device's own, autocast and generators are
separate. Each operator computes on the same memory by the CPU's kernel. On the way it refuses what a GPU refuses, and
writes down where the host waits for the device.

A process cannot undo `register`: see `fresh_process.py`.
"""

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME, KEY = "standin", "PrivateUse1"
ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
aten = torch.ops.aten

# Beside a copy to the host and item(): operators whose result has a shape, or is a number, that the host must read.
READERS = {
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
# Operators that a GPU lets read tensors of the host: it copies their numbers first, for which the host waits.
MIXING = {"index", "index_put_", "_index_put_impl_"}
# As torch's list for CUDA has them, those of losses and products. Operators made of others are cast there.
TO_BF16 = "mm addmm addmv addr mv matmul linear bmm baddbmm addbmm einsum scaled_dot_product_attention convolution"
TO_FLOAT = (
    "exp log log2 log10 log1p expm1 pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar reciprocal rsqrt softplus "
    "layer_norm native_layer_norm group_norm rms_norm nll_loss nll_loss_nd cross_entropy_loss logsumexp "
    "softmax.int log_softmax.int cumsum sum sum.dim_IntList prod norm.Scalar"
)
# What processes exchange goes over gloo, in the host's memory.
COLLECTIVES = (
    "allreduce_ allreduce_coalesced_ broadcast_ allgather_ _allgather_base_ allgather_into_tensor_coalesced_ "
    "reduce_scatter_ _reduce_scatter_base_ reduce_scatter_tensor_coalesced_"
)


@dataclass(frozen=True)
class Wait:
    """The host waits for the device.

    Attributes:
        what: the operator, or the direction of a copy.
        place: file:function that asked for it, the innermost that is not torch's.
        in_relora: the innermost such place in relora itself; empty if there is none.
        thread: the thread that waits; that of a backward pass has a name that Python makes up.
    """

    what: str
    place: str
    in_relora: str
    thread: str


class Queue:
    """A stream or an event of the device, on which everything has been computed already."""

    def __init__(self, **_: object) -> None:
        pass

    def __enter__(self) -> "Queue":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record(self, stream: object = None) -> "Queue":  # noqa: ARG002
        return self

    record_event = record

    def wait_event(self, event: object) -> None:
        pass

    wait_stream = record_stream = wait_event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        STANDIN.note_wait("synchronize")


class StandIn:
    """The device, which is also the module `torch.standin` that torch asks for its streams, seeds and dtypes.

    Attributes:
        waits: every wait of the host so far.
    """

    Stream = Event = Queue

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.generator = torch.Generator()

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0)

    def note_wait(self, what: str) -> None:
        places, frame = [], sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name != "__torch_dispatch__":
                places.append((frame.f_code.co_filename, frame.f_code.co_name))
            frame = frame.f_back
        own = [f"{file}:{name}" for file, name in places if "/torch/" not in file and file != __file__]
        relora = [place.rpartition("/relora/")[2] for place in own if "/relora/" in place and "/tests/" not in place]
        self.waits.append(Wait(what, (*own, "")[0], (*relora, "")[0], threading.current_thread().name))

    # What torch asks of the module of a device.

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: object) -> None:
        assert torch.device(NAME, 0) == torch.device(NAME, 0 if device is None else device), device

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def get_rng_state(self, device: object = NAME) -> Tensor:  # noqa: ARG002
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: object = NAME) -> None:  # noqa: ARG002
        self.generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def current_stream(self, device: object = None) -> Queue:  # noqa: ARG002
        return Queue()

    def stream(self, stream: Queue) -> Queue:
        return stream

    def synchronize(self, device: object = None) -> None:  # noqa: ARG002
        self.note_wait("synchronize")


STANDIN = StandIn()
_LIBRARIES: list[torch.library.Library] = []  # they last as long as these objects


def register() -> StandIn:
    """Give this process the device, for as long as it lives."""
    if not _LIBRARIES:
        _setup_privateuseone_for_python_backend(NAME, backend_module=STANDIN)
        every, own, of_processes = (torch.library.Library(name, "IMPL") for name in ("_", "aten", "c10d"))
        _LIBRARIES.extend((every, own, of_processes))
        every.fallback(compute, KEY)
        every.fallback(torch.library.fallthrough_kernel, f"Autocast{KEY}")
        own.impl("_copy_from", copy, KEY)
        own.impl("_local_scalar_dense", item, KEY)
        for names, dtype in ((TO_BF16, None), (TO_FLOAT, torch.float32)):
            for name in names.split():
                packet, _, overload = name.partition(".")
                operator = getattr(getattr(aten, packet), overload or "default")
                own.impl(name, partial(compute_in, dtype, operator), f"Autocast{KEY}")
        with warnings.catch_warnings(action="ignore"):  # each replaces one that hands its tensors to NCCL and its like
            for name in COLLECTIVES.split():
                operator = getattr(torch.ops.c10d, name).default
                of_processes.impl(name, partial(communicate, operator), KEY, allow_override=True)
        torch.Tensor.pin_memory, torch.Tensor.record_stream = pin, lambda *_: None
        torch.UntypedStorage.resize_ = resize
        torch.Tensor.data = property(_data.__get__, set_data)
        torch._has_compatible_shallow_copy_type = can_set_data
    return STANDIN


# The memory of the device.


def to_host(tensor: Tensor) -> Tensor:
    """A tensor of the CPU over the memory of a tensor of the device."""
    storage = tensor.untyped_storage().host
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def to_device(tensor: Tensor) -> Tensor:
    """A tensor of the device over the memory of a tensor of the CPU."""
    host = tensor.untyped_storage()
    known = host.__dict__.get("on_device")
    storage = None if known is None else known()
    if storage is None:
        storage = torch._C._construct_storage_from_data_pointer(host.data_ptr(), STANDIN.device, host.nbytes())
        storage.host, host.on_device = host, weakref.ref(storage)
    made = torch._C._acc.create_empty_tensor([0], tensor.dtype)
    _place(made, storage, tensor)
    return made


def _place(tensor: Tensor, storage: torch.UntypedStorage, like: Tensor) -> None:
    """Let a tensor of the device lie in a storage as `like` does."""
    place = aten.set_.source_Storage_storage_offset
    place.redispatch(ON_CPU, tensor, storage, like.storage_offset(), like.shape, like.stride())


def pin(tensor: Tensor, device: object = None) -> Tensor:  # noqa: ARG001
    """`Tensor.pin_memory`: torch cannot pin memory for a device that is written in Python."""
    pinned = tensor.clone()
    pinned.untyped_storage().is_pinned_here = True
    return pinned


def is_pinned(tensor: Tensor) -> bool:
    return "is_pinned_here" in tensor.untyped_storage().__dict__


def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    """`UntypedStorage.resize_`, by which fully_shard frees what it has gathered: the numbers become NaN."""
    if storage.device.type != NAME:
        return _resize(storage, size)
    assert size in (0, storage.nbytes())
    if size == 0:
        storage.host.fill_(0xFF)
    return storage


_resize = torch.UntypedStorage.resize_
_data, _can_set_data = torch.Tensor.data, torch._has_compatible_shallow_copy_type


def can_set_data(tensor: Tensor, data: Tensor) -> bool:
    return {tensor.device.type, data.device.type} == {"cpu", NAME} or _can_set_data(tensor, data)


def set_data(tensor: Tensor, data: Tensor) -> None:
    """`tensor.data = data`, by which a module moves: between devices torch allows it to the CPU and GPUs alone."""
    if {tensor.device.type, data.device.type} == {"cpu", NAME}:
        torch._C._swap_tensor_impl(tensor, data.detach().requires_grad_(tensor.requires_grad))
    else:
        _data.__set__(tensor, data)


# The operators.


def tree_map(change: Callable[[Any], Any], value: Any) -> Any:
    """Change the leaves of the lists, tuples and dicts that operators take and give; torch's own is slower."""
    if isinstance(value, list | tuple):
        return type(value)([tree_map(change, item) for item in value])
    if isinstance(value, dict):
        return {key: tree_map(change, item) for key, item in value.items()}
    return change(value)


def compute(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator, by the CPU's kernel on the same memory."""
    name, lent = operator.overloadpacket.__name__, dict[int, tuple[Tensor, Tensor]]()

    def lend(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != NAME:
            return value
        host = to_host(value)
        lent[id(host)] = (host, value)
        return host

    def give_back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return lent[id(value)][1] if id(value) in lent else to_device(value)

    given = tree_map(lend, (with_tensors_for_numbers(operator, args), kwargs))
    refuse(operator, args, kwargs)
    if name in READERS:
        STANDIN.note_wait(name)
    if "device" in kwargs:
        given[1]["device"] = torch.device("cpu")
    with drawing(operator):
        result = operator(*given[0], **given[1])
    for host, own in lent.values():
        if host.shape != own.shape or host.stride() != own.stride():  # resized, as results given by out= are
            _place(own, to_device(host.clone()).untyped_storage(), host)
    return tree_map(give_back, result)


def with_tensors_for_numbers(operator: Any, args: Sequence[Any]) -> Sequence[Any]:
    """Arguments as they were given: torch shows a number that stood for a tensor as a number, but does not take it."""
    if torch._C._should_allow_numbers_as_tensors(operator.overloadpacket.__name__):
        return args
    return [
        torch.tensor(value) if isinstance(value, int | float) and str(argument.type) == "Tensor" else value
        for value, argument in zip(args, operator._schema.arguments, strict=False)
    ]


def refuse(operator: Any, args: Any, kwargs: Any) -> None:
    """Raise what a GPU raises. Of the host's tensors it takes single numbers alone, for elementwise operators."""
    if torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled(NAME):
        raise RuntimeError(f"{operator} on {NAME} within the autocast of another device: cpu")

    def look(value: Any) -> None:
        if isinstance(value, torch.Generator):
            raise RuntimeError(f"{operator}: expected a {NAME!r} device type for generator but found {value.device}")
        if isinstance(value, Tensor) and value.device.type == "cpu":
            if operator.overloadpacket.__name__ in MIXING:
                STANDIN.note_wait("copy to the device")
            elif value.dim() or torch.Tag.pointwise not in operator.tags:
                shape = tuple(value.shape)
                raise RuntimeError(f"{operator}: expected all tensors on {NAME}, but one of shape {shape} is on cpu")

    tree_map(look, (args, kwargs))


@contextmanager
def drawing(operator: Any) -> Iterator[None]:
    """Random numbers come from the generator of the device; that of the CPU stays as it is."""
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(STANDIN.generator.get_state())
    try:
        yield
    finally:
        STANDIN.generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


def copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """`copy_` and all that is made of it, such as `to` and `cpu`; the host waits unless its memory is pinned."""
    on_device = [tensor.device.type == NAME for tensor in (source, target)]
    if not all(on_device):
        of_host = target if on_device[0] else source
        if not (non_blocking and is_pinned(of_host)):
            STANDIN.note_wait("copy to the host" if on_device[0] else "copy to the device")
    to = to_host(target) if on_device[1] else target
    to.copy_(to_host(source) if on_device[0] else source)
    return target


def item(tensor: Tensor) -> Any:
    STANDIN.note_wait("item")
    return to_host(tensor).item()


def compute_in(dtype: torch.dtype | None, operator: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator within the device's autocast, its arguments in `dtype`; None for autocast's own."""
    chosen = torch.get_autocast_dtype(NAME) if dtype is None else dtype

    def cast(value: Any) -> Any:
        is_cast = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(chosen) if is_cast and value.device.type == NAME else value

    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        args, kwargs = tree_map(cast, (args, kwargs))
        return operator(*args, **kwargs)


def communicate(operator: Any, *args: Any) -> tuple[Any, Any]:
    """A collective of tensors of the device. It is complete when it returns, but the host has not waited for a device.

    Returns:
        The tensors, and the handle to wait for them, which gives DDP the same tensors as its result.
    """
    tensors, work = compute(operator, *args)
    torch._C._distributed_c10d.Work.unbox(work).wait()
    done: torch.futures.Future[list[Tensor]] = torch.futures.Future()
    done.set_result(list(tensors) if isinstance(tensors, list | tuple) else [tensors])
    return tensors, torch._C._distributed_c10d._create_work_from_future(done).boxed()
