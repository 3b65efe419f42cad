"""Text -> token ids. Where a text spells a special token, such as `<|endoftext|>`, it is encoded as any other text."""

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

# No text has it, so that a vocabulary's entry that begins with it is never found in a text.
NO_CHARACTER = "\uffff"


class TextEncoder:
    """A tokenizer without truncation, padding and template, none of whose special tokens is found in a text.

    Pickled as the JSON of the tokenizer, since `tokenizers` forgets the setting when it is pickled.
    """

    def __init__(self, content: str) -> None:
        self.content = content
        self.tokenizer = Tokenizer.from_str(content)
        self.tokenizer.encode_special_tokens = True  # tokenizers' name for encoding them as ordinary text
        without_special = vocabulary_of_text(json.loads(content))
        if without_special is not None:
            self.tokenizer.model = Tokenizer.from_str(json.dumps(without_special)).model

    def __reduce__(self) -> tuple[type["TextEncoder"], tuple[str]]:
        return TextEncoder, (self.content,)

    def ids(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text, all in one call, which uses all cores."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def encoder_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """The JSON of the `tokenizers` object inside, with truncation and padding off."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    return str(encoder.to_str())


def special_tokens(content: dict[str, Any]) -> set[str]:
    """The special tokens of a tokenizer's JSON, without the one for unknown text, which any text may become."""
    model = content["model"]
    unknown = model.get("unk_token")
    if model["type"] == "Unigram" and model["unk_id"] is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    return {token["content"] for token in content["added_tokens"] if token["special"]} - {unknown}


def vocabulary_of_text(content: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON of a tokenizer whose model itself finds no special token in a text; None where it finds none anyway.

    A BPE reaches its special tokens by no merge. The other models, and a BPE that looks up whole words first, find
    them in their vocabulary.
    """
    model, special = content["model"], special_tokens(content)
    words = [word for word, _ in model["vocab"]] if isinstance(model["vocab"], list) else model["vocab"]
    is_looked_up = model["type"] != "BPE" or model.get("ignore_merges")
    if not is_looked_up or special.isdisjoint(words):
        return None
    renamed = {word: NO_CHARACTER + word for word in special}
    if isinstance(model["vocab"], list):
        vocabulary: Any = [[renamed.get(word, word), score] for word, score in model["vocab"]]
    else:
        vocabulary = {renamed.get(word, word): number for word, number in model["vocab"].items()}
    return {**content, "model": {**model, "vocab": vocabulary}, "added_tokens": [], "post_processor": None}
