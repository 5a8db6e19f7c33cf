"""Batches of a data loader are cut to any size, in the shapes that loaders give, and resumed where they were."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from trainpilot.agents.steering.loader_batches import LoaderBatches, batches, first_sequences

ROWS = torch.arange(12).reshape(4, 3)


class Pair(NamedTuple):
    """A batch of two tensors."""

    text: torch.Tensor
    labels: torch.Tensor


class Encoding(UserDict[str, Any]):
    """A batch with attributes, as tokenizers make it."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


def test_a_tensor_is_cut_by_its_rows() -> None:
    assert first_sequences(ROWS, 2, of=4).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("count", [0, 4, 9])
def test_what_is_no_part_of_the_batch_leaves_it_whole(count: int) -> None:
    assert first_sequences(ROWS, count, of=4) is ROWS


def test_dictionaries_keep_their_class_and_single_numbers() -> None:
    batch = Encoding({"input_ids": ROWS, "temperature": torch.tensor(0.5), "epoch": 3, "mask": None})
    few = first_sequences(batch, 1, of=4)
    assert isinstance(few, Encoding)
    assert few.input_ids.tolist() == [[0, 1, 2]]
    assert (float(few["temperature"]), few["epoch"], few["mask"]) == (0.5, 3, None)
    assert len(batch["input_ids"]) == 4, "the batch itself stays"


def test_nested_batches_are_cut_through() -> None:
    few = first_sequences([{"a": ROWS}, (ROWS, Pair(ROWS, ROWS))], 3, of=4)
    assert isinstance(few[1][1], Pair)
    assert [len(few[0]["a"]), len(few[1][0]), len(few[1][1].text), len(few[1][1].labels)] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": ROWS, "position_ids": torch.zeros(3, 4, 3)},
        {"input_ids": ROWS, "position_ids": torch.zeros(4, 4, 3, dtype=torch.int64)},
        {"input_ids": ROWS, "texts": ["one", "two", "three", "four"]},
        {"input_ids": ROWS.reshape(1, 12), "cu_seq_lens_q": torch.tensor([0, 3, 6, 9, 12])},
        [torch.zeros(2), torch.zeros(3), torch.zeros(1), torch.zeros(5)],
        object(),
    ],
    ids=["other rows", "as many parts as rows", "words", "laid into one row", "ragged", "unknown"],
)
def test_batches_whose_rows_cannot_be_told_stay_whole(batch: Any) -> None:
    assert first_sequences(batch, 2, of=4) is batch


# A stream of a data loader ----------------------------------------------------------------------------------------


def loader(n: int, size: int, **options: Any) -> DataLoader[Any]:
    data: Any = [{"input_ids": torch.tensor([i, i]), "name": str(i)} for i in range(n)]
    return DataLoader(data, size, **options)


def numbers(parts: list[Any]) -> list[int]:
    return [int(row[0]) for part in parts for row in part["input_ids"]]


def test_a_stream_is_cut_to_any_size_in_the_loader_s_order() -> None:
    data = batches(loader(5, 2))
    parts = data.take(3)
    assert [len(part["input_ids"]) for part in parts] == [2, 1]
    assert [part["name"] for part in parts] == [["0", "1"], ["2"]]
    assert numbers(data.take(1)) == [3]
    assert numbers(data.take(7)) == [4, 0, 1, 2, 3, 4, 0], "an epoch's end cuts no step short"


def test_a_stream_counts_its_epochs() -> None:
    data = batches(loader(8, 4))
    assert data.epochs_seen == 0.0
    data.take(1)
    assert data.epochs_seen == 0.125
    data.take(1)
    assert data.epochs_seen == 0.25
    data.take(18)
    assert data.epochs_seen == 2.5


def test_without_a_length_the_first_epoch_is_unknown() -> None:
    class Endless(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter(torch.arange(6))

    data = batches(DataLoader(Endless(), 2))
    data.take(5)
    assert data.epochs_seen is None
    data.take(4)
    assert data.epochs_seen == 1.5


@pytest.mark.parametrize("own", [False, True], ids=["torch's random numbers", "a generator of its own"])
@pytest.mark.parametrize("taken", [0, 3, 7, 10, 23])
def test_a_shuffled_stream_goes_on_where_it_was_saved(own: bool, taken: int) -> None:
    def make() -> LoaderBatches:
        generator = torch.Generator().manual_seed(5) if own else None
        return batches(loader(10, 4, shuffle=True, generator=generator))

    torch.manual_seed(1)
    data = make()
    if taken:
        data.take(taken)
    state = data.state_dict()
    random = torch.get_rng_state()
    expected = [numbers(data.take(n)) for n in (1, 5, 13)]
    for other in (make(), data):
        other.load_state_dict(state)
        torch.set_rng_state(random)
        assert [numbers(other.take(n)) for n in (1, 5, 13)] == expected


def test_tuples_and_plain_tensors_are_cut_too() -> None:
    pairs = DataLoader(TensorDataset(torch.arange(6), torch.arange(6) * 10), 4)
    first, second = batches(pairs).take(5)
    assert [each.tolist() for each in first] == [[0, 1, 2, 3], [0, 10, 20, 30]]
    assert [each.tolist() for each in second] == [[4], [40]]
    assert [part.tolist() for part in batches([torch.arange(3)]).take(2)] == [[0, 1]]


def test_samplers_of_several_processes_are_told_the_epoch() -> None:
    places: Any = range(8)
    sampler: DistributedSampler[Any] = DistributedSampler(places, num_replicas=2, rank=0, shuffle=True)
    data = batches(loader(8, 2, sampler=sampler))
    orders = [numbers(data.take(4)) for _ in range(3)]
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    assert orders == expected


def test_what_cannot_be_cut_or_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="sequences must be at least 1, got 0"):
        batches(loader(2, 2)).take(0)
    with pytest.raises(
        ValueError, match=r"must not be empty, and must begin anew .* got no batch from list in epoch 0"
    ):
        batches([]).take(1)
    with pytest.raises(ValueError, match="begin anew with every iterator, got no batch from list_iterator in epoch 1"):
        batches(iter([ROWS])).take(9)
    with pytest.raises(ValueError, match="one row for each of its 4 sequences in every tensor, got 3 rows"):
        batches([{"input_ids": ROWS, "pixels": torch.ones(3, 2)}]).take(1)
    with pytest.raises(ValueError, match="a batch must hold a tensor with a row for each sequence, got str"):
        batches(["words"]).take(1)
