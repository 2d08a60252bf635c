"""setup.py's decisions, the flags each file is compiled with, and that the CUDA sources compile."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from metafast import _native
from tests.scripts import load_module

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGES = Path(torch.__file__).parents[1]
KERNELS = [file for file in sorted(CSRC.rglob("*")) if file.is_file() and "torch" not in file.relative_to(CSRC).parts]


setup = load_module("metafast_setup", ROOT / "setup.py")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "METAFAST_NO_EXTENSION",
        "METAFAST_SIMT",
        "METAFAST_SANITIZE",
        "CXX",
        "CXXFLAGS",
        "CUDA_HOME",
        "TORCH_CUDA_ARCH_LIST",
    ):
        monkeypatch.delenv(name, raising=False)


def program(path: Path, answer: str = "") -> Path:
    """A stand-in for a compiler that prints an answer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'end'\n{answer}\nend\n")
    path.chmod(0o755)
    return path


def toolkit(home: Path, version: str) -> Path:
    program(home / "bin/nvcc", f"#$ _HERE_={home}/bin\nCuda compilation tools, release {version}, V{version}.88")
    return home


def test_the_decision_is_what_the_package_reads() -> None:
    decision = setup.Decision(extension=True, torch="2.13.0", isas=["baseline"], cuda_archs=["9.0"])
    built = _native.BuildInfo.parse(decision.json())
    assert built.extension and built.torch == "2.13.0" and built.isas == ("baseline",) and built.cuda_archs == ("9.0",)


def test_no_extension_where_the_variable_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFAST_NO_EXTENSION", "1")
    decision, tools = setup.decide()
    assert not decision.extension and decision.reason == "METAFAST_NO_EXTENSION was set" and tools.cxx == []
    monkeypatch.setenv("METAFAST_NO_EXTENSION", "0")
    assert "METAFAST_NO_EXTENSION" not in setup.decide()[0].reason


def test_no_extension_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    decision, _ = setup.decide()
    assert not decision.extension and decision.reason.startswith("no C++ compiler was found")


def test_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(tmp_path / "g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.find_cxx() == ["g++"]
    monkeypatch.setenv("CXX", f"{tmp_path}/g++ -m64")
    assert setup.find_cxx() == [f"{tmp_path}/g++", "-m64"]
    monkeypatch.setenv("CXX", "not-there")
    with pytest.raises(SystemExit, match="^CXX: 'not-there' is not there"):
        setup.find_cxx()


def test_sanitizers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup.sanitizers() == []
    monkeypatch.setenv("METAFAST_SANITIZE", "address,undefined")
    assert setup.sanitizers() == ["address", "undefined"]
    monkeypatch.setenv("METAFAST_SANITIZE", "adress")
    with pytest.raises(SystemExit, match="^METAFAST_SANITIZE: expected some of address, .*, got 'adress'"):
        setup.sanitizers()
    monkeypatch.setenv("METAFAST_SANITIZE", "thread")
    monkeypatch.setenv("METAFAST_SIMT", "1")
    with pytest.raises(SystemExit, match="^METAFAST_SIMT: the emulator's fibres do not run under"):
        setup.decide()


def test_cuda_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup.cuda_archs([]) == ["all-major"]
    assert setup.cuda_archs([(9, 0), (8, 6), (9, 0)]) == ["8.6", "9.0"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 10.0+PTX")
    assert setup.cuda_archs([(8, 6)]) == ["8.0", "9.0a", "10.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    with pytest.raises(SystemExit, match="^TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 9.0.PTX, got 'Ampere'"):
        setup.cuda_archs([])


def test_architecture_flags() -> None:
    assert setup.arch_flags(["all-major"]) == ["-arch=all-major"]
    assert setup.arch_flags(["8.0", "9.0a+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


def test_finding_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packages = tmp_path / "site-packages"
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    assert setup.find_cuda(None, packages) == (None, "", "this torch has no CUDA")
    nowhere = (None, "", "nvcc was not found (CUDA_HOME, PATH, nvidia-cuda-nvcc)")
    assert setup.find_cuda("13.0", packages) == nowhere
    pip = toolkit(packages / "nvidia/cu13", "13.2")
    assert setup.find_cuda("13.0", packages) == (pip, "13.2", "")
    # A script on PATH that stands for another toolkit's nvcc goes before pip's, and says where it is.
    other = toolkit(tmp_path / "cuda", "13.1")
    program(tmp_path / "path/nvcc").write_text(f'#!/bin/sh\nexec {other}/bin/nvcc "$@"\n')
    assert setup.find_cuda("13.0", packages) == (other, "13.1", "")
    assert setup.find_cuda("12.8", packages) == (None, "", "nvcc is 13.1, torch is for CUDA 12.8")
    home = toolkit(tmp_path / "home", "12.9")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert setup.find_cuda("12.8", packages) == (home, "12.9", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    assert setup.find_cuda("13.0", packages) == (None, "", f"nvcc was not found (CUDA_HOME={tmp_path / 'empty'})")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "odd"))
    broken = program(tmp_path / "odd/bin/nvcc", "hello")
    assert setup.find_cuda("13.0", packages)[2] == f"{broken} does not answer like an nvcc"
    broken.write_text("#!/bin/sh\nexec not-there\n")
    assert setup.find_cuda("13.0", packages)[2] == f"{broken} does not answer like an nvcc"


@pytest.mark.parametrize(
    ("headers", "library", "name"),
    [
        ("include", "lib64", "libcudart.so"),  # NVIDIA's installer
        ("targets/x86_64-linux/include", "lib", "libcudart.so"),  # conda
        ("include", "lib", "libcudart.so.13"),  # pip
        ("targets/sbsa-linux/include", "targets/sbsa-linux/lib", "libcudart.so"),
    ],
)
def test_layouts_of_a_toolkit(tmp_path: Path, headers: str, library: str, name: str) -> None:
    # Where the distribution spread it over the system's folders, compiler and linker find it.
    assert setup.cuda_headers(tmp_path) == [] and setup.cuda_runtime(tmp_path) == ["-lcudart"]
    for file in (f"{headers}/cuda_runtime_api.h", f"{library}/{name}", f"{library}/libcudart.so.13"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert setup.cuda_headers(tmp_path) == [str(tmp_path / headers)]
    assert setup.cuda_runtime(tmp_path) == [f"-L{tmp_path / library}", f"-l:{name}"]


def test_sources_and_their_instruction_sets() -> None:
    assert setup.isa_of(Path("cpu/x_avx512.cpp")) == "avx512" and setup.isa_of(Path("cpu/x_avx2.cpp")) == "avx2"
    assert setup.isa_of(Path("cpu/x_baseline.cpp")) is None and setup.isa_of(Path("cpu/avx2.cpp")) is None
    everything = setup.sources(setup.Decision(isas=["baseline", "avx2", "avx512"], cuda="13.0", simt=True))
    assert set(everything) == {*CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu")}
    portable = setup.sources(setup.Decision(machine="aarch64", isas=["baseline"]))
    assert portable and not [s for s in portable if s.suffix != ".cpp" or "_avx" in s.name]
    assert not [s for s in portable if s.parent.name == "simt"]  # the emulator is not for shipping
    # A kernel for one instruction set is there for all.
    for source in CSRC.rglob("*_baseline.cpp"):
        for isa in setup.X86_ISAS:
            assert source.with_name(source.name.replace("_baseline", f"_{isa}")).is_file()


def commands(folder: Path) -> dict[str, list[str]]:
    """Each source's command line, as ninja has it."""
    ninja = Path(pytest.importorskip("ninja").BIN_DIR, "ninja")
    target = ["-C", str(folder), "-t", "compdb", "-x"]
    listed = json.loads(subprocess.run([ninja, *target], check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {entry["file"]: entry["command"].split() for entry in listed if entry["file"].startswith(str(CSRC))}


def test_flags_of_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ninja")
    monkeypatch.setenv("CXXFLAGS", "-DFROM_CXXFLAGS")
    decision = setup.Decision(
        extension=True, isas=["baseline", *setup.X86_ISAS], cuda="13.0", cuda_archs=["9.0"], sanitizers=["address"]
    )
    setup.write_ninja(decision, setup.Tools(["c++"], tmp_path / "cuda"), tmp_path, tmp_path / "_C.so")
    compiled = commands(tmp_path)
    assert set(compiled) - {str(s) for s in setup.sources(decision)} == set()
    assert {str(s) for s in setup.sources(decision)} <= set(compiled)
    for file, command in compiled.items():
        assert not {"-march=native", "-ffast-math", "-Ofast", "--use_fast_math"} & set(command)
        if file.endswith(".cu"):
            assert command[0] == f"{tmp_path}/cuda/bin/nvcc" and "-Werror=all-warnings" in command
            assert "-gencode=arch=compute_90,code=sm_90" in command
            continue
        assert {"-Wall", "-Wextra", "-Werror", "-fsanitize=address", "-DFROM_CXXFLAGS"} <= set(command)
        machine = {flag for flag in command if flag.startswith("-m")}
        isa = setup.isa_of(Path(file))
        assert machine == set(setup.X86_ISAS[isa] if isa else ())


@pytest.mark.parametrize("names", [[], ["address"]], ids=["watched", "address"])
def test_flags_of_the_emulated_kernels(tmp_path: Path, names: list[str]) -> None:
    decision = setup.Decision(extension=True, isas=["baseline"], simt=True, sanitizers=names)
    setup.write_ninja(decision, setup.Tools(["c++"]), tmp_path, tmp_path / "_C.so")
    compiled = commands(tmp_path)
    kernels = {str(source) for source in CSRC.rglob("*.cu")}
    assert kernels and kernels <= set(compiled)
    for file, command in compiled.items():
        assert ("-DMETAFAST_WITH_SIMT" in command) == setup.hangs_on_simt(Path(file))
        assert (f"-I{CSRC}/simt" in command) == (file in kernels)
        assert ("-fsanitize=thread" in command) == (file in kernels and not names)
        assert ("-fsanitize=address" in command) == bool(names)


def test_builds_with_and_without_simt_share_what_they_can(tmp_path: Path) -> None:
    asks = set()
    for file in (CSRC / "torch").glob("*.cpp"):
        # By the compiler, not by what setup.py thinks of includes; torch's own are not needed for that.
        listed = subprocess.run(["c++", "-MM", "-MG", str(file)], check=True, capture_output=True, text=True).stdout
        ours = {Path(name) for name in listed.replace("\\", "").split()[1:] if CSRC in Path(name).parents}
        if any("METAFAST_WITH_SIMT" in one.read_text() for one in ours):
            asks.add(file)
    assert asks and asks == {file for file in CSRC.rglob("*.cpp") if setup.hangs_on_simt(file)}
    assert not [file for file in KERNELS if "METAFAST_WITH_SIMT" in file.read_text()]
    found = []
    for simt in (False, True):
        decision = setup.Decision(extension=True, isas=["baseline", *setup.X86_ISAS], simt=simt)
        setup.write_ninja(decision, setup.Tools(["c++"]), tmp_path, tmp_path / "_C.so")
        found.append(commands(tmp_path))
    plain, emulated = found
    assert set(plain) == {str(source) for source in setup.sources(setup.Decision(isas=["baseline", *setup.X86_ISAS]))}
    for file, command in plain.items():
        output, other = (words[words.index("-o") + 1] for words in (command, emulated[file]))
        assert "-DMETAFAST_WITH_SIMT" not in command
        assert (command == emulated[file]) == (output == other) == (Path(file) not in asks)


def test_the_extension_knows_what_it_was_built_with(tmp_path: Path) -> None:
    decision = setup.Decision(extension=True, reason='a "quoted" reason', torch="2.13.0")
    pytest.importorskip("ninja")
    setup.write_ninja(decision, setup.Tools(["c++"]), tmp_path, tmp_path / "_C.so")
    header = tmp_path / "without-simt/build_info.h"
    text = re.search(r'R"json\((.*)\)json"', header.read_text(), re.S)
    assert text is not None and _native.BuildInfo.parse(text[1]) == _native.BuildInfo.parse(decision.json())
    # Left alone if nothing changed, so that nothing is compiled again.
    os.utime(header, (1, 1))
    setup.write_ninja(decision, setup.Tools(["c++"]), tmp_path, tmp_path / "_C.so")
    assert header.stat().st_mtime == 1


def test_kernels_see_no_torch() -> None:
    assert [file for file in KERNELS if file.suffix == ".cuh"] and [file for file in KERNELS if file.suffix == ".h"]
    foreign = re.compile(r'^\s*#\s*include\s*[<"](?:\.\./)*(?:torch|ATen|c10|pybind11)[/.]', re.M)
    assert foreign.search('#include "../../torch/x.h"') and foreign.search("#include <ATen/Parallel.h>")
    assert [file for file in KERNELS if foreign.search(file.read_text())] == []


NVCC_HOME, NVCC_VERSION, NO_NVCC = setup.find_nvcc(PACKAGES)


@pytest.mark.skipif(NVCC_HOME is None, reason=NO_NVCC)
@pytest.mark.parametrize("source", sorted(CSRC.rglob("*.cu")), ids=lambda source: source.stem)
def test_cuda_sources_compile(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "object.o"
    command = [f"{NVCC_HOME}/bin/nvcc", *setup.nvcc_flags(["8.0"]), "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stdout
    assert target.read_bytes().startswith(b"\x7fELF")
