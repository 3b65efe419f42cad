"""Documents that two sets of prepared data have in common, by the hash of their tokens."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from relora.data.batches import TokenFile
from relora.data.dataset import PreparedData
from relora.data.manifest import StreamRecord


def num_trained_on(held_out: PreparedData, trained: PreparedData) -> int | None:
    """How many held-out documents of one are training documents of the other; None if their tokens do not compare."""
    if held_out.manifest.tokenizer_hash != trained.manifest.tokenizer_hash:
        return None
    wanted = {digest for record in held_out.records("eval") for digest in document_hashes(held_out.folder, record)}
    found: set[bytes] = set()
    for record in trained.records("train"):
        found.update(wanted.intersection(document_hashes(trained.folder, record)))
    return len(found)


def document_hashes(folder: Path, record: StreamRecord) -> Iterator[bytes]:
    """The hash of the tokens of each document, in their order; of equal width, whatever the ids are stored in."""
    for file in record.files:
        tokens = TokenFile(folder / file.name)
        for values, offsets in zip(tokens.values, tokens.offsets, strict=True):
            for start, stop in itertools.pairwise(offsets):
                content = values[start:stop].astype("<u4").tobytes()
                yield hashlib.blake2b(content, digest_size=16).digest()
