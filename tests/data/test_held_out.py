import math
from collections import Counter

import pytest

from relora.data import eval_batches, unigram_entropy
from relora.data.dataset import held_out_rows


def scored(batches):
    labels = [batch["labels"][:, 1:] for batch in batches]
    return [token for part in labels for token in part[part != -100].tolist()]


def rows_of(batches):
    return [tuple(row.tolist()) for batch in batches for row in batch["labels"] if (row != -100).any()]


def test_everything_is_read_if_eval_tokens_allow(two_sources, prepared):
    data = two_sources()
    streams = prepared.streams("eval", 32)
    expected = [tuple(s.row(r).tokens.tolist()) for s in streams for r in range(s.num_rows)]
    found = rows_of(eval_batches(prepared, data, batch_size=4))
    assert [tuple(x for x in row if x != -100) for row in found] == expected


@pytest.mark.parametrize("eval_tokens", [2, 32, 100, 320, 10**6])
def test_at_most_eval_tokens_by_weight(two_sources, prepared, eval_tokens):
    rows = held_out_rows(prepared, two_sources(eval_tokens=eval_tokens))
    assert 1 <= len(rows) <= max(1, eval_tokens // 32)
    if eval_tokens == 320:  # of ten rows, 3 : 1
        assert Counter(source for source, _ in rows) in ({0: 8, 1: 2}, {0: 7, 1: 3})
    assert rows == sorted(rows) and rows == held_out_rows(prepared, two_sources(eval_tokens=eval_tokens))


@pytest.mark.parametrize(("num_processes", "batch_size"), [(1, 1), (2, 3), (3, 4), (4, 16)])
def test_processes_divide_the_set_into_equally_many_batches(two_sources, prepared, num_processes, batch_size):
    data = two_sources(eval_tokens=7 * 32)
    whole = rows_of(eval_batches(prepared, data, batch_size=1))
    shares = [
        list(eval_batches(prepared, data, batch_size=batch_size, process_index=p, num_processes=num_processes))
        for p in range(num_processes)
    ]
    assert len({len(share) for share in shares}) == 1
    assert {tuple(batch["labels"].shape) for share in shares for batch in share} == {(batch_size, 32)}
    assert sorted(row for share in shares for row in rows_of(share)) == sorted(whole)


@pytest.mark.parametrize("document_mask", [False, True])
def test_unigram_entropy_is_of_the_scored_labels(two_sources, prepared, document_mask):
    data = two_sources(document_mask=document_mask, eval_tokens=320)
    counts = Counter(scored(eval_batches(prepared, data, batch_size=3)))
    total = sum(counts.values())
    expected = -sum(n / total * math.log(n / total) for n in counts.values())
    assert unigram_entropy(prepared, data, targets=lambda batch: batch["labels"][:, 1:]) == pytest.approx(
        expected, rel=1e-12
    )
    assert 2 < expected < math.log(300)
