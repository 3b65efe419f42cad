import pickle

import numpy as np
import pytest

from relora.data import batches as tokens_module
from relora.data import tokenize as writing
from relora.data.batches import TokenStream


@pytest.fixture
def prepared(two_sources, prepared_of, monkeypatch):
    """Many small files of many record batches."""
    monkeypatch.setattr(writing, "PIECE_BYTES", 1500)
    monkeypatch.setattr(writing, "BATCH_BYTES", 400)
    return prepared_of(two_sources())


def whole(record, folder):
    """All tokens of a stream in one row."""
    row = TokenStream(folder, record, record.tokens).row(0)
    return row.tokens, row.starts


@pytest.mark.parametrize("length", [2, 7, 32, 500, 10**6])
def test_rows_hold_every_token_once_across_all_borders(prepared, length):
    eos = prepared.manifest.eos_token_id
    for record, stream in zip(prepared.records("train"), prepared.streams("train", length), strict=True):
        assert len(record.files) > 3
        rows = [stream.row(r) for r in range(stream.num_rows)]
        assert [len(row.tokens) for row in rows[:-1]] == [length] * (stream.num_rows - 1)
        tokens = np.concatenate([row.tokens for row in rows])
        starts = np.concatenate([row.starts + r * length for r, row in enumerate(rows)])
        assert len(tokens) == record.tokens
        # A document begins where one ended: the borders come from the offsets, EOS from the tokens.
        assert starts.tolist() == [0, *(np.flatnonzero(tokens == eos)[:-1] + 1)] and len(starts) == record.documents
        whole_tokens, whole_starts = whole(record, prepared.folder)
        assert np.array_equal(tokens, whole_tokens) and np.array_equal(starts, whole_starts)
        with pytest.raises(IndexError, match=f"row {stream.num_rows} of {stream.num_rows}"):
            stream.row(stream.num_rows)


def test_files_open_lazily_and_not_too_many_stay_open(prepared, monkeypatch):
    monkeypatch.setattr(tokens_module, "MAX_OPEN_FILES", 2)
    stream = prepared.streams("train", 32)[0]
    assert not stream._open
    stream.row(0)
    assert len(stream._open) == 1
    for r in range(stream.num_rows):
        stream.row(r)
        assert len(stream._open) <= 2


def test_pickle_leaves_the_open_files_behind(prepared):
    stream = prepared.streams("train", 32)[0]
    expected = stream.row(3).tokens
    copy: TokenStream = pickle.loads(pickle.dumps(stream))
    assert not copy._open and np.array_equal(copy.row(3).tokens, expected)
    assert len(pickle.dumps(stream)) < 20_000
