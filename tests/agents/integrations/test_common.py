"""The first sequences of a batch, in the shapes that data loaders give."""

from __future__ import annotations

from collections import UserDict
from typing import Any, NamedTuple

import pytest
import torch

from trainpilot.agents.integrations.common import first_sequences

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
