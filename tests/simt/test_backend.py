"""The backend simt: the emulator runs what it is forced to run, and what it has no kernels for is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import metafast as mf
from metafast import _native
from metafast.ops import inner_update
from tests.backends import in_every_order
from tests.nets import build, episodes_for

simt = pytest.mark.skipif(bool(_native.missing("simt")), reason=_native.missing("simt"))


@simt
def test_the_emulator_runs_where_it_is_forced() -> None:
    module: Any = _native.native()
    x = torch.ones(3, 300)

    def blocks_of(backend: str) -> int:
        before = module.simt_blocks()
        with mf.use_backend(backend):
            inner_update(x, x, 0.5)
        return int(module.simt_blocks()) - before

    assert blocks_of("simt") == 3 * 2  # of 256 threads
    assert blocks_of("cpu") == blocks_of("auto") == blocks_of("torch") == 0
    with mf.use_backend("simt"):
        assert blocks_of("cpu") == 0 and blocks_of("simt") == 6


@simt
def test_different_bits_in_some_order_fail() -> None:
    results = [torch.zeros(2), torch.zeros(2), torch.tensor([0.0, -0.0]), torch.zeros(2)]
    with pytest.raises(AssertionError, match="^order 2 of threads and blocks differs from order 0"):
        in_every_order("simt", lambda: results.pop(0))
    assert not results


@simt
def test_what_has_no_kernels_is_refused() -> None:
    maml = mf.MAML(build("tied"), lr=0.1, steps=1)
    optimizer = mf.LSTMOptimizer(hidden=2)
    state, weights = torch.zeros(2, 2, 3, 2), list(optimizer.parameters())
    with mf.use_backend("simt"), torch.no_grad():
        with pytest.raises(ValueError, match="^model: backend 'simt' is forced, but layer '2'"):
            maml(episodes_for("tied"))
        with pytest.raises(ValueError, match="backend 'simt' is forced, but this operator has no kernels for simt"):
            mf.ops.lstm_update(torch.ones(4, 3), state, weights)
