"""Every token exactly once a pass, whatever the lengths, mixtures, numbers of processes and points of resuming."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relora.data.batches import IGNORED_LABEL, Samples, TokenStream, micro_batches
from relora.data.dataset import PreparedData, eval_batches
from relora.data.manifest import FileRecord, Manifest, SourceRecord, StreamRecord
from relora.data.mixture import Mixture, permuted, round_keys
from relora.data.split import document_pieces, documents_of, is_held_out

EOS = 0
PROPERTY = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Lengths of the documents of one source, EOS included.
SOURCE = st.lists(st.integers(1, 40), min_size=1, max_size=12)
WEIGHT = st.one_of(st.integers(1, 9), st.floats(1e-9, 1e9), st.sampled_from([1e-6, 1e-12, 1 / 3]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    (tmp_path_factory.mktemp("prepared") / "tokens").mkdir()
    return tmp_path_factory.getbasetemp()


def stream_of(folder, lengths, name, cuts):
    """The record of documents of these lengths whose ids, but for EOS, all differ; in two files of small batches."""
    ids = iter(range(1, 10_000))
    documents = [[*(next(ids) for _ in range(length - 1)), EOS] for length in lengths]
    files = []
    for number, part in enumerate((documents[:cuts], documents[cuts:])):
        if not part:
            continue
        path = folder / f"{name}-{number}.arrow"
        table = pa.table({"input_ids": pa.array(part, pa.list_(pa.uint16()))})
        with pa.ipc.new_stream(path, table.schema) as file:
            file.write_table(table, max_chunksize=3)
        tokens = sum(map(len, part))
        files.append(FileRecord(name=path.name, bytes=0, sha256="", documents=len(part), tokens=tokens))
    return StreamRecord(documents=len(documents), tokens=sum(lengths), files=tuple(files)), documents


@given(SOURCE, st.integers(2, 50), st.integers(0, 12))
@PROPERTY
def test_the_rows_of_a_stream_are_its_tokens_in_order(folder, lengths, sequence_length, cuts):
    record, documents = stream_of(folder, lengths, "rows", cuts)
    stream = TokenStream(folder, record, sequence_length)
    rows = [stream.row(number) for number in range(stream.num_rows)]
    assert np.concatenate([row.tokens for row in rows]).tolist() == [
        token for document in documents for token in document
    ]
    starts = [number * sequence_length + start for number, row in enumerate(rows) for start in row.starts.tolist()]
    assert starts == np.cumsum([0, *lengths[:-1]]).tolist()


def samples_of(folder, sources, weights, sequence_length, seed):
    streams, documents = [], []
    for number, lengths in enumerate(sources):
        record, texts = stream_of(folder, lengths, f"s{number}", len(lengths) // 2)
        streams.append(TokenStream(folder, record, sequence_length))
        documents.append(texts)
    mixture = Mixture.of(tuple(map(float, weights)))
    return Samples(streams, mixture, seed=seed, eos_id=EOS, document_mask=False), documents


@st.composite
def mixtures(draw):
    sources = draw(st.lists(SOURCE, min_size=1, max_size=4))
    weights = draw(st.lists(WEIGHT, min_size=len(sources), max_size=len(sources)))
    return sources, weights


@given(mixtures(), st.integers(2, 30), st.integers(0, 2**40), st.integers(0, 3))
@PROPERTY
def test_a_pass_over_a_source_reads_every_token_once(folder, mixture, sequence_length, seed, passed):
    """The first and later passes, found in the order of the samples."""
    sources, weights = mixture
    samples, documents = samples_of(folder, sources, weights, sequence_length, seed)
    heaviest = int(np.argmax(weights))
    rows = samples.streams[heaviest].num_rows
    found, counts = [], range(passed * rows, (passed + 1) * rows)
    i = max(0, int(passed * rows) - 1)
    while len(found) < rows:
        source, count = samples.mixture.locate(i)
        if source == heaviest and count in counts:
            labels = samples[i]["labels"]
            found.append(labels[labels != IGNORED_LABEL].tolist())
        i += 1
    tokens = Counter(token for row in found for token in row)
    assert tokens == Counter(token for document in documents[heaviest] for token in document)


@given(
    mixtures(),
    st.integers(0, 2**40),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 6),
)
@PROPERTY
def test_processes_and_resumes_read_what_one_uninterrupted_process_reads(folder, mixture, seed, before, after, resume):
    """(processes, batch size) before and after a resume, which may fall anywhere."""
    samples, _ = samples_of(folder, *mixture, 8, seed)
    total = 36  # samples an update, divisible by every pair

    def read(first_update, num_updates, num_processes, batch_size):
        batches = [
            micro_batches(
                samples,
                start=first_update * total,
                global_batch_size=total,
                per_device_batch_size=batch_size,
                process_index=process,
                num_processes=num_processes,
                num_workers=0,
            )
            for process in range(num_processes)
        ]
        for _ in range(num_updates):
            update = [next(process) for process in batches]
            for micro in zip(*update, strict=True):
                yield from (row.tolist() for batch in micro for row in batch["input_ids"])

    expected = [samples[i]["input_ids"].tolist() for i in range(total * (resume % 2 + 1))]
    first = resume % 2
    assert [*read(0, first, *before), *read(first, 1, *after)] == expected


@given(st.lists(WEIGHT, min_size=1, max_size=9), st.integers(0, 2**50))
@PROPERTY
def test_quotas_hold_at_any_sample(weights, i):
    mixture = Mixture.of(tuple(map(float, weights)))
    period, counts = sum(mixture.units), mixture.counts(i)
    assert sum(counts) == i
    assert mixture.bound == 1 or (len(weights) > 4 and mixture.bound < 2)
    assert all(abs(c * period - i * u) <= mixture.bound * period for c, u in zip(counts, mixture.units, strict=True))
    source, count = mixture.locate(i)
    after = mixture.counts(i + 1)
    assert count == counts[source] and after == [c + (k == source) for k, c in enumerate(counts)]


@given(st.integers(1, 3000), st.integers(0, 2**62))
@PROPERTY
def test_the_order_of_a_pass_is_a_permutation(n, seed):
    keys = round_keys(seed, 0, seed % 7)
    assert sorted(permuted(index, n, keys) for index in range(n)) == list(range(n))


@given(SOURCE, SOURCE, st.integers(2, 20), st.integers(1, 4), st.integers(1, 5))
@PROPERTY
def test_every_held_out_token_is_evaluated_once(folder, config, one, two, sequence_length, num_processes, batch_size):
    sides = [stream_of(folder, lengths, f"e{number}", 3) for number, lengths in enumerate((one, two))]
    sources = [
        SourceRecord.model_construct(spec={}, train=record, eval=record, skipped_nulls=0, skipped_empty=0)
        for record, _ in sides
    ]
    manifest = Manifest.model_construct(sources=tuple(sources), eos_token_id=EOS, vocab_size=10_000)
    data = config("a", "b", sequence_length=sequence_length, eval_tokens=10**6)
    batches = [
        list(
            eval_batches(
                PreparedData(folder, manifest),
                data,
                batch_size=batch_size,
                process_index=p,
                num_processes=num_processes,
            )
        )
        for p in range(num_processes)
    ]
    assert len({len(process) for process in batches}) == 1
    labels = [batch["labels"] for process in batches for batch in process]
    found = Counter(token for part in labels for token in part[part != IGNORED_LABEL].tolist())
    assert found == Counter(token for _, documents in sides for document in documents for token in document)


@given(
    st.lists(st.one_of(st.none(), st.text("ab \né", max_size=200)), max_size=8),
    st.integers(1, 60),
    st.floats(0.01, 0.99),
)
@PROPERTY
def test_sections_of_texts_lose_nothing_and_are_on_one_side(texts, most, fraction):
    sections = documents_of(texts, most)
    assert "".join(sections) == "".join(text or "" for text in texts) and all(0 < len(s) <= most for s in sections)
    assert documents_of(texts, None) == [text for text in texts if text]
    assert all("".join(document_pieces(text, most)) == text for text in texts if text)
    for section in sections:
        # Held out at one fraction is held out at any larger one: held-out sets are nested.
        assert not is_held_out(section, fraction) or is_held_out(section, min(1.0, fraction * 1.5))
