import math
import time

import numpy as np
import pytest

from trainpilot.llm_runtime.data.batches import BatchStream, fixed_batch

# Ids 0 to 10 with T = 3: windows 0-3, 3-6, 6-9; id 10 is the remainder.
ELEVEN = np.arange(11, dtype=np.uint8)
WINDOWS = [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def stream(n_sequences=50, seed=3):
    """Sequences of T = 2 which start with the even numbers."""
    return BatchStream(np.arange(2 * n_sequences + 1, dtype=np.uint16), 2, seed)


def test_windows_worked_by_hand():
    batches = BatchStream(ELEVEN, sequence_length=3, seed=0)
    assert batches.n_sequences == 3
    batch = batches.take(3)
    assert batch.dtype == np.int64
    assert batch.shape == (3, 4)
    assert sorted(batch.tolist()) == WINDOWS


def test_order_is_the_permutation_of_seed_and_epoch():
    expected = [WINDOWS[i] for epoch in range(3) for i in np.random.default_rng([7, epoch]).permutation(3)]
    assert BatchStream(ELEVEN, 3, seed=7).take(9).tolist() == expected


@pytest.mark.parametrize(("n_tokens", "n_sequences"), [(4, 1), (6, 1), (7, 2), (9, 2), (10, 3), (11, 3)])
def test_number_of_sequences(n_tokens, n_sequences):
    # Targets are all tokens but the first: (n_tokens - 1) // 3.
    assert BatchStream(ELEVEN[:n_tokens], 3, seed=0).n_sequences == n_sequences


def test_every_sequence_once_per_epoch():
    batches = stream()
    orders = [batches.take(50)[:, 0].tolist() for _ in range(4)]
    assert all(sorted(order) == list(range(0, 100, 2)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_every_id_but_the_first_is_a_target_once_per_epoch():
    targets = stream().take(50)[:, 1:]
    assert sorted(targets.ravel().tolist()) == list(range(1, 101))


@pytest.mark.parametrize("sizes", [[1] * 170, [7] * 24 + [2], [50, 50, 50, 20], [120, 50], [3, 64, 1, 99, 3]])
def test_order_does_not_depend_on_batch_sizes(sizes):
    batches = stream()
    parts = np.concatenate([batches.take(n) for n in sizes])
    assert np.array_equal(parts, stream().take(170))
    assert batches.state_dict() == {"position": 170}


def test_peek_does_not_move():
    batches = stream()
    batches.take(45)
    ahead = batches.peek(130)
    assert np.array_equal(batches.peek(3), ahead[:3])
    assert batches.state_dict() == {"position": 45}
    assert np.array_equal(np.concatenate([batches.take(20), batches.take(110)]), ahead)


def test_resumed_equals_uninterrupted():
    whole, first, second = stream(), stream(), stream()
    whole.take(77)
    first.take(77)
    second.load_state_dict(first.state_dict())
    assert np.array_equal(second.take(64), whole.take(64))
    assert second.epochs_seen == whole.epochs_seen == 141 / 50


def test_going_back_gives_the_same_sequences():
    batches = stream()
    start = batches.state_dict()
    first = batches.take(160)
    batches.load_state_dict(start)
    assert np.array_equal(batches.take(160), first)


def test_epochs_seen():
    batches = stream()
    assert batches.epochs_seen == 0
    batches.take(25)
    assert batches.epochs_seen == 0.5
    batches.take(100)
    assert batches.epochs_seen == 2.5


def test_seeds_differ_and_repeat():
    assert np.array_equal(stream(seed=1).take(50), stream(seed=1).take(50))
    assert not np.array_equal(stream(seed=1).take(50), stream(seed=2).take(50))


def test_memory_map_gives_the_same_plain_arrays(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(101, dtype=np.uint16))
    mapped = np.load(tmp_path / "ids.npy", mmap_mode="r")
    batch = BatchStream(mapped, 2, seed=3).take(60)
    assert type(batch) is np.ndarray
    assert batch.flags.writeable
    assert np.array_equal(batch, stream().take(60))


def test_few_permutations_are_kept():
    batches = stream()
    batches.take(1000)
    batches.peek(120)
    batches.take(1)
    assert len(batches._orders) <= 3


def test_take_is_fast():
    batches = BatchStream(np.zeros(2_000_000, dtype=np.uint16), 256, seed=0)
    batches.take(1)
    durations = []
    for _ in range(20):
        start = time.perf_counter()
        batches.take(64)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 2e-3


def test_fixed_batch_worked_by_hand():
    # Eleven ids leave starts 0 to 7 for T = 3; three of them: 0, 7 // 2 = 3, 7.
    assert fixed_batch(ELEVEN, 3, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [7, 8, 9, 10]]
    assert fixed_batch(ELEVEN, 3, 1).tolist() == [[0, 1, 2, 3]]
    assert fixed_batch(ELEVEN, 10, 2).tolist() == [list(range(11))] * 2


def test_fixed_batch_is_evenly_spaced_from_end_to_end():
    starts = fixed_batch(np.arange(100_000, dtype=np.uint32), 64, 37)[:, 0]
    assert starts[0] == 0
    assert starts[-1] == 100_000 - 65
    assert set(np.diff(starts).tolist()) <= {math.floor(99_935 / 36), math.ceil(99_935 / 36)}
    assert fixed_batch(ELEVEN, 3, 3).dtype == np.int64


@pytest.mark.parametrize("sequence_length", [0, -1, 11, 500])
def test_sequence_length_out_of_range(sequence_length):
    expected = (
        r"sequence_length must be at least 1 and below the 11 tokens of the split, "
        rf"got {sequence_length}; use shorter sequences or more text"
    )
    with pytest.raises(ValueError, match=expected):
        BatchStream(ELEVEN, sequence_length, seed=0)
    with pytest.raises(ValueError, match=expected):
        fixed_batch(ELEVEN, sequence_length, 1)


@pytest.mark.parametrize("n", [0, -4])
def test_number_of_sequences_out_of_range(n):
    with pytest.raises(ValueError, match=f"n must be at least 1 sequence, got {n}"):
        stream().take(n)
    with pytest.raises(ValueError, match=f"n must be at least 1 sequence, got {n}"):
        stream().peek(n)
    with pytest.raises(ValueError, match=f"n_sequences must be at least 1, got {n}"):
        fixed_batch(ELEVEN, 3, n)


def test_seed_out_of_range():
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        BatchStream(ELEVEN, 3, seed=-1)


@pytest.mark.parametrize("state", [{}, {"position": -1}])
def test_state_without_a_position(state):
    with pytest.raises(ValueError, match="state must hold a position >= 0, got"):
        stream().load_state_dict(state)
