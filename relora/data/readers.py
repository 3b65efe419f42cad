"""Readers of local files: those of `datasets`, of which one column is read, and the file and line that fails."""

import bz2
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
from datasets import ArrowBasedBuilder, Dataset, Features
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.text.text import Text

LINES = (".jsonl", ".ndjson")


class OneColumn(ArrowBasedBuilder):  # type: ignore[misc]  # datasets has no types
    """A reader of `datasets` that leaves out every column but one, in which files need not agree."""

    column: str

    def _split_generators(self, dl_manager: Any) -> Any:
        splits = super()._split_generators(dl_manager)
        features = self.info.features
        if features is not None and self.column in features:
            self.info.features = Features({self.column: features[self.column]})
            if isinstance(self, Parquet):  # whose other columns are then not even read
                self.config.columns = [self.column]
        return splits

    def _cast_table(self, pa_table: pa.Table, **keys: Any) -> pa.Table:
        if self.column in pa_table.column_names:
            pa_table = pa_table.select([self.column])
            pa_table.validate(full=True)  # text that is not UTF-8 would pass, and fail where nobody knows its file
        elif isinstance(self, Json) and self.info.features is not None and [*self.info.features] == [self.column]:
            # In JSON a key may be left out, here by all the rows that were read at once.
            pa_table = pa.table({self.column: pa.nulls(len(pa_table), self.info.features.arrow_schema.field(0).type)})
        return super()._cast_table(pa_table, **keys)


class OneColumnOfJson(OneColumn, Json):  # type: ignore[misc]  # datasets has no types
    pass


class OneColumnOfCsv(OneColumn, Csv):  # type: ignore[misc]  # datasets has no types
    pass


class OneColumnOfParquet(OneColumn, Parquet):  # type: ignore[misc]  # datasets has no types
    pass


class OneColumnOfArrow(OneColumn, Arrow):  # type: ignore[misc]  # datasets has no types
    pass


class OneColumnOfText(OneColumn, Text):  # type: ignore[misc]  # datasets has no types
    pass


BUILDERS: dict[str, type[OneColumn]] = {
    "json": OneColumnOfJson,
    "csv": OneColumnOfCsv,
    "tsv": OneColumnOfCsv,
    "parquet": OneColumnOfParquet,
    "arrow": OneColumnOfArrow,
    "text": OneColumnOfText,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "json": {"parse_agent_traces": False},  # which would replace the columns by others
    "text": {"sample_by": "document"},
    "tsv": {"sep": "\t"},
}


def read_files(
    reader: str, files: dict[str, list[str]], *, split: str, column: str, cache: Path, num_proc: int | None
) -> Dataset:
    """One column of the files of each split.

    Args:
        files: patterns by split.
        split: the expression of the splits that are wanted.
        cache: folder for the Arrow file that is made of them.

    Raises:
        what reading files raises.
    """
    builder = BUILDERS[reader](cache_dir=str(cache), data_files=files, **SETTINGS.get(reader, {}))
    builder.column = column
    builder.download_and_prepare(num_proc=num_proc)
    loaded = builder.as_dataset(split=split)
    assert isinstance(loaded, Dataset)
    return loaded


def first_fault(files: Sequence[Path], reader: str) -> str | None:
    """`FILE` or `FILE, line N: reason` of the first file that cannot be read; None if none shows it."""
    for path in files:
        fault = None if reader in ("parquet", "arrow") else first_faulty_line(path)
        if fault is not None:
            return fault
        try:
            stream = BUILDERS[reader](data_files=[glob.escape(str(path.absolute()))], **SETTINGS.get(reader, {}))
            stream.column = ""
            next(iter(stream.as_streaming_dataset(split="train")))
        except StopIteration:
            continue
        except Exception:  # whatever it is, the caller has the reason
            return str(path)
    return str(files[0]) if len(files) == 1 else None


def first_faulty_line(path: Path) -> str | None:
    """The first line of a text file that is not UTF-8, or that is no JSON in a file of JSON lines."""
    is_lines = any(suffix in LINES for suffix in path.suffixes)
    try:
        with uncompressed(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if is_lines and text.strip():
                        json.loads(text)
                except UnicodeDecodeError as error:
                    byte = line[error.start]
                    return f"{path}, line {number}: byte 0x{byte:02x} at column {error.start + 1} is not UTF-8"
                except ValueError as error:
                    return f"{path}, line {number}: {error}"
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        return f"{path}: {error}"
    return None


def uncompressed(path: Path) -> BinaryIO:
    """The bytes of a file, without its compression."""
    if path.suffix == ".zst":
        return cast("BinaryIO", io.BufferedReader(pa.input_stream(str(path), compression="zstd")))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opener = openers.get(path.suffix)
    return cast("BinaryIO", path.open("rb") if opener is None else opener(path, "rb"))
