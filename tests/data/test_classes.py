"""Sampling from a class table: what an episode promises, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metafast.data import ClassTable
from metafast.data._classes import distinct


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(counts: list[int]) -> ClassTable:
    """Items that say what they are: 100 * class + position."""
    items = [100 * c + i for c, count in enumerate(counts) for i in range(count)]
    return ClassTable(torch.tensor(items), counts)


def test_distinct_is_uniform_over_ordered_draws() -> None:
    sizes = torch.tensor([3, 5]).repeat(40_000, 1)
    drawn = distinct(sizes, 3, seeded())
    for column, size in enumerate((3, 5)):
        codes = (drawn[:, column] * torch.tensor([25, 5, 1])).sum(-1)
        orders = [25 * a + 5 * b + c for a, b, c in itertools.permutations(range(size), 3)]
        counts = torch.bincount(codes, minlength=125)[orders].double()
        assert counts.sum() == 40_000  # nothing but distinct triples
        expected = 40_000 / len(orders)
        assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_distinct_draws_all_when_asked_for_all() -> None:
    drawn = distinct(torch.full((50, 2), 7), 7, seeded())
    assert torch.equal(drawn.sort(-1).values, torch.arange(7).expand(50, 2, 7))
    assert drawn.flatten(0, 1).unique(dim=0).shape[0] > 90  # in many orders


def test_distinct_stays_in_range_for_large_sizes() -> None:
    size = 10**12
    drawn = distinct(torch.full((1000,), size), 4, seeded())
    assert drawn.min() >= 0
    assert drawn.max() < size
    assert (drawn.max() - drawn.min()) > 0.9 * size


def test_episode_layout_with_unequal_classes() -> None:
    counts = [6, 9, 30, 7, 6, 11]
    e = numbered(counts).sample(tasks=40, ways=4, shots=2, queries=4, generator=seeded())
    assert e.support_x.shape == (40, 8)
    assert e.query_x.shape == (40, 16)
    assert e.support_y.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 40
    assert e.query_y.tolist() == [[0] * 4 + [1] * 4 + [2] * 4 + [3] * 4] * 40
    assert e.support_y.dtype == torch.int64
    for task in range(40):
        support = e.support_x[task].view(4, 2).tolist()
        query = e.query_x[task].view(4, 4).tolist()
        classes = []
        for s, q in zip(support, query, strict=True):
            (cls,) = {item // 100 for item in s + q}
            classes.append(cls)
            assert len(set(s + q)) == 6  # distinct, so the query shares nothing with the support
            assert max(item % 100 for item in s + q) < counts[cls]
        assert len(set(classes)) == 4


def test_every_item_is_drawn_equally_often_within_its_class() -> None:
    counts = [5, 3, 8]
    e = numbered(counts).sample(tasks=6000, ways=2, shots=1, queries=1, generator=seeded())
    for x in (e.support_x, e.query_x):
        values, seen = x.unique(return_counts=True)
        assert len(values) == sum(counts)
        for value, n in zip(values.tolist(), seen.tolist(), strict=True):
            expected = 6000 * 2 / 3 / counts[value // 100]
            assert abs(n - expected) < 5 * expected**0.5


def test_label_of_a_class_is_random() -> None:
    e = numbered([2] * 3).sample(tasks=3000, ways=3, shots=1, queries=1, generator=seeded())
    share = (e.support_x // 100 == 0).double().mean(0)
    assert ((share - 1 / 3).abs() < 0.05).all()


def test_same_seed_same_bits() -> None:
    table = ClassTable(torch.rand(40, 3), [10] * 4)
    first, again, other = (table.sample(8, 3, 2, 3, generator=seeded(s)) for s in (1, 1, 2))
    for name in ("support_x", "support_y", "query_x", "query_y"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.support_x, other.support_x)


def test_default_generator_is_torch_s() -> None:
    table = numbered([10] * 4)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = table.sample(8, 3, 2, 3)
        second = table.sample(8, 3, 2, 3)
        torch.manual_seed(3)
        again = table.sample(8, 3, 2, 3)
    assert torch.equal(first.query_x, again.query_x)
    assert not torch.equal(first.query_x, second.query_x)


def test_dtypes() -> None:
    bytes_ = ClassTable(torch.tensor([[0], [255], [51], [102]], dtype=torch.uint8), [2, 2])
    x = bytes_.sample(4, 2, 1, 1, seeded()).support_x
    assert x.dtype == torch.float32
    assert set(x.flatten().tolist()) <= set((torch.tensor([0, 255, 51, 102]) / 255).tolist())
    assert bytes_.sample(1, 2, 1, 1, seeded(), dtype=torch.float64).query_x.dtype == torch.float64
    floats = ClassTable(torch.rand(4, 2, dtype=torch.float64), [2, 2])
    assert floats.sample(1, 2, 1, 1, seeded()).query_x.dtype == torch.float32
    assert numbered([2, 2]).sample(1, 2, 1, 1, seeded()).query_x.dtype == torch.int64


def test_episodes_do_not_share_memory_with_the_table() -> None:
    table = ClassTable(torch.rand(4, 2), [2, 2])
    before = table.items.clone()
    table.sample(1, 2, 1, 1, seeded()).support_x.zero_()
    assert torch.equal(table.items, before)


class CountCalls(TorchDispatchMode):
    """Counts the tensor operations that run."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_work_is_vectorised_over_tasks_and_classes() -> None:
    def calls(tasks: int, classes: int) -> int:
        table = numbered([20] * classes)
        with CountCalls() as mode:
            table.sample(tasks, 5, 1, 15, seeded())
        return mode.calls

    assert calls(2, 6) == calls(64, 6) == calls(64, 200)


def test_of_returns_the_items_of_a_class() -> None:
    table = numbered([2, 3])
    assert table.of(1).tolist() == [100, 101, 102]
    with pytest.raises(IndexError, match="index"):
        table.of(2)
    with pytest.raises(TypeError, match="index"):
        table.of(True)


def test_to_moves_the_items() -> None:
    table = numbered([2, 3])
    moved = table.to("meta")
    assert moved.items.device.type == "meta"
    assert table.items.device.type == "cpu"
    with pytest.raises(ValueError, match="generator: expected one on meta"):
        moved.sample(1, 2, 1, 1, seeded())


@pytest.mark.parametrize(
    ("error", "pattern", "kwargs"),
    [
        (ValueError, r"ways: expected at most 3, .* got 4", {"ways": 4}),
        (ValueError, r"shots \+ queries: expected at most 4, .*'1'.* got 1 \+ 4", {"queries": 4}),
        (ValueError, "tasks: ", {"tasks": 0}),
        (ValueError, "ways: ", {"ways": -1}),
        (ValueError, "shots: ", {"shots": 0}),
        (ValueError, "queries: ", {"queries": 0}),
        (TypeError, "tasks: ", {"tasks": True}),
        (TypeError, "ways: ", {"ways": 2.0}),
        (TypeError, "shots: ", {"shots": "1"}),
        (TypeError, "queries: ", {"queries": None}),
        (TypeError, "generator: ", {"generator": 0}),
        (TypeError, "dtype: ", {"dtype": torch.int64}),
        (TypeError, "dtype: ", {"dtype": "float32"}),
    ],
)
def test_sample_refuses(error: type[Exception], pattern: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^{pattern}"):
        numbered([5, 4, 6]).sample(**{"tasks": 2, "ways": 2, "shots": 1, "queries": 1, **kwargs})


@pytest.mark.parametrize(
    ("error", "pattern", "items", "counts", "names"),
    [
        (TypeError, "items: ", [1.0, 2.0], [2], None),
        (TypeError, "items: .*int32", torch.zeros(2, dtype=torch.int32), [2], None),
        (ValueError, "items: expected 3 items", torch.zeros(2), [3], None),
        (ValueError, "items: expected finite", torch.tensor([0.0, float("nan")]), [2], None),
        (ValueError, "counts: ", torch.zeros(0), [], None),
        (ValueError, "counts: ", torch.zeros(2), [2, 0], None),
        (TypeError, "counts: ", torch.zeros(2), [2.0], None),
        (ValueError, "names: ", torch.zeros(2), [1, 1], ["a"]),
    ],
)
def test_table_refuses(error: type[Exception], pattern: str, items: Any, counts: Any, names: Any) -> None:
    with pytest.raises(error, match=f"^{pattern}"):
        ClassTable(items, counts, names)
