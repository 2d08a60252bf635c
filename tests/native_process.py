"""Imports metafast afresh many times at the price of one; tests/test_native.py runs this as a program.

torch takes seconds to import and metafast a tenth of one: this process imports torch once and forks for each scenario
of its argument, a JSON list of {"package": the folder that holds metafast, "environment": variables}. It prints a JSON
list with what :func:`outcome` saw in each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # torch.func imports it when first used: once here, not in each scenario


def attempt(call: Callable[[], Any]) -> Any:
    """What came of a call: its value or the error's text."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def outcome(package: str) -> dict[str, Any]:
    """The warnings and errors of the import, and what works after it."""
    # Of metafast installed from a clone only what the folder holds may be found.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
    sys.path.insert(0, package)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = attempt(lambda: __import__("metafast") and "")
    seen = {"error": error, "warnings": [f"{w.category.__name__}: {w.message}" for w in caught]}
    return seen if error else seen | after_import(package)


def after_import(package: str) -> dict[str, Any]:
    import metafast as mf
    from metafast import _native

    assert mf.__file__.startswith(package)

    def update(dtype: torch.dtype, rate: float = 0.25, gradient: float = 1.0) -> list[float]:
        return mf.ops.inner_update(torch.ones(1, 64).to(dtype), torch.full((1, 64), gradient).to(dtype), rate).tolist()

    def meta_step() -> bool:
        maml = mf.MAML(mf.models.MLP(1, (4,), 1, activation="tanh"), lr=0.1, steps=2, loss="mse")
        maml(mf.data.Sinusoid().sample(tasks=2, shots=3, queries=4)).loss.backward()
        return all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in maml.parameters())

    tiny = 2.0**-13
    status = _native.status()
    return {
        **{name: getattr(status, name) for name in ("available", "reason", "backends", "isas", "isa")},
        "backend": mf.current_backend(),
        **{str(dtype): attempt(lambda dtype=dtype: update(dtype)) for dtype in (torch.float32, torch.half, torch.int)},
        # The product rounds to 1: all 0. With fused multiply-add instructions its rounding error is left over.
        "residual": attempt(lambda: set(*update(torch.float32, 1 - tiny, 1 + tiny)) != {0.0}),
        "meta_step": attempt(meta_step),
        "simt_blocks": getattr(_native.native(), "simt_blocks", int)(),
    }


def main() -> None:
    outcomes = []
    for scenario in json.loads(sys.argv[1]):
        with tempfile.TemporaryFile("w+") as file:
            child = os.fork()
            if child == 0:
                os.environ.update(scenario["environment"])
                json.dump(outcome(scenario["package"]), file)
                file.flush()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0, scenario
            file.seek(0)
            outcomes.append(json.load(file))
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
