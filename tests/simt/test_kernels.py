"""Kernels of csrc/cuda in what no operator asks of them, in place for instance, in every order of threads."""

from __future__ import annotations

import pytest

from tests.simt.programs import FOLDER, compiled, needs_compiler
from tests.test_build import CSRC


@needs_compiler
@pytest.mark.parametrize("sanitized", [False, True], ids=["watched", "address"])
def test_kernels_without_an_operator(tmp_path_factory: pytest.TempPathFactory, worker_id: str, sanitized: bool) -> None:
    kernels = [CSRC / "cuda/weighted_sum.cu", CSRC / "cuda/momentum_update.cu"]
    name = "library-address" if sanitized else "library"
    program = compiled(tmp_path_factory, worker_id, name, kernels, [FOLDER / "library.cpp"], sanitized=sanitized)
    for kernel in ("weighted_sum", "momentum_update"):
        for dtype in ("float32", "float64"):
            assert program.run(f"{kernel} {dtype}") == (0, "ok\n")
