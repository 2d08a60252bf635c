"""Kernels of csrc/cuda against their equations, in every order of threads and blocks."""

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


@needs_compiler
@pytest.mark.parametrize("sanitized", [False, True], ids=["watched", "address"])
@pytest.mark.parametrize("name", ["linear", "conv2d", "loss", "input"])
def test_layers_and_losses(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str, name: str, sanitized: bool
) -> None:
    kernels = [FOLDER / "layers.cpp", CSRC / "cuda/layers/conv.cu", CSRC / "cuda/layers/loss.cu"]
    program_name = "layers-address" if sanitized else "layers"
    host = sorted((CSRC / "engine").glob("*.cpp"))
    program = compiled(tmp_path_factory, worker_id, program_name, kernels, host, sanitized=sanitized)
    for dtype in ("float32", "float64"):
        assert program.run(f"{name} {dtype}") == (0, "ok\n")
