"""What every test shares: one thread unless it asks for more, so that timings of a shared machine stay bearable."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch

from tests import orders
from tests.backends import LEARNER_BACKENDS, learners_on
from tests.nets import NOT_LOWERED

collect_ignore = ["wheel_smoke.py"]  # a script of `make wheel-test`, run in an environment without pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes the emulator many seconds; layers, and a small Conv4, have tests of their own."""
    left_out = [item for item in items if _on_simt(item) and not _emulated(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _parameters(item: pytest.Item) -> dict[str, object]:
    call = getattr(item, "callspec", None)
    return {} if call is None else dict(call.params)


def _on_simt(item: pytest.Item) -> bool:
    return _parameters(item).get("backend") == "simt"


def _emulated(item: pytest.Item) -> bool:
    if item.get_closest_marker("not_emulated") is not None or _parameters(item).get("name") == "conv4":
        return False
    # By a hash that is the same in all processes.
    return item.get_closest_marker("emulated_in_part") is None or zlib.crc32(item.nodeid.encode()) % 16 == 0


@pytest.fixture(params=LEARNER_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that learners run on; a test of what the kernels do not take is marked ``not_lowered``."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    refused = name in NOT_LOWERED or request.node.get_closest_marker("not_lowered") is not None
    with learners_on(request.param, lowered=not refused):
        yield request.param


if orders.WANTED:

    @pytest.fixture(autouse=True)
    def _all_orders(monkeypatch: pytest.MonkeyPatch) -> None:
        orders.in_all_orders(monkeypatch)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
