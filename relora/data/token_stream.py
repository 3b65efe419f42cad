"""The token stream of one source and one side of the split: memory-mapped Arrow files, cut into rows.

Only the requested row is read, so that memory and start-up time do not grow with the corpus.
"""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from relora.data.manifest import StreamRecord

# An open file takes about a kilobyte per record batch and one memory mapping, of which a process may have 65530.
MAX_OPEN_FILES = 256


class Row(NamedTuple):
    """tokens: [n], n <= sequence_length, int64; starts: [d], where in the row documents begin, ascending."""

    tokens: np.ndarray
    starts: np.ndarray


class TokenFile:
    """One Arrow file. values[k]: the tokens of record batch k; offsets[k]: [its documents + 1]; views, no copies."""

    def __init__(self, path: Path) -> None:
        self.values: list[np.ndarray] = []
        self.offsets: list[np.ndarray] = []
        with pa.memory_map(str(path)) as file:  # closed at once: the views need the mapping only
            for batch in pa.ipc.open_stream(file):
                column = batch.column(0)
                self.values.append(column.values.to_numpy(zero_copy_only=True))
                self.offsets.append(column.offsets.to_numpy(zero_copy_only=True))
        self.ends = np.cumsum([len(values) for values in self.values], dtype=np.int64)
        self.num_tokens = int(self.ends[-1]) if len(self.ends) else 0
        self.num_documents = sum(len(offsets) - 1 for offsets in self.offsets)

    def parts(self, start: int, stop: int) -> Iterator[Row]:
        """Tokens start..stop of the file, one part per record batch; `starts` count from the beginning of the part."""
        k = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            base = int(self.ends[k]) - len(self.values[k])
            end = min(stop, int(self.ends[k]))
            low, high = np.searchsorted(self.offsets[k][:-1], [start - base, end - base])
            yield Row(self.values[k][start - base : end - base], self.offsets[k][low:high] - (start - base))
            start, k = end, k + 1


class TokenStream:
    """Rows of `sequence_length` tokens across the borders of documents and files; only the last may be shorter.

    Pickled without its open files, so that the workers of a DataLoader open their own.
    """

    def __init__(self, folder: Path, record: StreamRecord, sequence_length: int) -> None:
        self.folder = folder
        self.sequence_length = sequence_length
        self.num_tokens = record.tokens
        self.num_rows = -(-record.tokens // sequence_length)
        self.names = [file.name for file in record.files]
        self.ends = np.cumsum([file.tokens for file in record.files], dtype=np.int64)
        self._open: OrderedDict[int, TokenFile] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def row(self, number: int) -> Row:
        """Row `number`, 0 <= number < num_rows. Raises IndexError outside."""
        if not 0 <= number < self.num_rows:
            raise IndexError(f"row {number} of {self.num_rows}")
        start = number * self.sequence_length
        return self.span(start, min(start + self.sequence_length, self.num_tokens))

    def span(self, start: int, stop: int) -> Row:
        """Tokens start..stop of the stream."""
        tokens = np.empty(stop - start, dtype=np.int64)
        starts = []
        filled = 0
        for part in self.parts(start, stop):
            tokens[filled : filled + len(part.tokens)] = part.tokens
            starts.append(part.starts + np.int64(filled))
            filled += len(part.tokens)
        return Row(tokens, np.concatenate(starts) if len(starts) != 1 else starts[0])

    def parts(self, start: int, stop: int) -> Iterator[Row]:
        """Tokens start..stop of the stream, one part per record batch of each file."""
        k = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            end = min(stop, int(self.ends[k]))
            file = self.file(k)
            base = int(self.ends[k]) - file.num_tokens
            yield from file.parts(start - base, end - base)
            start, k = end, k + 1

    def file(self, k: int) -> TokenFile:
        """File k, opened if necessary; at most MAX_OPEN_FILES stay open, the least recently used is closed."""
        if k not in self._open:
            self._open[k] = TokenFile(self.folder / self.names[k])
            if len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(k)
        return self._open[k]
