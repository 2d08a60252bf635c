"""Any dataset of (x, label) pairs as a class table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from metafast.data import from_dataset


def test_tensor_dataset_groups_by_label() -> None:
    x = torch.arange(12.0).view(6, 2)
    table = from_dataset(TensorDataset(x, torch.tensor([3, 1, 3, 1, 1, 3])))
    assert table.names == ("3", "1")
    assert torch.equal(table.of(0), x[[0, 2, 5]])
    assert torch.equal(table.of(1), x[[1, 3, 4]])
    assert table.sample(4, 2, 1, 2, torch.Generator().manual_seed(0)).query_x.shape == (4, 4, 2)


def test_map_style_without_iteration() -> None:
    class Squares(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            return np.full(3, index**2, np.float64), ("low", "high")[index > 1]  # endless: len must decide

    table = from_dataset(Squares())
    assert table.names == ("low", "high")
    assert table.items[:, 0].tolist() == [0, 1, 4, 9]
    assert table.items.dtype == torch.float64


def test_iterables_may_reuse_a_buffer() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            buffer = np.zeros(2, np.float32)
            shared = torch.zeros(2)
            for i in range(4):
                buffer[:] = i
                shared.fill_(i)
                yield (buffer if i % 2 else shared), i // 2

    assert from_dataset(Stream()).items[:, 0].tolist() == [0, 1, 2, 3]
    assert from_dataset((torch.zeros(1), k) for k in "aab").counts.tolist() == [2, 1]


def test_images() -> None:
    image = pytest.importorskip("PIL.Image")
    grey = image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    table = from_dataset([(grey, 0), (grey, 1)])
    assert table.items.shape == (2, 1, 2, 3)
    assert table.items[0].flatten().tolist() == list(range(6))
    colour = image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    items = from_dataset([(colour, 0)]).items
    assert items.shape == (1, 3, 2, 3)
    assert items[0, 1, 0].tolist() == [1, 4, 7]
    with pytest.raises(ValueError, match=r"^dataset\[0\]: expected an image of mode L or RGB, got RGBA"):
        from_dataset([(colour.convert("RGBA"), 0)])


def test_labels_of_one_value_are_one_class() -> None:
    labels = [torch.tensor(2), np.int64(2), 2, np.array(2)]
    assert from_dataset([(torch.zeros(1), label) for label in labels]).classes == 1
    assert from_dataset([(torch.zeros(1), ("a", 1)), (torch.zeros(1), ("a", 1))]).classes == 1


def test_read_only_arrays_are_fine() -> None:
    x = np.zeros(3)
    x.flags.writeable = False
    assert from_dataset([(x, 0)]).items.shape == (1, 3)


def test_min_items_leaves_rare_classes_out() -> None:
    data = [(torch.zeros(1), label) for label in "abbccc"]
    assert from_dataset(data).names == ("a", "b", "c")
    assert from_dataset(data, min_items=2).names == ("b", "c")
    with pytest.raises(ValueError, match=r"^min_items: expected at most 3"):
        from_dataset(data, min_items=4)
    with pytest.raises(TypeError, match=r"^min_items: "):
        from_dataset(data, min_items=True)


@pytest.mark.parametrize(
    ("error", "pattern", "dataset"),
    [
        (TypeError, "dataset: ", 5),
        (TypeError, "dataset: ", "text"),
        (TypeError, "dataset: ", {"a": 1}),
        (ValueError, "dataset: expected at least one", []),
        (TypeError, r"dataset\[0\]: expected a pair", [torch.zeros(2)]),
        (TypeError, r"dataset\[0\]: expected a pair", [(torch.zeros(2), 1, 2)]),
        (TypeError, r"dataset\[1\]: expected x as", [(torch.zeros(2), 1), ([0.0, 0.0], 1)]),
        (TypeError, r"dataset\[0\]: .*int32", [(torch.zeros(2, dtype=torch.int32), 1)]),
        (TypeError, r"dataset\[0\]: x is a numpy array of <U1", [(np.array(["a"]), 1)]),
        (ValueError, r"dataset\[1\]: .*shape", [(torch.zeros(2), 1), (torch.zeros(3), 1)]),
        (ValueError, r"dataset\[1\]: .*dtype", [(torch.zeros(2), 1), (torch.zeros(2).double(), 1)]),
        (ValueError, r"dataset\[0\]: expected finite", [(torch.tensor([float("nan")]), 1)]),
        (ValueError, r"dataset\[0\]: expected finite", [(torch.tensor([float("inf")]), 1)]),
        (TypeError, r"dataset\[0\]: .*hashable", [(torch.zeros(1), [1])]),
        (TypeError, r"dataset\[0\]: .*one value", [(torch.zeros(1), torch.zeros(2))]),
        (ValueError, r"dataset\[0\]: .*NaN", [(torch.zeros(1), float("nan"))]),
    ],
)
def test_refuses(error: type[Exception], pattern: str, dataset: Any) -> None:
    with pytest.raises(error, match=f"^{pattern}"):
        from_dataset(dataset)
