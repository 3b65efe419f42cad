"""Pure functions of texts: the documents in them, the side of the split of each (train or held out), and its pieces."""

import hashlib
from collections.abc import Iterable, Iterator

# Tokenizers take about 50 bytes of memory for each byte of one text.
MAX_PIECE_CHARACTERS = 1_000_000


def is_held_out(text: str, eval_fraction: float) -> bool:
    """Whether a document is held out: decided by its content, so that all copies, in all sources, are on one side."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < eval_fraction * 2**64


def documents_of(texts: Iterable[str | None], most_characters: int | None) -> list[str]:
    """The documents of texts that are not empty: each text, or its sections of at most `most_characters`."""
    present = (text for text in texts if text)
    if most_characters is None:
        return list(present)
    return [section for text in present for section in document_pieces(text, most_characters)]


def document_pieces(text: str, most_characters: int = MAX_PIECE_CHARACTERS) -> Iterator[str]:
    """The text itself, or the pieces of a longer one, cut before a line break where there is one."""
    start = 0
    while len(text) - start > most_characters:
        end = start + most_characters
        cut = text.rfind("\n", start + 1, end)
        end = cut if cut > start else end
        yield text[start:end]
        start = end
    yield text[start:] if start else text
