"""The emulator of CUDA: sound kernels come out right in every order, kernels broken on purpose are caught by name.

tests/simt/cases.cpp is compiled twice, as setup.py compiles kernels: watched (csrc/simt/accesses.h), and under
AddressSanitizer. A case is a process.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.simt.programs import FOLDER, Program, compiled, needs_compiler, run
from tests.test_build import NO_NVCC, NVCC_HOME, setup

pytestmark = needs_compiler


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Program:
    return compiled(tmp_path_factory, worker_id, "watched", [FOLDER / "cases.cpp"], sanitized=False)


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Program:
    return compiled(tmp_path_factory, worker_id, "sanitized", [FOLDER / "cases.cpp"], sanitized=True)


SOUND = [
    *("block_sum", "transpose", "reverse", "allowed", "collectives", "histogram", "atomics", "neighbours"),
    "after_failure",
]


@pytest.mark.parametrize("case", SOUND)
def test_sound_kernels(watched: Program, sanitized: Program, case: str) -> None:
    assert watched.run(case) == (0, "ok\n")
    assert sanitized.run(case) == (0, "ok\n")


WAITS = r"block \(0, 0, 0\), thread \({}, 0, 0\), order 0: waits forever at {} \(kernels.cuh:\d+{}\): "
ALL = ", mask 0xffffffff"

# Found in any build.
CAUGHT = {
    "barrier_in_a_branch": WAITS.format(0, "__syncthreads", "") + r"thread \(40, 0, 0\) has left the kernel",
    "barrier_after_return": WAITS.format(0, "__syncthreads", "") + r"thread \(63, 0, 0\) has left the kernel",
    "two_barriers": r"thread \(40, 0, 0\), order 0: comes to __syncthreads \(kernels.cuh:\d+\) while "
    r"thread \(0, 0, 0\) waits at __syncthreads \(kernels.cuh:\d+\)",
    "shuffle_without_all": WAITS.format(0, "__shfl_sync", ALL) + r"thread \(5, 0, 0\) has left the kernel",
    "shuffle_before_barrier": WAITS.format(32, "__shfl_sync", ALL) + r"thread \(40, 0, 0\) has left the kernel",
    "shuffle_from_outside": r"thread \(15, 0, 0\), order 0: __shfl_down_sync reads lane 16, which is not in its mask",
    "shuffle_of_others": r"thread \(0, 0, 0\), order 0: is not in the mask of __shfl_sync \(.*, mask 0xffff0000",
    "two_collectives": WAITS.format(0, "__any_sync", ALL) + r"thread \(8, 0, 0\) waits at __all_sync",
    "lanes_without_threads": WAITS.format(32, "__all_sync", ALL) + "the block has no lane 8",
    "odd_width": r"thread \(0, 0, 0\), order 0: __shfl_sync: width: expected 1, 2, 4, 8, 16 or 32, got 12",
    "no_dynamic": r"thread \(0, 0, 0\), order 0: has no dynamic shared memory",
    "too_much_shared": r"thread \(0, 0, 0\), order 0: shared memory for all: .* 49152 static bytes .* got 49156",
    "static_and_dynamic": r"order 0: shared memory for all: .* and 49152 in all, got 32768 and 16385 dynamic ones",
    "threads": r"block.x: expected 1 to 1024, got 1025",
    "threads_in_all": "threads of a block: expected 1 to 1024, got 2048",
    "no_threads": "block.x: expected 1 to 1024, got 0",
    "block_z": "block.z: expected 1 to 64, got 65",
    "no_blocks": "grid.x: expected 1 to 2147483647, got 0",
    "grid_y": "grid.y: expected 1 to 65535, got 65536",
    "dynamic_shared": "dynamic shared bytes: expected 0 to 49152, got 49153",
}


def check_caught(outcome: tuple[int, str], case: str, message: str) -> None:
    status, printed = outcome
    kernel = case if f"void {case}(" in (FOLDER / "kernels.cuh").read_text() else r"\w+"
    assert status == 1 and re.match(f"simt: kernel {kernel}[,:] .*{message}", printed), printed


@pytest.mark.parametrize("case", CAUGHT)
def test_broken_kernels_are_caught(watched: Program, sanitized: Program, case: str) -> None:
    for program in (watched, sanitized):
        check_caught(program.run(case), case, CAUGHT[case])


# Found at the access, or by the results of the orders; the other way where the access is not watched.
UNORDERED = {
    "missing_barrier": r"thread \(0, 0, 0\), order 0: reads what nobody wrote: shared all, byte 252",
    "missing_warp_barrier": r"thread \(0, 0, 0\), order 0: reads what nobody wrote: shared all, byte 128",
    "missing_second_barrier": r"thread \(32, 0, 0\), order 0: reads what thread \(31, 0, 0\) of block \(0, 0, 0\) "
    "wrote, with nothing that orders them: shared all, byte 124",
    "unwritten": r"thread \(63, 0, 0\), order 0: reads what nobody wrote: shared all, byte 256",
    "unwritten_dynamic": r"thread \(0, 0, 0\), order 0: reads what nobody wrote: shared dynamic, byte 0",
    "last_block_wins": r"block \(1, 0, 0\), thread \(0, 0, 0\), order 0: writes what thread \(0, 0, 0\) of "
    r"block \(0, 0, 0\) wrote, with nothing that orders them: global memory",
    "block_reads_block": r"block \(1, 0, 0\), thread \(0, 0, 0\), order 0: reads what thread \(0, 0, 0\) of "
    r"block \(0, 0, 0\) wrote, with nothing that orders them: global memory",
    "plain_and_atomic": r"thread \(1, 0, 0\), order 0: changes atomically what thread \(0, 0, 0\) of block .* wrote",
    "sum_in_any_order": r"out differs between order 0 and order 1, first at byte \d; several threads of "
    r"block \(0, 0, 0\) changed atomically it",
}


@pytest.mark.parametrize("case", UNORDERED)
def test_dependence_on_the_order_is_caught(watched: Program, sanitized: Program, case: str) -> None:
    check_caught(watched.run(case), case, UNORDERED[case])
    check_caught(sanitized.run(case), case, r"out differs between order 0 and order \d, first at byte \d+$")


@pytest.mark.parametrize("case", ["past_shared", "past_dynamic"])
def test_shared_memory_out_of_bounds(watched: Program, sanitized: Program, case: str) -> None:
    check_caught(watched.run(case), case, r"thread \(63, 0, 0\), order 0: writes shared memory outside its arrays")
    check_reported(sanitized.run(case), case, "63", "use-after-poison")


def test_global_memory_out_of_bounds(sanitized: Program) -> None:
    check_reported(sanitized.run("past_global"), "past_global", "31", "heap-buffer-overflow")


def check_reported(outcome: tuple[int, str], kernel: str, thread: str, error: str) -> None:
    status, printed = outcome
    assert status != 0 and f"ERROR: AddressSanitizer: {error}" in printed, printed
    assert f"simt: kernel {kernel}, block (0, 0, 0), thread ({thread}, 0, 0), order 0: AddressSanitizer" in printed


def test_each_case_of_the_program_is_tested() -> None:
    listed = re.findall(r'^    (?:\{"|PLAIN\()(\w+)', (FOLDER / "cases.cpp").read_text(), re.M)
    past = ["past_shared", "past_dynamic", "past_global"]
    assert sorted(listed) == sorted([*SOUND, *CAUGHT, *UNORDERED, *past])


@pytest.mark.skipif(NVCC_HOME is None, reason=NO_NVCC)
def test_nvcc_compiles_the_same_kernels(tmp_path: Path) -> None:
    source = tmp_path / "kernels.cu"
    source.write_text(f'#include "{FOLDER}/kernels.cuh"\n')
    run([f"{NVCC_HOME}/bin/nvcc", *setup.nvcc_flags(["8.0"]), "-c", source, "-o", tmp_path / "kernels.o"])
