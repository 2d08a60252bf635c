"""Builds metafast._C, the compiled kernels; everything else about the package is in pyproject.toml.

What is built is decided once, by :func:`decide`, and never silently: the decision goes to metafast/_build_info.json and
into the extension itself, and ``metafast info`` prints it.

- The extension: on Linux with a C++ compiler, unless METAFAST_NO_EXTENSION=1.
- The backend simt, the CUDA kernels on the emulator of csrc/simt, for tests: where METAFAST_SIMT=1. Builds with and
  without it share what is compiled alike, so that a wheel after `make build` is quick.
- Its CUDA part: where torch has CUDA and an nvcc of the same major version is found (CUDA_HOME, else PATH, else pip's
  nvidia-cuda-nvcc beside torch).

Sources are found by name: csrc/**/*.cpp, and csrc/**/*.cu for CUDA. Files ending in _avx2.cpp or _avx512.cpp are for
x86-64 and get that instruction set's flags; csrc/simt/*.cpp, and csrc/**/*.cu once more by the C++ compiler, are for
simt; no other flag depends on the machine that builds. torch's BuildExtension
has one set of flags for all files, so the ninja file is written here.

Environment: METAFAST_NO_EXTENSION=1, METAFAST_SIMT=1, METAFAST_SANITIZE=address,undefined, CXX, CXXFLAGS (appended),
CUDA_HOME, TORCH_CUDA_ARCH_LIST (as torch has it, "8.0;9.0+PTX"), MAX_JOBS.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
X86_ISAS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
STANDARD = ["-std=c++20", "-O3"]
# Fused multiply-adds, and square roots without errno: what the kernels are written for. Nothing else of fast-math.
ARITHMETIC = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# A kernel on the emulator: its <cuda_runtime.h>, and without a sanitizer its watch over every access to memory, by the
# calls that ThreadSanitizer's flag inserts (csrc/simt/accesses.h).
SIMT = ["-x", "c++", f"-I{CSRC / 'simt'}", "-O1", "-Wno-unknown-pragmas"]
SIMT_WATCHED = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
SANITIZERS = ("address", "undefined", "leak", "thread")


@dataclass
class Decision:
    """What is built, and why not what is not; written as it is to _build_info.json (metafast._native reads it)."""

    extension: bool = False
    reason: str = ""  # why there is no extension
    torch: str = ""
    python: str = platform.python_version()
    machine: str = platform.machine()
    compiler: str = ""
    isas: list[str] = field(default_factory=list)
    sanitizers: list[str] = field(default_factory=list)
    simt: bool = False
    cuda: str = ""  # nvcc's version; empty: no CUDA part
    cuda_reason: str = ""  # why there is no CUDA part
    cuda_archs: list[str] = field(default_factory=list)

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass
class Tools:
    """Where the compilers are."""

    cxx: list[str] = field(default_factory=list)
    cuda_home: Path | None = None


def decide() -> tuple[Decision, Tools]:
    """Look at the environment; starts the compilers only to ask for their versions."""
    decision, tools = Decision(), Tools()
    if switched_on("METAFAST_NO_EXTENSION"):
        decision.reason = "METAFAST_NO_EXTENSION was set"
    elif sys.platform != "linux":
        decision.reason = f"built on {sys.platform}: the extension is for Linux"
    else:
        tools.cxx = find_cxx()
        if not tools.cxx:
            decision.reason = "no C++ compiler was found (CXX, c++, g++, clang++)"
    if decision.reason:
        return decision, tools

    import torch

    decision.extension = True
    decision.torch = torch.__version__
    decision.compiler = output_of([*tools.cxx, "--version"]).splitlines()[0]
    decision.isas = ["baseline", *(X86_ISAS if decision.machine == "x86_64" else ())]
    decision.sanitizers = sanitizers()
    decision.simt = switched_on("METAFAST_SIMT")
    if decision.simt and "thread" in decision.sanitizers:
        raise SystemExit("METAFAST_SIMT: the emulator's fibres do not run under METAFAST_SANITIZE=thread")
    packages = Path(torch.__file__).parents[1]
    tools.cuda_home, decision.cuda, decision.cuda_reason = find_cuda(torch.version.cuda, packages)
    if decision.cuda:
        decision.cuda_archs = cuda_archs(
            [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        )
    return decision, tools


def switched_on(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def find_cxx() -> list[str]:
    """The compiler's command; a CXX that does not exist is an error, not a reason to go without."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise SystemExit(f"CXX: {command[0]!r} is not there")
        return command
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])


def output_of(command: list[str], check: bool = True) -> str:
    return subprocess.run(command, check=check, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def sanitizers() -> list[str]:
    names = [name for name in os.environ.get("METAFAST_SANITIZE", "").split(",") if name]
    for name in names:
        if name not in SANITIZERS:
            raise SystemExit(f"METAFAST_SANITIZE: expected some of {', '.join(SANITIZERS)}, got {name!r}")
    return names


def find_cuda(torch_cuda: str | None, packages: Path) -> tuple[Path | None, str, str]:
    """The folder and version of a toolkit for this torch, or why there is none; see find_nvcc for ``packages``."""
    if torch_cuda is None:
        return None, "", "this torch has no CUDA"
    home, version, reason = find_nvcc(packages)
    if home is not None and version.split(".")[0] != torch_cuda.split(".")[0]:
        return None, "", f"nvcc is {version}, torch is for CUDA {torch_cuda}"
    return home, version, reason


def find_nvcc(packages: Path) -> tuple[Path | None, str, str]:
    """The folder and version of nvcc's toolkit, or why there is none; ``packages``: the site-packages with torch."""
    if home := os.environ.get("CUDA_HOME"):
        nvcc = shutil.which(f"{home}/bin/nvcc")
    else:
        pips = [str(path) for path in sorted(packages.glob("nvidia/cu*/bin/nvcc"), reverse=True)]
        nvcc = next(filter(None, map(shutil.which, ["nvcc", *pips])), None)
    if nvcc is None:
        return None, "", f"nvcc was not found ({f'CUDA_HOME={home}' if home else 'CUDA_HOME, PATH, nvidia-cuda-nvcc'})"
    # The nvcc on PATH may be a script that starts the real one: ask it where it is.
    dry_run = output_of([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], check=False)
    where = re.search(r"^#\$ _HERE_=(.+)$", dry_run, re.M)
    release = re.search(r"release (\d+\.\d+)", output_of([nvcc, "--version"], check=False))
    if where is None or release is None:
        return None, "", f"{nvcc} does not answer like an nvcc"
    return Path(where[1]).parent, release[1], ""


def cuda_headers(home: Path) -> list[str]:
    """The folder with CUDA's headers, as its installer, conda or pip has it; empty: they are among the system's."""
    folders = (home / "include", *sorted(home.glob("targets/*/include")))
    return [str(folder) for folder in folders if (folder / "cuda_runtime_api.h").is_file()][:1]


def cuda_runtime(home: Path) -> list[str]:
    """The linker's flags for CUDA's runtime library; pip's package has it without the unversioned name."""
    for folder in (home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib"))):
        names = sorted(file.name for file in folder.glob("libcudart.so*"))
        if names:
            return [f"-L{folder}", f"-l:{names[0]}"]
    return ["-lcudart"]


def cuda_archs(devices: list[tuple[int, int]]) -> list[str]:
    """As TORCH_CUDA_ARCH_LIST says, else those of this machine's GPUs, else every major one that nvcc knows."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for arch in listed:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 9.0+PTX, got {arch!r}")
    return listed or sorted({f"{major}.{minor}" for major, minor in devices}) or ["all-major"]


def arch_flags(archs: list[str]) -> list[str]:
    if archs == ["all-major"]:
        return ["-arch=all-major"]
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def nvcc_flags(archs: list[str]) -> list[str]:
    host = ",".join(["-fPIC", "-fvisibility=hidden", *WARNINGS])
    return [*STANDARD, *arch_flags(archs), "-Werror=all-warnings", f"-Xcompiler={host}"]


def isa_of(source: Path) -> str | None:
    """The x86-64 instruction set that a file's name ends in."""
    return next((isa for isa in X86_ISAS if source.stem.endswith(f"_{isa}")), None)


def sources(decision: Decision) -> list[Path]:
    cpp = [s for s in sorted(CSRC.rglob("*.cpp")) if isa_of(s) in (None, *decision.isas)]
    if not decision.simt:
        cpp = [s for s in cpp if s.parent != CSRC / "simt"]
    return cpp + (sorted(CSRC.rglob("*.cu")) if decision.cuda else [])


def hangs_on_simt(source: Path) -> bool:
    """Whether a C++ file is compiled otherwise in builds with simt: it, or what it includes of ours, asks."""
    return source.suffix == ".cpp" and any("METAFAST_WITH_SIMT" in file.read_text() for file in included(source))


def included(source: Path) -> set[Path]:
    """A file and all of ours that it includes, by whatever way."""
    found, left = set(), [source]
    while left:
        file = left.pop()
        if file in found:
            continue
        found.add(file)
        named = re.findall(r'^#include "(.+)"', file.read_text(), re.M)
        # Not among ours: the emulator's <cuda_runtime.h>, build_info.h, which the build writes.
        left += [path for name in named if (path := (file.parent / name).resolve()).is_file()]
    return found


def write_ninja(decision: Decision, tools: Tools, folder: Path, target: Path) -> None:
    """folder/build.ninja, which builds ``target``; ninja follows the headers, so a second build is incremental."""
    from ninja.ninja_syntax import Writer
    from torch.utils import cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    # What hangs on simt is built twice, side by side.
    variant = folder / ("with-simt" if decision.simt else "without-simt")
    variant.mkdir(exist_ok=True)
    header = (
        f'#pragma once\nnamespace metafast {{\nconstexpr const char* kBuildInfo = R"json({decision.json()})json";\n}}\n'
    )
    if not (variant / "build_info.h").exists() or (variant / "build_info.h").read_text() != header:
        (variant / "build_info.h").write_text(header)

    # As system folders, so that our warnings are not about others' headers.
    system = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    libraries = ["c10", "torch_cpu", "torch", "torch_python"]
    link = [*(f"-L{path}" for path in cpp_extension.library_paths()), *(f"-l{name}" for name in libraries)]
    instrument = []
    if decision.sanitizers:
        instrument = [f"-fsanitize={','.join(decision.sanitizers)}", "-fno-sanitize-recover=all", "-g"]
        instrument += ["-fno-omit-frame-pointer"]
    cxx = [*STANDARD, *ARITHMETIC, "-fPIC", "-fvisibility=hidden", "-fopenmp", *WARNINGS, *instrument]
    varying = [f"-I{variant}", *["-DMETAFAST_WITH_SIMT"] * decision.simt]
    if tools.cuda_home is not None:
        cxx.append("-DMETAFAST_WITH_CUDA")
        system += cuda_headers(tools.cuda_home)
        link += ["-lc10_cuda", *cuda_runtime(tools.cuda_home)]
    cxx += [part for path in system for part in ("-isystem", path)]
    cxx += shlex.split(os.environ.get("CXXFLAGS", ""))
    link += ["-fopenmp", *instrument]

    with (folder / "build.ninja").open("w") as file:
        ninja = Writer(file, width=110)
        ninja.rule("cxx", "$cxx -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
        # What ptxas says of each kernel stays beside the object, for benchmarks/cuda_table.py.
        ninja.rule(
            "nvcc",
            "$nvcc -MD -MF $out.d $nvccflags -Xptxas=-v -c $in -o $out >$out.ptxas 2>&1 || { cat $out.ptxas; exit 1; }",
            depfile="$out.d",
            deps="gcc",
        )
        ninja.rule("link", "$cxx -shared $in -o $out $linkflags")
        ninja.variable("cxx", shlex.join(tools.cxx))
        ninja.variable("flags", shlex.join(cxx))
        ninja.variable("linkflags", shlex.join(link))
        if tools.cuda_home is not None:
            ninja.variable("nvcc", shlex.quote(str(tools.cuda_home / "bin/nvcc")))
            ninja.variable("nvccflags", shlex.join(nvcc_flags(decision.cuda_archs)))
        objects = []
        for source in sources(decision):
            varies = hangs_on_simt(source)
            objects.append(str((variant if varies else folder) / f"{source.relative_to(CSRC)}.o"))
            isa = isa_of(source)
            own = [*(varying if varies else ()), *(X86_ISAS[isa] if isa else ())]
            variables = {"flags": f"$flags {shlex.join(own)}"} if own else None
            ninja.build(objects[-1], "nvcc" if source.suffix == ".cu" else "cxx", str(source), variables=variables)
        for source in sorted(CSRC.rglob("*.cu")) if decision.simt else ():
            objects.append(str(folder / f"{source.relative_to(CSRC)}.simt.o"))
            flags = SIMT if decision.sanitizers else [*SIMT, *SIMT_WATCHED]
            ninja.build(objects[-1], "cxx", str(source), variables={"flags": f"$flags {shlex.join(flags)}"})
        ninja.build(str(target), "link", objects)


class BuildNative(build_ext):
    """Compiles with ninja, in build/native-*, which stays for the next build."""

    def build_extension(self, ext: Extension) -> None:
        import ninja

        parts = (
            f"cp{sys.version_info.major}{sys.version_info.minor}",
            DECISION.torch,
            *DECISION.sanitizers,
        )
        folder = ROOT / "build" / "-".join(("native", *parts))
        target = folder / ("_C-simt.so" if DECISION.simt else "_C.so")
        write_ninja(DECISION, TOOLS, folder, target)
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder), *jobs, str(target)]
        if subprocess.run(command).returncode != 0:
            raise SystemExit("metafast._C did not compile (see above); METAFAST_NO_EXTENSION=1 installs without it")
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not copy_file: it keeps what is newer, which in build/lib may be another torch's or a sanitised build. And a
        # process that has the old file open keeps it.
        path.unlink(missing_ok=True)
        shutil.copy(target, path)


class BuildPython(build_py):
    """Writes the decision beside the Python files."""

    def run(self) -> None:
        super().run()
        package = ROOT / "metafast" if self.editable_mode else Path(self.build_lib, "metafast")
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(DECISION.json())


if __name__ == "__main__":  # so it is for pip too; the tests import the functions
    DECISION, TOOLS = decide()
    setup(
        ext_modules=[Extension("metafast._C", [])] if DECISION.extension else [],
        cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    )
