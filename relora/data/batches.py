"""Rows of tokens, the sample at a position, and the micro-batches of a process from a position on.

Tokens are read from memory-mapped Arrow files, only the requested rows, so that memory and start-up time do not grow
with the corpus.
"""

import signal
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from relora.data.manifest import StreamRecord
from relora.data.mixture import Mixture, row_of

Batch = dict[str, Tensor]
MakeBatch = Callable[..., Batch]  # (rows, sequence_length, *, eos_id, document_mask), as `make_batch`
IGNORED_LABEL = -100  # transformers' ignore_index
READER_GRACE_S = 300
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
        stop = min(start + self.sequence_length, self.num_tokens)
        tokens = np.empty(stop - start, dtype=np.int64)
        starts = []
        filled = 0
        k = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            # File k, opened if necessary; at most MAX_OPEN_FILES stay open, the least recently used is closed.
            if k not in self._open:
                self._open[k] = TokenFile(self.folder / self.names[k])
                if len(self._open) > MAX_OPEN_FILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(k)
            # The row's tokens in it; its own first token is token `base` of the stream.
            file, end = self._open[k], min(stop, int(self.ends[k]))
            base = int(self.ends[k]) - file.num_tokens
            for part in file.parts(start - base, end - base):
                tokens[filled : filled + len(part.tokens)] = part.tokens
                starts.append(part.starts + np.int64(filled))
                filled += len(part.tokens)
            start, k = end, k + 1
        return Row(tokens, np.concatenate(starts) if len(starts) != 1 else starts[0])


NO_TOKENS = Row(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


def make_batch(rows: Sequence[Row], sequence_length: int, *, eos_id: int, document_mask: bool) -> Batch:
    """Rows -> int64 tensors [rows, sequence_length]: input_ids, labels, and with document_mask two more.

    labels: a copy of input_ids, unshifted as in transformers, IGNORED_LABEL on padding (whose id is EOS). With
    document_mask: document_ids 0, 1, 2.. within the row (padding is a document of its own), position_ids from 0 in
    each, and IGNORED_LABEL at the first token of a document, which nothing in its document predicts.
    """
    input_ids = np.full((len(rows), sequence_length), eos_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORED_LABEL)
    for input_row, label_row, row in zip(input_ids, labels, rows, strict=True):
        input_row[: len(row.tokens)] = row.tokens
        label_row[: len(row.tokens)] = row.tokens
    arrays = {"input_ids": input_ids, "labels": labels}
    if document_mask:
        begins = document_begins(rows, sequence_length)
        labels[begins] = IGNORED_LABEL
        arrays |= places(begins)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def document_begins(rows: Sequence[Row], sequence_length: int) -> np.ndarray:
    """Bool [rows, sequence_length]: True where a document, or the padding, begins."""
    begins = np.zeros((len(rows), sequence_length), dtype=bool)
    for begin_row, row in zip(begins, rows, strict=True):
        begin_row[row.starts] = True
        begin_row[len(row.tokens) : len(row.tokens) + 1] = True
    return begins


def places(begins: np.ndarray) -> dict[str, np.ndarray]:
    """position_ids and document_ids of rows whose documents begin where `begins` is True.

    A document that continues from the row before is document 0:
        begins          . . 1 . 1
        position_ids    0 1 0 1 0
        document_ids    0 0 1 1 2
    """
    later = begins.copy()
    later[:, 0] = False
    columns = np.arange(begins.shape[1])
    begun_at = np.maximum.accumulate(np.where(later, columns, 0), axis=1)
    return {"position_ids": columns - begun_at, "document_ids": np.cumsum(later, axis=1, dtype=np.int64)}


Ranges = Sequence[tuple[int, int]]  # (first, end): first <= i < end


def disjoint(ranges: Ranges) -> Ranges:
    """Ranges in any order, which may overlap -> ranges of the same numbers, ascending, with gaps between them."""
    joined: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return tuple(joined)


def index_of(i: int, left_out: Ranges) -> int:
    """The i-th of the numbers 0, 1, 2.. that no range leaves out.

    Args:
        left_out: as `disjoint` returns them.
    """
    for first, end in left_out:
        if i < first:
            break
        i += end - first
    return i


class Samples(Dataset[Batch]):
    """The endless training samples: samples[i] is a pure function of (seed, i), of 1-D int64 tensors.

    `make_batch` turns rows into tensors; a task may replace it by another of the same signature. With `left_out` the
    samples of these indices do not come, and those after them come earlier: samples[i] is the one of index
    `index_of(i, left_out)`.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        mixture: Mixture,
        *,
        seed: int,
        eos_id: int,
        document_mask: bool,
        make_batch: MakeBatch = make_batch,
        left_out: Ranges = (),
    ) -> None:
        self.streams = list(streams)
        self.mixture = mixture
        self.seed = seed
        self.eos_id = eos_id
        self.document_mask = document_mask
        self.make_batch = make_batch
        self.left_out = disjoint(left_out)

    def locate(self, i: int) -> tuple[int, int]:
        """Sample i -> (source, row of that source)."""
        source, count = self.mixture.locate(index_of(i, self.left_out))
        num_rows = self.streams[source].num_rows
        return source, row_of(seed=self.seed, source=source, count=count, num_rows=num_rows)

    def passes(self, i: int) -> list[float]:
        """Passes over each source after i samples; what is left out does not count."""
        index = index_of(i, self.left_out)
        counts = np.array(self.mixture.counts(index))
        for first, end in self.left_out:
            if end <= index:
                counts -= np.array(self.mixture.counts(end)) - np.array(self.mixture.counts(first))
        return [int(count) / stream.num_rows for count, stream in zip(counts, self.streams, strict=True)]

    def __getitem__(self, i: int) -> Batch:
        return {name: tensor[0] for name, tensor in self.__getitems__([i]).items()}

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions as one batch [positions, sequence_length]; a DataLoader asks for this."""
        rows = [self.streams[source].row(row) for source, row in map(self.locate, positions)]
        length = self.streams[0].sequence_length
        return self.make_batch(rows, length, eos_id=self.eos_id, document_mask=self.document_mask)


class Positions:
    """The endless lists of positions that one process reads, one list per micro-batch, update after update."""

    def __init__(
        self, *, start: int, global_batch_size: int, batch_size: int, process_index: int, num_processes: int
    ) -> None:
        at_once = batch_size * num_processes
        if global_batch_size % at_once:
            raise ValueError(
                f"global_batch_size {global_batch_size} is no multiple of per_device_batch_size {batch_size} "
                f"x {num_processes} processes"
            )
        self.first = start + process_index * batch_size
        self.batch_size = batch_size
        self.at_once = at_once

    def __iter__(self) -> Iterator[list[int]]:
        # Micro-batch m of an update at s begins at s + (m * num_processes + process_index) * B; the next update
        # follows without a gap.
        first = self.first
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.at_once


def micro_batches(
    samples: Samples,
    *,
    start: int,
    global_batch_size: int,
    per_device_batch_size: int,
    process_index: int,
    num_processes: int,
    num_workers: int,
    pin_memory: bool = False,
) -> Generator[list[Batch], None, None]:
    """Endless: for each update from sample `start` on, this process's list of micro-batches [B, sequence_length].

    Micro-batch m of process p holds the samples start + (m * num_processes + p) * B .. + B, whatever num_workers is.
    The workers end when the iterator is closed or dropped. Raises ValueError at once if the global batch does not
    divide.
    """
    positions = Positions(
        start=start,
        global_batch_size=global_batch_size,
        batch_size=per_device_batch_size,
        process_index=process_index,
        num_processes=num_processes,
    )
    loader: DataLoader[Batch] = DataLoader(
        samples,
        batch_sampler=cast("Iterator[list[int]]", positions),
        num_workers=num_workers,
        collate_fn=dict,  # `Samples.__getitems__` returns a whole batch
        pin_memory=pin_memory,
        worker_init_fn=outlive_stop,
        generator=torch.Generator(),  # else the loader would draw from torch's global generator, and advance it
    )
    return grouped(loader, global_batch_size // positions.at_once)


def grouped(loader: "DataLoader[Batch]", size: int) -> Generator[list[Batch], None, None]:
    """The batches of a loader in lists of `size`. A generator, so that `micro_batches` itself raises at once."""
    batches = iter(loader)
    while True:
        yield [next(batches) for _ in range(size)]


def outlive_stop(_: int) -> None:
    """Set up a reader process to survive SIGTERM for READER_GRACE_S, until its training process has ended in order.

    A launcher sends SIGTERM to the whole process group. By default a reader would die of it at once, and the training
    process of the death of its reader.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(READER_GRACE_S))
