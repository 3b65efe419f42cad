"""The sections of the configuration that say what goes into a run: the model to begin with, and the data."""

from typing import Annotated, Any, Literal

from pydantic import Field

from relora.config.field_types import HOW, SINCE_0_2, Count, CountFromZero, Name, Pair, PathName, Section


class ModelSection(Section):
    config: PathName | dict[str, Any] | None = Field(
        None, description="from scratch: a Hugging Face config, as a JSON file or an inline mapping"
    )
    name_or_path: PathName | None = Field(None, description="continual training: a hub id or a folder")
    revision: Name | None = Field(None, description="branch, tag or commit of name_or_path on the hub")
    trust_remote_code: bool = Field(False, description="run model code that comes with name_or_path")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = Field(
        "sdpa", description="attention kernel, as in transformers", json_schema_extra=HOW
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass", json_schema_extra=HOW
    )
    torch_compile: bool = Field(False, description="compile the model with torch.compile", json_schema_extra=HOW)
    liger_kernel: bool = Field(
        False,
        description="fused norms, rotary embeddings and gated units of liger-kernel (a GPU; `relora[liger]`)",
        json_schema_extra=HOW,
    )


class SourceSection(Section):
    path: PathName = Field(
        description="hub id, folder, file or glob (parquet, arrow, json, jsonl, csv, tsv, text; compressed too), "
        "python-stdlib, or module:attribute of a `relora.data.sources.Source`"
    )
    name: Name | None = Field(None, description="configuration of a hub dataset")
    split: Name = Field("train", description="split of the dataset, as in datasets.load_dataset")
    revision: Name | None = Field(None, description="branch, tag or commit on the hub")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="share of the samples, relative to the others")


class DataSection(Section):
    sources: Annotated[tuple[SourceSection, ...], Field(min_length=1, strict=False)] = Field(
        (SourceSection(path="python-stdlib"),), description="the datasets of texts, mixed by weight"
    )
    text_field: Name = Field("text", description="the column that holds the text")
    tokenizer: PathName | None = Field(
        None,
        description="hub id or folder; null: name_or_path's own, else a byte-level BPE trained on the sources",
    )
    add_bos: Literal["auto"] | bool = Field(
        "auto",
        description="begin every document, and every prompt, with BOS; auto: as the tokenizer's template does",
        json_schema_extra=SINCE_0_2 | {"as_before": [False]},
    )
    document_characters: Annotated[int, Field(ge=16)] | None = Field(
        None,
        description="for a few long texts: cut them, at line breaks where there are any, into documents of at most so "
        "many characters, each of which is held out or not; null: a text is one document",
        json_schema_extra=SINCE_0_2,
    )
    sequence_length: Annotated[int, Field(ge=2)] = Field(512, description="tokens per sample")
    prepared_dir: PathName | None = Field(
        None,
        description="folder of the tokens; null: a cache folder named by a hash of their sources and tokenizer",
        json_schema_extra=HOW,
    )
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, description="fraction of the documents that is held out, chosen by a hash of their text"
    )
    eval_tokens: Annotated[int, Field(ge=2)] = Field(
        1_000_000, description="number of held-out tokens to evaluate on, at most"
    )
    document_mask: bool = Field(
        False, description="mask attention between the documents of a sample; positions restart in each"
    )
    skip: Annotated[tuple[Pair, ...], Field(strict=False)] = Field(
        (),
        description="training samples to leave out, as pairs [first, end]: those of the indices first <= i < end; the "
        "line of a spike in the metrics has the indices of its batch",
        json_schema_extra=SINCE_0_2,
    )
    num_proc: Count | None = Field(
        None, description="processes that prepare the data; null: one per core", json_schema_extra=HOW
    )
    num_workers: CountFromZero = Field(
        2,
        description="reader processes per training process, which load batches ahead; 0: none",
        json_schema_extra=HOW,
    )
