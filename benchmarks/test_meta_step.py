"""MAML's meta-step by both doors against the reference loop, at full size."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from metafast.bench.sides import ACCUMULATE, AUTOGRAD, REFERENCE, Side

WORKLOADS = ("sinusoid-k1", "sinusoid-k5", "conv4-64-k1", "conv4-64-k5", "conv4-32-84px", "omniglot-fc")


@pytest.mark.parametrize("side", [AUTOGRAD, ACCUMULATE, REFERENCE], ids=lambda side: side.name)
@pytest.mark.parametrize("name", WORKLOADS)
def test_meta_step(name: str, side: Side, meta_step: Callable[[str, Side], None]) -> None:
    meta_step(name, side)
