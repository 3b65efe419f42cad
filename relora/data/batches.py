"""The sample at a position, and the micro-batches of a process from a position on."""

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from relora.data.mixture import Mixture, row_of
from relora.data.token_stream import Row, TokenStream

Batch = dict[str, Tensor]
MakeBatch = Callable[..., Batch]  # (rows, sequence_length, *, eos_id, document_mask), as `make_batch`
IGNORED_LABEL = -100  # transformers' ignore_index
READER_GRACE_S = 300
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


class Samples(Dataset[Batch]):
    """The endless training samples: samples[i] is a pure function of (seed, i), of 1-D int64 tensors.

    `make_batch` turns rows into tensors; a task may replace it by another of the same signature.
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
    ) -> None:
        self.streams = list(streams)
        self.mixture = mixture
        self.seed = seed
        self.eos_id = eos_id
        self.document_mask = document_mask
        self.make_batch = make_batch

    def locate(self, i: int) -> tuple[int, int]:
        """Sample i -> (source, row of that source)."""
        source, count = self.mixture.locate(i)
        num_rows = self.streams[source].num_rows
        return source, row_of(seed=self.seed, source=source, count=count, num_rows=num_rows)

    def passes(self, i: int) -> list[float]:
        """Passes over each source after i samples."""
        counts = self.mixture.counts(i)
        return [count / stream.num_rows for count, stream in zip(counts, self.streams, strict=True)]

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
        collate_fn=unchanged,  # a batch is already one: `Samples.__getitems__`
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


def unchanged(batch: Any) -> Any:
    return batch
