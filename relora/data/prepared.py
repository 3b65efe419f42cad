"""Prepared data: a folder with a manifest, opened."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from relora.config.problems import UserError
from relora.config.tree import DataSection
from relora.data.batches import Samples
from relora.data.manifest import MANIFEST, Manifest, StreamRecord, read_manifest
from relora.data.order import Mixture
from relora.data.tokens import TokenStream

TOKENIZER_FOLDER = "tokenizer"
Side = Literal["train", "eval"]


@dataclass(frozen=True)
class PreparedData:
    """Complete prepared data. Ranks on different nodes hold the same if manifest.content_hash is equal."""

    folder: Path
    manifest: Manifest

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the tokens."""
        return AutoTokenizer.from_pretrained(str(self.folder / TOKENIZER_FOLDER))

    def streams(self, side: Side, sequence_length: int) -> list[TokenStream]:
        """One stream per source."""
        return [TokenStream(self.folder, record, sequence_length) for record in self.records(side)]

    def records(self, side: Side) -> list[StreamRecord]:
        return [source.train if side == "train" else source.eval for source in self.manifest.sources]

    def samples(self, data: DataSection, seed: int) -> Samples:
        """The training samples in the order of `seed`. Raises UserError if there is too little data."""
        problems = check_amount(self, data)
        if problems:
            raise UserError(problems)
        return Samples(
            self.streams("train", data.sequence_length),
            Mixture.of([source.weight for source in data.sources]),
            seed=seed,
            eos_id=self.manifest.eos_token_id,
            document_mask=data.document_mask,
        )

    def summary(self) -> str:
        """A line for each source, and one for the tokenizer, to be shown to the user."""
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
    """Raises UserError if the folder holds no complete prepared data."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError([f"{folder}: no complete prepared data ({MANIFEST} is missing); run `relora prepare`"])
    return PreparedData(folder, manifest)


def check_amount(prepared: PreparedData, data: DataSection) -> list[str]:
    """A line for each source too small for one training row, and one if nothing can be evaluated."""
    length = data.sequence_length
    problems = [
        f"data.sources[{number}] ({data.sources[number].path}): {record.tokens} training tokens, fewer than one row of "
        f"data.sequence_length = {length}; add text, lower sequence_length, or remove the source"
        for number, record in enumerate(prepared.records("train"))
        if record.tokens < length
    ]
    held_out = prepared.records("eval")
    tokens = sum(record.tokens for record in held_out)
    if tokens < length:
        problems.append(
            f"data.eval_fraction = {data.eval_fraction}: {tokens} held-out tokens in "
            f"{sum(record.documents for record in held_out)} documents, fewer than one row of data.sequence_length = "
            f"{length}; raise eval_fraction, add documents, or lower sequence_length"
        )
    return problems
