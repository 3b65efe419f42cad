"""Pure functions of the text of one document: its side of the split (train or held out), and its pieces."""

import hashlib
from collections.abc import Iterator

# Tokenizers take about 50 bytes of memory for each byte of one text.
MAX_PIECE_CHARACTERS = 1_000_000


def is_held_out(text: str, eval_fraction: float) -> bool:
    """Whether a document is held out: decided by its content, so that all copies, in all sources, are on one side."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < eval_fraction * 2**64


def document_pieces(text: str) -> Iterator[str]:
    """The text itself, or the pieces of a very long one, cut before a line break where there is one."""
    start = 0
    while len(text) - start > MAX_PIECE_CHARACTERS:
        end = start + MAX_PIECE_CHARACTERS
        cut = text.rfind("\n", start + 1, end)
        end = cut if cut > start else end
        yield text[start:end]
        start = end
    yield text[start:] if start else text
