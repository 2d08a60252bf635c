"""The backend simt: the emulator runs what it is forced to run, and what it has no kernels for is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import metafast as mf
from metafast import _native
from metafast.ops import inner_update
from tests.backends import in_every_order

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
    maml = mf.MAML(mf.models.MLP(1, (4,), 1), lr=0.1, steps=1, loss="mse")
    net, x = mf.models.MLP(1, (4,), 1), torch.ones(3, 1)
    params = {name: p.detach() for name, p in net.named_parameters()}
    episodes = mf.data.Sinusoid().sample(tasks=2, shots=3)
    with mf.use_backend("simt"):
        with pytest.raises(ValueError, match="backend 'simt' is forced, but there is no simt engine yet"):
            maml(episodes)
        with pytest.raises(ValueError, match="backend 'simt' is forced, but this operator has no kernels for simt"):
            mf.ops.hvp(net, params, params, x, x, loss="mse")
