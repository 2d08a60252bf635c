"""benchmarks/cuda_table.py: what it reads of a build, the occupancy it computes, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load_module

ROOT = Path(__file__).parents[1]
table: ModuleType = load_module("cuda_table", ROOT / "benchmarks" / "cuda_table.py")

_NAME = "_ZN8metafast4cuda11some_kernelI{}EEvNS0_6LaunchIT_EE"
_FLOAT, _DOUBLE = _NAME.format("f"), _NAME.format("d")
_SAID = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{_DOUBLE}' for 'sm_80'
ptxas info    : Function properties for {_DOUBLE}
    112 bytes stack frame, 28 bytes spill stores, 56 bytes spill loads
ptxas info    : Function properties for _ZN4help
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 112 bytes cumulative stack size, 4096 bytes smem, 628 bytes cmem[0]
ptxas info    : Compile time = 2242.370 ms
ptxas info    : Compiling entry function '{_FLOAT}' for 'sm_80'
ptxas info    : Function properties for {_FLOAT}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, 356 bytes cmem[0]
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{_FLOAT}' for 'sm_120a'
ptxas info    : Function properties for {_FLOAT}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 356 bytes cmem[0]
"""
_PTX = f"""\
.version 9.0
.extern .shared .align 16 .b8 given[];

.visible .entry {_FLOAT}(
.param .align 8 .b8 {_FLOAT}_param_0[96]
)
.maxntid 16, 8
.minnctapersm 1
{{
{{ // callseq 0, 0
}}
mov.u32 %r1, given;
}}
.entry {_DOUBLE}(
)
{{
ret;
}}
"""


def test_what_ptxas_said() -> None:
    assert table.parse_ptxas(_SAID) == {
        (_DOUBLE, "sm_80"): table.Usage(registers=64, spills=28 + 56 + 4 + 8, shared=4096, stack=112),
        (_FLOAT, "sm_80"): table.Usage(40, 0, 0, 0),
        (_FLOAT, "sm_120"): table.Usage(32, 0, 0, 0),
    }
    with pytest.raises(ValueError, match="^ptxas: expected a kernel's name and registers"):
        table.parse_ptxas(_SAID.replace("Used 64", "Uses 64"))


def test_what_the_ptx_says() -> None:
    assert table.parse_ptx(_PTX) == {_FLOAT: (128, True), _DOUBLE: (0, False)}


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_the_table_of_a_build() -> None:
    other = "_ZN8metafast4cuda12other_kernelEv"
    # Another file's shared memory is not this one's.
    plain = _PTX.replace(_FLOAT, other).replace(_DOUBLE, f"{other}x").replace("mov.u32 %r1, given;", "")
    said = _SAID[_SAID.rindex("ptxas info    : Compiling") :].replace(_FLOAT, other)
    found = table.kernels_of([(_SAID, _PTX), (said, plain)])
    assert list(found) == ["other_kernel", "some_kernel<double>", "some_kernel<float>"]
    assert list(found["some_kernel<float>"].usage) == ["sm_80", "sm_120"]
    assert [kernel.dynamic_shared for kernel in found.values()] == [False, False, True]
    rows = {(row["kernel"], row["arch"]): row for row in table.rows(found)}
    assert rows["some_kernel<double>", "sm_80"]["occupancy"] is None  # nobody knows its threads
    free = rows["some_kernel<float>", "sm_120"]["dynamic_shared_free"]
    usage, limits = found["some_kernel<float>"].usage["sm_120"], table.LIMITS["sm_120"]
    whole = table.occupancy(usage, 128, limits)
    assert whole == table.occupancy(usage, 128, limits, free) > table.occupancy(usage, 128, limits, free + 1)
    text = table.text_of(table.rows(found))
    assert len(text.splitlines()) == 1 + 4
    assert "100 % up to" in text


# By NVIDIA's occupancy calculator.
@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "wanted"),
    [
        ("sm_75", 64, 0, 256, 1.0),
        ("sm_75", 65, 0, 256, 0.75),
        ("sm_80", 32, 0, 1024, 1.0),
        ("sm_80", 255, 0, 256, 0.125),
        ("sm_80", 33, 0, 128, 0.75),
        ("sm_86", 40, 0, 256, 1.0),
        ("sm_86", 16, 0, 32, 16 / 48),  # 16 blocks at most
        ("sm_90", 32, 48 * 1024, 256, 4 * 8 / 64),  # 49 KiB with CUDA's own: four in 228
        ("sm_90", 32, 227 * 1024, 1024, 0.5),
        ("sm_90", 32, 228 * 1024, 1024, 0.0),
        ("sm_120", 168, 0, 128, 12 / 48),
        ("sm_120", 16, 0, 33, 1.0),  # of 24 blocks of two warps
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, threads: int, wanted: float) -> None:
    usage = table.Usage(registers, 0, shared, 0)
    assert table.occupancy(usage, threads, table.LIMITS[arch]) == pytest.approx(wanted)
    assert table.occupancy(replace(usage, shared=0), threads, table.LIMITS[arch], shared) == pytest.approx(wanted)


def kernel(registers: int = 40, spills: int = 0, shared: int = 64, threads: int = 128) -> dict[str, object]:
    return {"f": table.Kernel(threads, False, {"sm_80": table.Usage(registers, spills, shared, 0)})}


_BEFORE = {"f": {"sm_80": [40, 0, 64]}}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (kernel(registers=49), "f: 49 registers on sm_80, the committed table has 40"),
        (kernel(shared=65), "f: 65 bytes of shared memory on sm_80, the committed table has 64"),
        (kernel(threads=0), "f: expected __launch_bounds__"),
        ({}, "f: in the committed table, and not in the build"),
        (kernel() | {"g": kernel()["f"]}, "g: not in the committed table"),
        (
            {"f": table.Kernel(32, False, {"sm_90": table.Usage(1, 0, 0, 0)})},
            "f: expected architectures sm_80, got sm_90",
        ),
    ],
)
def test_what_is_worse_is_a_problem(found: dict[str, object], words: str) -> None:
    (line,) = table.problems(found, _BEFORE)
    assert line.startswith(words)


def test_what_is_no_worse_is_none() -> None:
    for found in (kernel(), kernel(registers=48), kernel(registers=8, shared=0)):
        assert table.problems(found, _BEFORE) == []


def test_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused where the table has them too, unless the kernel may; and then no more than the table has."""
    accepted = {"f": {"sm_80": [40, 8, 64]}}
    assert table.problems(kernel(spills=8), accepted) == ["f: a hot kernel may not spill registers: 8 bytes on sm_80"]
    monkeypatch.setitem(table.MAY_SPILL, "^f$", "once a day")
    assert table.problems(kernel(spills=8), accepted) == []
    assert table.problems(kernel(spills=9), accepted) == ["f: 9 bytes of spills on sm_80, the committed table has 8"]
    monkeypatch.setitem(table.MAY_SPILL, "^gone$", "")
    assert table.problems(kernel(), _BEFORE) == ["MAY_SPILL: no kernel is named like '^gone$'"]


def test_the_committed_text_is_what_is_compared() -> None:
    committed = json.loads(table.committed_text(kernel(), "13.0"))
    assert committed == {"nvcc": "13.0", "kernels": _BEFORE}


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build of a kernel, and where the table goes."""
    monkeypatch.setattr(table, "CHECKED", tmp_path / "out")
    monkeypatch.setattr(table, "COMMITTED", tmp_path / "committed.json")
    monkeypatch.setattr(table, "built", lambda site: (tmp_path, "13.0"))
    monkeypatch.setattr(table, "read", lambda folder: kernel())
    return tmp_path


def test_the_command(build: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert table.main([]) == 1  # nothing is committed yet
    assert "f: not in the committed table" in capsys.readouterr().err
    assert table.main(["--accept"]) == 0
    assert table.main([]) == 0
    assert json.loads((build / "out/kernels.json").read_text())["kernels"][0]["registers"] == 40
    assert "sm_80" in (build / "out/kernels.txt").read_text()
    monkeypatch.setattr(table, "read", lambda folder: kernel(registers=80))
    assert table.main([]) == 1
    said = capsys.readouterr().err
    assert "f: 80 registers on sm_80" in said
    assert "make cuda-table" in said
    monkeypatch.setattr(table, "built", lambda site: (build, "13.1"))
    monkeypatch.setattr(table, "read", lambda folder: kernel())
    assert table.main([]) == 1
    assert "nvcc: the committed table is of 13.0, this build of 13.1" in capsys.readouterr().err


def test_a_build_without_cuda_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metafast").mkdir()
    info = {"cuda": "", "cuda_reason": "this torch has no CUDA"}
    (tmp_path / "metafast/_build_info.json").write_text(json.dumps(info))
    with pytest.raises(SystemExit, match="was built without CUDA: this torch has no CUDA"):
        table.built(tmp_path)


def test_the_committed_table_is_of_all_architectures_and_has_no_spills() -> None:
    committed = json.loads(table.COMMITTED.read_text())["kernels"]
    assert all(set(archs) == set(table.LIMITS) for archs in committed.values())
    assert all(spills == 0 for archs in committed.values() for _, spills, _ in archs.values())


def test_what_make_compiles_for_is_what_the_table_knows() -> None:
    (archs,) = re.findall(r"^CUDA_ARCHS := (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert {f"sm_{arch.removesuffix('+PTX').replace('.', '')}" for arch in archs.split()} == set(table.LIMITS)
