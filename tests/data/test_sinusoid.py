"""The sinusoid tasks of the MAML paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from metafast.data import Sinusoid


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_points_lie_on_the_waves_of_the_paper() -> None:
    tasks = Sinusoid().sample_tasks(2000, seeded())
    assert tasks.amplitude.shape == tasks.phase.shape == (2000,)
    for values, low, high in ((tasks.amplitude, 0.1, 5.0), (tasks.phase, 0.0, math.pi)):
        assert values.min() >= low
        assert values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.05 * (high - low)
    e = tasks.episodes(4, 6, seeded(1), dtype=torch.float64)
    assert e.support_x.shape == e.support_y.shape == (2000, 4, 1)
    assert e.query_x.shape == e.query_y.shape == (2000, 6, 1)
    assert e.query_x.min() < -4.9
    assert e.query_x.max() > 4.9
    assert e.query_x.abs().max() <= 5
    a, p = tasks.amplitude.view(-1, 1, 1), tasks.phase.view(-1, 1, 1)
    torch.testing.assert_close(e.support_y, a * torch.sin(e.support_x - p), rtol=0, atol=1e-12)
    torch.testing.assert_close(e.query_y, tasks.evaluate(e.query_x), rtol=0, atol=0)


def test_evaluate_broadcasts_common_points() -> None:
    tasks = Sinusoid().sample_tasks(3, seeded())
    x = torch.linspace(-5, 5, 7).unsqueeze(-1)
    assert torch.equal(tasks.evaluate(x), tasks.evaluate(x.expand(3, 7, 1)))


def test_same_seed_same_bits_and_the_same_waves_in_every_dtype() -> None:
    first, again, other = (Sinusoid().sample(5, 3, 4, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first.query_y, again.query_y)
    assert torch.equal(first.support_x, again.support_x)
    assert not torch.equal(first.query_y, other.query_y)
    double = Sinusoid().sample(5, 3, 4, seeded(1), dtype=torch.float64)
    assert first.query_y.dtype == torch.float32
    assert torch.equal(double.query_y.float(), first.query_y)


def test_intervals_are_used() -> None:
    e = Sinusoid(amplitude=(2, 2), phase=(0, 0), x=(1.0, 1.0)).sample(2, 1, 1, seeded(), torch.float64)
    torch.testing.assert_close(e.query_y, torch.full((2, 1, 1), 2 * math.sin(1.0), dtype=torch.float64))


@pytest.mark.parametrize(
    ("error", "pattern", "kwargs"),
    [
        (ValueError, "amplitude: expected low <= high", {"amplitude": (5.0, 0.1)}),
        (ValueError, "phase: ", {"phase": (0.0, math.inf)}),
        (TypeError, "x: ", {"x": 5.0}),
        (TypeError, "x: ", {"x": (0.0, "1")}),
        (TypeError, "amplitude: ", {"amplitude": (1.0,)}),
    ],
)
def test_refuses_intervals(error: type[Exception], pattern: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^{pattern}"):
        Sinusoid(**kwargs)


@pytest.mark.parametrize(
    ("error", "pattern", "kwargs"),
    [
        (ValueError, "tasks: ", {"tasks": 0}),
        (ValueError, "shots: ", {"shots": 0}),
        (ValueError, "queries: ", {"queries": -3}),
        (TypeError, "tasks: ", {"tasks": True}),
        (TypeError, "shots: ", {"shots": 1.0}),
        (TypeError, "generator: ", {"generator": 0}),
        (TypeError, "dtype: ", {"dtype": torch.int64}),
    ],
)
def test_sample_refuses(error: type[Exception], pattern: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^{pattern}"):
        Sinusoid().sample(**kwargs)


@pytest.mark.parametrize("x", [torch.zeros(3, 2), torch.zeros(2, 4, 1), torch.zeros(3, 4, 1, dtype=torch.int64)])
def test_evaluate_refuses(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^x: "):
        Sinusoid().sample_tasks(3, seeded()).evaluate(x)
