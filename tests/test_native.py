"""The extension's states on import: each instruction set, stale or broken builds, no build, and forced backends.

Each scenario runs in a process of its own on a copy of the package, see tests/native_process.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import metafast as mf
from metafast import _native
from tests.backends import native

PACKAGE = Path(mf.__file__).parent
EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
ISAS = ("baseline", "avx2", "avx512")
UPDATED = [[0.75] * 64]
BUILT = _native.BuildInfo(
    extension=True,
    reason="",
    torch=torch.__version__,
    python="",
    machine="",
    compiler="",
    isas=ISAS,
    sanitizers=(),
    simt=False,
    cuda="",
    cuda_reason="",
    cuda_archs=(),
)
needs_build = pytest.mark.skipif(not _native.status().available, reason=f"no extension: {_native.status().reason}")


@dataclass
class Scenario:
    """A copy of the package, with the real extension or with what the other fields say."""

    environment: dict[str, str] = field(default_factory=dict)
    as_built: bool = False
    info: str | None = None  # _build_info.json; None: no such file
    extension: bytes | None = None

    def lay_out(self, folder: Path) -> dict[str, Any]:
        kept = () if self.as_built else ("_C*.so", "_build_info.json")
        package = folder / "metafast"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns(*kept))
        if self.info is not None:
            (package / "_build_info.json").write_text(self.info)
        if self.extension is not None:
            (package / EXTENSION).write_bytes(self.extension)
        return {"package": str(folder), "environment": self.environment}


def info(**changes: Any) -> str:
    return json.dumps(asdict(replace(BUILT, **changes)))


STALE = {
    "another torch": (
        Scenario(info=info(torch="1.0.0")),
        "built for torch 1.0.0, this is " + re.escape(torch.__version__),
    ),
    "no library": (Scenario(info=info()), "No module named 'metafast._C'"),
    "an empty library": (Scenario(info=info(), extension=b""), "ImportError: .*file too short"),
    "no library inside": (Scenario(info=info(), extension=b"not ELF" * 99), "ImportError: .*invalid ELF header"),
    "truncated info": (Scenario(info=info()[:-20]), "_build_info.json is not this version's"),
    "other info": (Scenario(info='{"extension": true}'), "_build_info.json is not this version's"),
    "list for info": (Scenario(info="[]"), "_build_info.json is not this version's: expected an object, got list"),
    "another build": (Scenario(as_built=True, info=info()), "another build than _build_info.json"),
}
SCENARIOS = {
    **{f"isa {isa}": Scenario({"METAFAST_CPU_ISA": isa}, as_built=True) for isa in (*ISAS, "AVX2")},
    "isa without extension": Scenario({"METAFAST_CPU_ISA": "avx2"}),
    **{f"stale: {name}": scenario for name, (scenario, _) in STALE.items()},
    "sources only": Scenario(),
    "built without": Scenario(info=info(extension=False, reason="METAFAST_NO_EXTENSION was set")),
    "backend torch": Scenario({"METAFAST_BACKEND": "torch"}, as_built=True),
    "backend cpu": Scenario({"METAFAST_BACKEND": "cpu"}, as_built=True),
    "backend cpu without extension": Scenario({"METAFAST_BACKEND": "cpu"}),
    "backend simt": Scenario({"METAFAST_BACKEND": "simt"}, as_built=True),
    "backend unknown": Scenario({"METAFAST_BACKEND": "gpu"}),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    laid = [scenario.lay_out(tmp_path_factory.mktemp("scenario")) for scenario in SCENARIOS.values()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("METAFAST_")}
    program = [sys.executable, str(Path(__file__).parent / "native_process.py"), json.dumps(laid)]
    # Started in a folder of the scenarios: the checkout must not be importable.
    done = subprocess.run(
        program, env=environment, cwd=laid[0]["package"], check=True, stdout=subprocess.PIPE, text=True
    )
    return dict(zip(SCENARIOS, json.loads(done.stdout)))


@needs_build
@pytest.mark.parametrize("isa", ISAS)
def test_the_variable_forces_an_instruction_set(outcomes: dict[str, dict[str, Any]], isa: str) -> None:
    outcome = outcomes[f"isa {isa}"]
    if isa not in _native.status().isas:
        assert outcome["error"].startswith(f"ValueError: METAFAST_CPU_ISA: this machine does not run '{isa}'")
        return
    assert outcome["error"] == "" and outcome["warnings"] == []
    assert outcome["available"] and outcome["isa"] == isa and outcome["isas"] == list(_native.status().isas)
    assert outcome["torch.float32"] == UPDATED and outcome["meta_step"] is True
    if isa != "baseline" or os.uname().machine == "x86_64":
        assert outcome["residual"] is (isa != "baseline")


@needs_build
def test_an_unknown_instruction_set_is_an_error_on_import(outcomes: dict[str, dict[str, Any]]) -> None:
    wanted = "ValueError: METAFAST_CPU_ISA: expected one of baseline, avx2, avx512, got 'AVX2'"
    assert outcomes["isa AVX2"]["error"] == wanted


def test_an_instruction_set_without_the_extension_is_an_error_on_import(outcomes: dict[str, dict[str, Any]]) -> None:
    error = outcomes["isa without extension"]["error"]
    assert error.startswith("ValueError: METAFAST_CPU_ISA: there is no extension to use it: metafast was not installed")


@pytest.fixture
def _isa_again() -> Iterator[None]:
    before = _native.status().isa
    yield
    _native.native().use_isa(before)


@native
@pytest.mark.usefixtures("_isa_again")
def test_instruction_sets_in_one_process() -> None:
    for isa in _native.status().isas:
        _native.native().use_isa(isa)
        assert _native.status().isa == isa
    with pytest.raises(ValueError, match="^isa: expected one of baseline, avx2, avx512, got 'sse'"):
        _native.native().use_isa("sse")
    assert _native.status().isa == _native.status().isas[-1]


@pytest.mark.parametrize("name", STALE)
def test_a_stale_extension_is_a_loud_warning(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    if STALE[name][0].as_built and not _native.status().available:
        pytest.skip(f"no extension: {_native.status().reason}")
    outcome, reason = outcomes[f"stale: {name}"], STALE[name][1]
    assert outcome["error"] == ""
    [warning] = outcome["warnings"]
    assert warning.startswith("RuntimeWarning: metafast: the extension cannot be used: ")
    assert re.search(reason, warning)
    assert "PyTorch's operations are used, slower; build it again with `make build`" in warning
    assert outcome["available"] is False and outcome["backends"] == []
    assert re.search(reason, outcome["reason"])
    assert outcome["torch.float32"] == UPDATED and outcome["torch.float16"] == UPDATED
    assert outcome["residual"] is False and outcome["meta_step"] is True


@pytest.mark.parametrize(
    ("name", "reason"), [("sources only", "not installed, only its sources"), ("built without", "NO_EXTENSION was set")]
)
def test_no_extension_is_quiet_and_has_a_reason(outcomes: dict[str, dict[str, Any]], name: str, reason: str) -> None:
    outcome = outcomes[name]
    assert outcome["error"] == "" and outcome["warnings"] == []
    assert outcome["available"] is False and reason in outcome["reason"]
    assert outcome["torch.float32"] == UPDATED and outcome["meta_step"] is True


@needs_build
def test_the_torch_backend_leaves_the_kernels_alone(outcomes: dict[str, dict[str, Any]]) -> None:
    outcome = outcomes["backend torch"]
    assert outcome["error"] == "" and outcome["backend"] == "torch" and outcome["available"] is True
    assert outcome["torch.float32"] == UPDATED and outcome["torch.float16"] == UPDATED
    assert outcome["residual"] is False


@needs_build
def test_a_forced_backend_never_falls_back(outcomes: dict[str, dict[str, Any]]) -> None:
    outcome = outcomes["backend cpu"]
    assert outcome["error"] == "" and outcome["backend"] == "cpu" and outcome["torch.float32"] == UPDATED
    forced = "Refusal: params: backend 'cpu' is forced, but the kernels take float32 and float64, got a float16 tens"
    assert outcome["torch.float16"].startswith(forced)
    assert outcome["torch.int32"].startswith("TypeError: params: expected a floating tensor")


@needs_build
def test_the_environment_forces_simt(outcomes: dict[str, dict[str, Any]]) -> None:
    outcome = outcomes["backend simt"]
    assert outcome["error"] == "" and outcome["backend"] == "simt"
    if "simt" in _native.status().backends:
        assert outcome["torch.float32"] == UPDATED and outcome["simt_blocks"] > 0
    else:
        wanted = "there are no kernels for simt: the extension was built without METAFAST_SIMT=1"
        assert outcome["torch.float32"] == f"Refusal: params: backend 'simt' is forced, but {wanted}"


def test_a_forced_backend_that_is_not_there(outcomes: dict[str, dict[str, Any]]) -> None:
    update = outcomes["backend cpu without extension"]["torch.float32"]
    forced = "Refusal: params: backend 'cpu' is forced, but there are no kernels for cpu: metafast was not installed"
    assert update.startswith(forced)
    wanted = "METAFAST_BACKEND: expected one of 'auto', 'torch', 'cpu', 'cuda', 'simt', got 'gpu'"
    assert outcomes["backend unknown"]["error"] == f"ValueError: {wanted}"
