"""Prepared data: a folder with a manifest, opened."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from relora.config.input_sections import DataSection
from relora.data.batches import IGNORED_LABEL, NO_TOKENS, Batch, MakeBatch, Ranges, Samples, TokenStream, make_batch
from relora.data.manifest import MANIFEST, DamagedError, Manifest, StreamRecord, read_manifest, verify
from relora.data.mixture import Mixture
from relora.errors import UserError, raise_if_any

TOKENIZER_FOLDER = "tokenizer"
Side = Literal["train", "eval"]


@dataclass(frozen=True)
class PreparedData:
    """Complete prepared data. Processes on different nodes hold the same if manifest.content_hash is equal."""

    folder: Path
    manifest: Manifest

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of these tokens."""
        return AutoTokenizer.from_pretrained(  # nosec B615  # a folder of these data, never the hub
            str(self.folder / TOKENIZER_FOLDER), local_files_only=True
        )

    def streams(self, side: Side, sequence_length: int) -> list[TokenStream]:
        """One stream per source."""
        return [TokenStream(self.folder, record, sequence_length) for record in self.records(side)]

    def records(self, side: Side) -> list[StreamRecord]:
        """One record per source."""
        return [source.train if side == "train" else source.eval for source in self.manifest.sources]

    def samples(
        self, data: DataSection, seed: int, *, make_batch: MakeBatch = make_batch, left_out: Ranges = ()
    ) -> Samples:
        """The training samples in the order of `seed`, without those of `data.skip`.

        Args:
            left_out: further samples to leave out.

        Raises:
            UserError: there is too little data.
        """
        raise_if_any(amount_problems(self, data))
        return Samples(
            self.streams("train", data.sequence_length),
            Mixture.of(tuple(source.weight for source in data.sources)),
            seed=seed,
            eos_id=self.manifest.eos_token_id,
            document_mask=data.document_mask,
            make_batch=make_batch,
            left_out=[*data.skip, *left_out],
        )

    def summary(self) -> str:
        """A line for each source and one for the tokenizer, for the user."""
        lines = [f"prepared data in {self.folder} (content {self.manifest.content_hash[:12]})"]
        for source in self.manifest.sources:
            skipped = f", skipped {source.skipped_nulls} null and {source.skipped_empty} empty texts"
            lines.append(
                f"  {source.spec['path']}: {source.train.tokens:,} training tokens in {source.train.documents:,} "
                f"documents, {source.eval.tokens:,} held out in {source.eval.documents:,}"
                + (skipped if source.skipped_nulls or source.skipped_empty else "")
            )
        return "\n".join([*lines, f"  tokenizer: {self.manifest.vocab_size:,} entries"])


def open_prepared(folder: Path) -> PreparedData:
    """The prepared data in a folder, verified.

    Raises:
        UserError: there are none; or `DamagedError`.
    """
    try:
        prepared = verified(folder)
    except DamagedError as error:
        raise DamagedError(
            f"{problem}; `relora prepare CONFIG` makes them again" for problem in error.problems
        ) from error
    if prepared is None:
        raise UserError([f"{folder}: no complete prepared data ({MANIFEST} is missing); run `relora prepare`"])
    return prepared


def verified(folder: Path) -> PreparedData | None:
    """The prepared data in a folder, None if there are none. Raises DamagedError if they are not what was written."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    verify(folder, manifest, TOKENIZER_FOLDER)
    return PreparedData(folder, manifest)


def amount_problems(prepared: PreparedData, data: DataSection) -> list[str]:
    """A line for each source too small for one training row, and one if there is too little to evaluate on."""
    length = data.sequence_length
    problems = [
        f"data.sources[{number}] ({data.sources[number].path}): {record.tokens} training tokens, fewer than one row of "
        f"data.sequence_length = {length}; add text, lower sequence_length, remove the source, or cut a long text into "
        "documents (data.document_characters)"
        for number, record in enumerate(prepared.records("train"))
        if record.tokens < length
    ]
    held_out = prepared.records("eval")
    tokens = sum(record.tokens for record in held_out)
    if tokens < length:
        problems.append(
            f"data.eval_fraction = {data.eval_fraction}: {tokens} held-out tokens in "
            f"{sum(record.documents for record in held_out)} documents, fewer than one row of data.sequence_length = "
            f"{length}; raise eval_fraction, add documents, lower sequence_length, or cut long texts into documents "
            "(data.document_characters)"
        )
    return problems


def held_out_rows(prepared: PreparedData, data: DataSection) -> list[tuple[int, int]]:
    """(source, row) of every row to evaluate on: the first ones of each source, in proportion to the weights.

    At most eval_tokens tokens in total, and at least one row; a source with too few rows gives all it has.
    """
    available = [stream.num_rows for stream in prepared.streams("eval", data.sequence_length)]
    most = max(1, data.eval_tokens // data.sequence_length)
    quotas = Mixture.of(tuple(source.weight for source in data.sources)).counts(most)
    taken = [min(quota, rows) for quota, rows in zip(quotas, available, strict=True)]
    if not any(taken):
        taken[available.index(max(available))] = min(1, max(available))
    return [(source, row) for source, rows in enumerate(taken) for row in range(rows)]


def eval_batches(
    prepared: PreparedData,
    data: DataSection,
    *,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    make_batch: MakeBatch = make_batch,
) -> Iterator[Batch]:
    """The held-out rows of this process, in batches [batch_size, sequence_length].

    Every row goes to exactly one process. All processes get the same number of batches, since the forward pass of a
    sharded model is a collective; the last ones are filled up with rows without labels.
    """
    streams = prepared.streams("eval", data.sequence_length)
    places = held_out_rows(prepared, data)
    at_once = batch_size * num_processes
    for first in range(process_index * batch_size, -(-len(places) // at_once) * at_once, at_once):
        rows = [streams[source].row(row) for source, row in places[first : first + batch_size]]
        rows += [NO_TOKENS] * (batch_size - len(rows))
        yield make_batch(
            rows,
            data.sequence_length,
            eos_id=prepared.manifest.eos_token_id,
            document_mask=data.document_mask,
        )


def unigram_entropy(
    prepared: PreparedData,
    data: DataSection,
    *,
    targets: Callable[[Batch], Tensor],
    make_batch: MakeBatch = make_batch,
) -> float:
    """Held-out loss, in nats, of the best model that ignores all context: the entropy of the scored labels.

    Args:
        targets: the labels of a batch that are scored, of any shape, IGNORED_LABEL where there is none.

    Returns:
        nan if there are no labels.
    """
    counts = np.zeros(prepared.manifest.vocab_size, dtype=np.int64)
    for batch in eval_batches(prepared, data, batch_size=16, make_batch=make_batch):
        labels = targets(batch).numpy()
        counts += np.bincount(labels[labels != IGNORED_LABEL], minlength=len(counts))
    if not counts.any():
        return float("nan")
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())
