"""Pure functions of one document's text: the side that it falls on, and its pieces."""

import hashlib
from collections.abc import Iterator

# Tokenizers take about 50 bytes of memory for each byte of one text.
LONGEST_PIECE_CHARACTERS = 1_000_000


def is_held_out(text: str, eval_fraction: float) -> bool:
    """By content, so that every copy of a document falls on the same side, in every source."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < eval_fraction * 2**64


def document_pieces(text: str) -> Iterator[str]:
    """The text itself, or if it is very long its pieces, cut before a line break where there is one."""
    start = 0
    while len(text) - start > LONGEST_PIECE_CHARACTERS:
        end = start + LONGEST_PIECE_CHARACTERS
        cut = text.rfind("\n", start + 1, end)
        end = cut if cut > start else end
        yield text[start:end]
        start = end
    yield text[start:] if start else text
