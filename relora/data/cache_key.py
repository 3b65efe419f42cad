"""The cache key of prepared data: everything that decides the tokens; and the folder named after it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from relora.config.input_sections import DataSection
from relora.data.content import cache_folder
from relora.data.manifest import FORMAT_VERSION
from relora.data.sources import READING_ERRORS, Source, is_custom
from relora.data.tokenizer import adds_bos, tokenizer_hash
from relora.errors import raise_if_any
from relora.files import sha256_of_json

CacheKey = dict[str, Any]


def cache_key_of(
    data: DataSection, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> CacheKey:
    """Everything that decides the tokens, and nothing else.

    Args:
        tokenizer: None: one of `vocab_size` entries is trained on the sources.

    Raises:
        UserError: the sources that cannot be identified, such as hub datasets out of reach.
    """
    identities, problems = [], []
    for number, source in enumerate(sources):
        try:
            # A user's own kind is identified by its import path as well.
            kind = {"source": source.section.path} if is_custom(source.section) else {}
            identities.append(kind | source.identity())
        except READING_ERRORS as error:
            problems.append(f"data.sources[{number}].path = {source.section.path!r}: {error}")
    raise_if_any(problems)
    # Absent where they have no effect, so that data prepared before they were known stay the same.
    more: CacheKey = {}
    if data.add_bos is True or (tokenizer is not None and adds_bos(data, tokenizer)):
        more["add_bos"] = True
    if data.document_characters is not None:
        more["document_characters"] = data.document_characters
    return more | {
        "format_version": FORMAT_VERSION,
        "text_field": data.text_field,
        "eval_fraction": data.eval_fraction,
        "tokenizer": f"byte-level BPE of {vocab_size}" if tokenizer is None else tokenizer_hash(tokenizer),
        "sources": identities,
    }


def folder_of(data: DataSection, key: CacheKey) -> Path:
    """prepared_dir, or a folder of the cache that is named by a hash of the cache key."""
    if data.prepared_dir is not None:
        return Path(data.prepared_dir).expanduser()
    return cache_folder() / "prepared" / sha256_of_json(key)[:20]


def key_problems(folder: Path, found: CacheKey, wanted: CacheKey) -> list[str]:
    """A line with the differences, if the folder holds data of another cache key."""
    changes = list(differences("", found, wanted))
    if not changes:
        return []
    return [
        f"data.prepared_dir = {str(folder)!r}: holds data made from something else ({'; '.join(changes[:5])}); "
        "choose another folder or delete this one"
    ]


def differences(key: str, found: Any, wanted: Any) -> Iterator[str]:
    """`a.b: was 1, is 2` for every value that differs in nested mappings and lists."""
    if isinstance(found, list) and isinstance(wanted, list):
        found, wanted = dict(enumerate(found)), dict(enumerate(wanted))
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in [*found, *(name for name in wanted if name not in found)]:
            yield from differences(f"{key}.{name}" if key else str(name), found.get(name), wanted.get(name))
    elif found != wanted:
        yield f"{key}: was {found!r}, is {wanted!r}"
