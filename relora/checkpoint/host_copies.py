"""Copies of a checkpoint's tensors in host memory, from which a thread writes them while training goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from relora.checkpoint.format import BASE, QUANTIZED
from relora.engines.state_entry import Entry

# Copied once a cycle at most, and large: their memory is given back. That of the others serves the next save.
FROZEN = (BASE, QUANTIZED)


class HostCopies:
    """The copies of one checkpoint at a time.

    Args:
        keep: False in a process that writes nothing: it only takes part in fetching.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._buffers: dict[str, Tensor] = {}

    def take(self, groups: Mapping[str, Sequence[Entry]]) -> dict[str, list[Entry]]:
        """The same entries, whose values are those of now. Collective.

        Nothing may use the entries of the call before any more. Entries that are constant are not copied.
        """
        before, self._buffers = self._buffers, {}
        taken = {
            group: [
                entry if entry.is_constant else self._copy(entry, before, is_frozen=group.startswith(FROZEN))
                for entry in entries
            ]
            for group, entries in groups.items()
        }
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the copies to pinned memory have only been started
        return taken

    def _copy(self, entry: Entry, before: dict[str, Tensor], *, is_frozen: bool) -> Entry:
        """The entry with its values fetched now, in memory of `before` if it has some of that shape and dtype."""
        values = entry.fetch().detach()
        if not self._keep:
            return entry
        if is_frozen:
            held = [values.to("cpu", copy=True)]
            return replace(entry, fetch=held.pop)  # freed when it is written
        buffer = before.pop(entry.name, None)
        if buffer is None or (buffer.shape, buffer.dtype) != (values.shape, values.dtype):
            buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._buffers[entry.name] = buffer.copy_(values, non_blocking=True)
        return replace(entry, fetch=lambda: buffer)
