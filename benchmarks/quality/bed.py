"""The test bed of bytes: a vocabulary so small that nearly all parameters are hidden matrices, and a Llama on it.

In a small model with a usual vocabulary the embeddings train in full in every arm, and hide what the arms do.
"""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 256
END = "<|endoftext|>"  # in the place of byte 0, which no text has
HEAD_SIZE = 32
WIDTHS_A_LAYER = 32 / 3  # width 64: 6 layers, 128: 12, 192: 18, 256: 24


def model_of(width: int, *, sequence_length: int) -> dict[str, Any]:
    """The config of a Llama with tied embeddings, of constant depth-to-width."""
    return {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": round(width / WIDTHS_A_LAYER),
        "num_attention_heads": max(1, width // HEAD_SIZE),
        "max_position_embeddings": sequence_length,
        "tie_word_embeddings": True,
    }


def num_parameters(width: int) -> tuple[int, int]:
    """(of hidden matrices, of all)."""
    layers = round(width / WIDTHS_A_LAYER)
    hidden = layers * (4 * width * width + 3 * width * 4 * width)
    return hidden, hidden + (2 * layers + 1) * width + VOCAB_SIZE * width


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer without merges: a token is a byte of UTF-8."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    nul = "\u0100"  # how ByteLevel writes byte 0
    vocabulary = {END: 0} | {symbol: number for number, symbol in enumerate((s for s in symbols if s != nul), start=1)}
    assert len(vocabulary) == VOCAB_SIZE
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    return folder
