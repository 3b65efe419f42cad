import itertools
import multiprocessing
import pickle
import time

import numpy as np
import pytest
import torch

from relora.data import eval_batches, micro_batches
from relora.data.batches import NO_TOKENS, Row, disjoint, index_of, make_batch


@pytest.fixture
def samples(prepared, data):
    return prepared.samples(data, 7)


def updates(samples, n, *, start=0, batch=16, device=4, process_index=0, world=1, workers=0):
    iterator = micro_batches(
        samples, start=start, global_batch_size=batch, per_device_batch_size=device,
        process_index=process_index, num_processes=world, num_workers=workers,
    )  # fmt: skip
    taken = list(itertools.islice(iterator, n))
    iterator.close()
    return taken


def joined(updates_of_ranks):
    """The global batch of each update, micro-batches of the ranks in turn."""
    return [
        torch.cat([batch["input_ids"] for micro in zip(*ranks, strict=True) for batch in micro])
        for ranks in zip(*updates_of_ranks, strict=True)
    ]


def test_each_pass_reads_every_token_of_a_source_once(samples):
    """Also the tail; and in the ratio of the weights meanwhile."""
    rows = [stream.num_rows for stream in samples.streams]
    seen = {0: [], 1: []}
    i = 0
    while any(len(seen[k]) < 2 * rows[k] for k in seen):
        source, row = samples.locate(i)
        seen[source].append((row, samples[i]))
        i += 1
    for source, stream in enumerate(samples.streams):
        for passed in (0, 1):
            read = seen[source][passed * rows[source] : (passed + 1) * rows[source]]
            by_row = sorted(read, key=lambda entry: entry[0])
            assert [row for row, _ in by_row] == list(range(rows[source]))
            labels = torch.cat([sample["labels"] for _, sample in by_row])
            expected = np.concatenate([stream.row(r).tokens for r in range(stream.num_rows)])
            assert stream.num_tokens % stream.sequence_length  # there is a tail
            assert labels[: len(expected)].tolist() == expected.tolist() and (labels[len(expected) :] == -100).all()
            ids = torch.cat([sample["input_ids"] for _, sample in by_row])
            assert (ids[len(expected) :] == samples.eos_id).all() and torch.equal(
                ids[: len(expected)], labels[: len(expected)]
            )
    first = [samples.locate(i)[0] for i in range(400)]
    assert first.count(0) == 300
    assert samples.passes(400) == [300 / rows[0], 100 / rows[1]]


RANGES = [(40, 55), (3, 7), (50, 60), (7, 9), (0, 1), (200, 10**9)]


def test_what_is_left_out_never_comes_and_all_else_in_its_order(prepared, data, samples):
    kept = [i for i in range(200) if not any(first <= i < end for first, end in RANGES)]
    assert [index_of(i, disjoint(RANGES)) for i in range(len(kept))] == kept
    assert index_of(len(kept), disjoint(RANGES)) == 10**9
    assert disjoint([]) == () and index_of(17, ()) == 17
    fewer = prepared.samples(data.model_copy(update={"skip": ((3, 7),)}), 7, left_out=RANGES)
    assert [fewer.locate(i) for i in range(len(kept))] == [samples.locate(i) for i in kept]
    taken = [fewer.locate(i)[0] for i in range(150)]
    assert fewer.passes(150) == [taken.count(k) / stream.num_rows for k, stream in enumerate(samples.streams)]


def test_samples_are_int64_vectors_and_a_pure_function_of_the_position(prepared, data, samples):
    for i in (0, 5, 10**9):
        again = prepared.samples(data, 7)[i]
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in again.items()} == {
            "input_ids": (torch.int64, (32,)),
            "labels": (torch.int64, (32,)),
        }
        assert torch.equal(again["input_ids"], samples[i]["input_ids"])
        assert torch.equal(pickle.loads(pickle.dumps(samples))[i]["input_ids"], again["input_ids"])
    other_seed = prepared.samples(data, 8)
    assert any(not torch.equal(other_seed[i]["input_ids"], samples[i]["input_ids"]) for i in range(5))


@pytest.mark.parametrize(("world", "device"), [(1, 2), (2, 4), (2, 8), (4, 4), (16, 1)])
def test_batches_do_not_depend_on_the_world_size(samples, world, device):
    alone = joined([updates(samples, 3, device=16)])
    together = joined([updates(samples, 3, device=device, process_index=rank, world=world) for rank in range(world)])
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    expected = torch.stack([samples[i]["input_ids"] for i in range(16, 32)])
    assert torch.equal(alone[1], expected)


def test_micro_batches_are_where_the_contract_puts_them(samples):
    (update,) = updates(samples, 1, start=100, batch=16, device=2, process_index=1, world=2)
    assert len(update) == 4
    for m, batch in enumerate(update):
        first = 100 + (m * 2 + 1) * 2
        assert torch.equal(batch["input_ids"], torch.stack([samples[first + i]["input_ids"] for i in range(2)]))


def test_a_start_in_the_middle_goes_on_as_if_never_stopped(samples):
    through = updates(samples, 6)
    assert all(
        torch.equal(a["labels"], b["labels"])
        for update, resumed in zip(through[4:], updates(samples, 2, start=64), strict=True)
        for a, b in zip(update, resumed, strict=True)
    )


def test_workers_change_nothing_and_end_with_the_iterator(samples):
    state = torch.get_rng_state()
    plain = updates(samples, 5)
    read_ahead = updates(samples, 5, workers=2)
    assert all(
        torch.equal(a[name], b[name])
        for update, ahead in zip(plain, read_ahead, strict=True)
        for a, b in zip(update, ahead, strict=True)
        for name in a
    )
    assert torch.equal(state, torch.get_rng_state())
    iterator = micro_batches(
        samples, start=0, global_batch_size=4, per_device_batch_size=4, process_index=0, num_processes=1, num_workers=2
    )
    next(iterator)
    assert len(multiprocessing.active_children()) == 2
    del iterator
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_a_batch_that_does_not_divide_is_refused_at_once(samples):
    with pytest.raises(ValueError, match="16 is no multiple of per_device_batch_size 3 x 2 processes"):
        micro_batches(
            samples,
            start=0,
            global_batch_size=16,
            per_device_batch_size=3,
            process_index=0,
            num_processes=2,
            num_workers=0,
        )


def test_document_mask_by_hand():
    rows = [
        Row(np.array([5, 6, 0, 7, 8, 0]), np.array([3])),  # begins within a document
        Row(np.array([9, 0, 4]), np.array([0, 2])),  # a tail
        NO_TOKENS,
    ]
    batch = make_batch(rows, 6, eos_id=0, document_mask=True)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 0, 7, 8, 0], [9, 0, 4, 0, 0, 0], [0] * 6],
        "labels": [[5, 6, 0, -100, 8, 0], [-100, 0, -100, -100, -100, -100], [-100] * 6],
        "position_ids": [[0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]],
        "document_ids": [[0, 0, 0, 1, 1, 1], [0, 0, 1, 2, 2, 2], [0] * 6],
    }
    assert set(make_batch(rows, 6, eos_id=0, document_mask=False)) == {"input_ids", "labels"}


def test_document_mask_of_real_rows(two_sources, prepared):
    masked = prepared.samples(two_sources(document_mask=True, sequence_length=128), 7)
    plain = prepared.samples(two_sources(sequence_length=128), 7)
    several = 0
    for i in range(200):
        a, b = masked[i], plain[i]
        assert torch.equal(a["input_ids"], b["input_ids"])
        changes = a["document_ids"].diff() == 1
        several += int(changes.sum() > 1)
        assert ((a["document_ids"].diff() == 0) | changes).all() and a["document_ids"][0] == 0
        assert torch.equal(a["position_ids"][1:], torch.where(changes, 0, a["position_ids"][:-1] + 1))
        hidden = torch.cat([torch.tensor([False]), changes])
        assert (a["labels"][hidden] == -100).all() and torch.equal(a["labels"][~hidden][1:], b["labels"][~hidden][1:])
        assert (a["input_ids"][:-1][changes] == masked.eos_id).all()
    assert several > 20


def backwards(rows, sequence_length, *, eos_id, document_mask):
    """A task's own way to make a batch: labels are the tokens in reverse."""
    batch = make_batch(rows, sequence_length, eos_id=eos_id, document_mask=document_mask)
    return batch | {"labels": batch["input_ids"].flip(1)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_task_may_make_its_own_batches(prepared, data, workers):
    samples = prepared.samples(data, 7, make_batch=backwards)
    plain = updates(prepared.samples(data, 7), 2)
    own = updates(samples, 2, workers=workers)
    evaluated = list(eval_batches(prepared, data, batch_size=4, make_batch=backwards))
    assert torch.equal(samples[3]["labels"], samples[3]["input_ids"].flip(0))
    for batch, other in zip(itertools.chain(*own), itertools.chain(*plain), strict=True):
        assert torch.equal(batch["input_ids"], other["input_ids"])
    for batch in [*itertools.chain(*own), *evaluated]:
        assert torch.equal(batch["labels"], batch["input_ids"].flip(1)) and len(evaluated) > 1
