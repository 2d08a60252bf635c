"""metafast/bench/cost.py: flops by hand, launches by hand and as the emulator counts them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import metafast as mf
from metafast import _native
from metafast.bench import workloads
from metafast.bench.cost import Call, Cost, cost_of, seconds
from metafast.bench.plan import plan
from metafast.bench.workloads import WORKLOADS, Workload, build
from metafast.engine.lowering import lower
from tests.backends import one_launch
from tests.test_gpu_page import predict

simt = pytest.mark.skipif(bool(_native.missing("simt")), reason=_native.missing("simt"))
PROTONETS = replace(WORKLOADS["protonets-conv4-64"], tasks=2, ways=3, shots=2, width=4, image=(1, 16, 16))


def test_flops_of_a_meta_step_by_hand() -> None:
    """A 1-40-40-1 net: three products of a forward's size in a gradient, six in the tangents of a Hessian's."""
    forward, first = 2 * (40 + 1600 + 40), 2 * 40
    gradient, tangents = 3 * forward - first, 6 * forward - 4 * first
    parameters = 40 + 40 + 1600 + 40 + 40 + 1
    for name, steps in (("sinusoid-k1", 1), ("sinusoid-k5", 5)):
        wanted = 25 * (10 * ((steps + 1) * gradient + steps * tangents) + steps * 2 * parameters)
        assert cost_of(WORKLOADS[name]).flops == wanted
    # Steps that are not kept are done again, without the weights' gradients.
    again = 2 * forward - first
    long = replace(WORKLOADS["sinusoid-k5"], tasks=1, shots=1000)
    assert cost_of(long).flops == 1000 * (5 * (gradient + tangents) + 4 * again) + 10 * gradient + 10 * parameters
    # The prototypes' net is forward and backward once, and the head's three products.
    few, more = cost_of(PROTONETS), cost_of(replace(PROTONETS, tasks=4))
    assert (more.flops, more.bytes > few.bytes, more.launches) == (2 * few.flops, True, few.launches)


def test_launches_of_a_meta_step_by_hand() -> None:
    """Three fused layers, of which the last has the biases' gradient in a launch of its own."""
    forward, backward = 3, 1 + 2 + 3
    step, query = forward + 1 + backward + 1, forward + 3 + backward  # loss, update; outputs, loss, its sum
    back, ends = forward + 1 + backward + 1, 1 + 1 + 2  # loss, adjoint; theta, sum over tasks, to user
    assert cost_of(WORKLOADS["sinusoid-k1"]).launches == step + query + back + ends == 38
    assert cost_of(WORKLOADS["sinusoid-k5"]).launches == 5 * step + query + 5 * back + ends == 126


def _odd(w: Workload) -> nn.Module:
    """Kinds of layers, strides and biases that the workloads' own networks lack."""
    norm = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    first = [nn.ELU(), nn.Conv2d(1, 4, 3, 3, 1, bias=False), nn.GroupNorm(2, 4), nn.AvgPool2d(2, 1), nn.Tanh()]
    then = [nn.Conv2d(4, 3, 1, 3), norm, nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 3, 1, 3), nn.Flatten()]
    last = [nn.LayerNorm(3), nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*first, *then, *last, nn.Linear(5, 3), nn.GELU(), nn.Linear(3, w.ways))


def _tiny(name: str, **changes: Any) -> Workload:
    """As many launches as with more of all."""
    w = replace(WORKLOADS[name], tasks=1, queries=1, width=2)
    w = replace(w, ways=2, shots=1) if w.ways else replace(w, shots=2)
    return replace(w, **changes)


ODD = _tiny("conv4-64-k1", net="odd", image=(1, 14, 14), steps=2)
CONV4 = _tiny("conv4-64-k1", image=(1, 16, 16), steps=2)
STRIDED = _tiny("odd-strided", image=(1, 12, 12))
COUNTED = {
    "sinusoid-k1": _tiny("sinusoid-k1"),
    "sinusoid-k5": _tiny("sinusoid-k5"),
    "lomaml": _tiny("lomaml-sinusoid", steps=2),
    "conv4": CONV4,
    "conv4, K=1, a large batch norm": _tiny("conv4-64-k1", shots=2, image=(1, 20, 20)),
    "odd-mlp": _tiny("odd-mlp"),
    "odd-blocks": _tiny("odd-blocks", image=(1, 10, 10)),
    "omniglot-fc": _tiny("omniglot-fc", image=(1, 28, 28)),
    "strided": STRIDED,
    "protonets": _tiny("protonets-conv4-64", image=(1, 16, 16)),
    "few outputs first": _tiny("sinusoid-k1", net="few"),
    "odd layers": ODD,
    "odd layers, large norms": replace(ODD, shots=129, steps=1),
}


@pytest.fixture(autouse=True)
def _odd_nets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workloads._NETS, "odd", _odd)
    monkeypatch.setitem(workloads._NETS, "few", lambda w: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)))


def _launched(w: Workload, first_order: bool = False, fused: bool = False) -> int:
    """Kernels that the emulator runs in a meta-step."""
    problem, module = build(w), _native.native()
    assert module is not None
    options: dict[str, Any] = {"lr": w.lr, "steps": w.steps, "loss": w.loss, "first_order": first_order}
    learner: Any
    if w.learner == "maml":
        learner = mf.MAML(problem.model, **options)
    elif w.learner == "lomaml":
        learner = mf.LOMAML(problem.model, problem.optimizer, **options)
    else:
        learner = mf.ProtoNets(problem.model)
    before = module.simt_launches()
    with mf.use_backend("simt"), one_launch(fused):
        learner.accumulate_grad(problem.episodes)
    return int(module.simt_launches() - before)


@simt
@pytest.mark.parametrize("name", COUNTED)
def test_the_emulator_counts_as_many_launches(name: str) -> None:
    assert _launched(COUNTED[name]) == cost_of(COUNTED[name]).launches


@simt
@pytest.mark.parametrize("name", ["sinusoid-k5", "conv4", "lomaml"])
def test_the_emulator_counts_as_many_launches_of_first_order(name: str) -> None:
    w = replace(COUNTED[name], steps=1) if name == "lomaml" else COUNTED[name]
    assert _launched(w, first_order=True) == cost_of(w, first_order=True).launches < cost_of(w).launches


@simt
@pytest.mark.parametrize("w", [_tiny("sinusoid-k1", steps=2), *(replace(w, steps=3) for w in (CONV4, STRIDED, ODD))])
def test_inner_steps_are_kept_up_to_the_same_size(w: Workload) -> None:
    """Of two sizes next to each other the engine does the larger one's gradients twice, and both counts say so."""
    problem = build(w)
    network = plan(lower(problem.model, tuple(problem.episodes.support_x.shape[2:]), "batch"))
    most = max(n for n in range(1, 1000) if network.keeps(n * max(1, w.ways), w.steps))
    few, more = (cost_of(replace(w, shots=n)) for n in (most, most + 1))
    assert few.launches < more.launches
    assert [_launched(replace(w, shots=n)) for n in (most, most + 1)] == [few.launches, more.launches]


def test_no_chain_and_no_steps_have_no_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.linear(x)

    monkeypatch.setitem(workloads._NETS, "skips", lambda w: Skips())
    with pytest.raises(ValueError, match="^network: expected a chain of layers, got layer 'add' with another input$"):
        cost_of(_tiny("sinusoid-k1", net="skips"))
    with pytest.raises(ValueError, match="^workload: expected at least one inner step, got 0$"):
        cost_of(_tiny("sinusoid-k1", steps=0))


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_has_a_cost(name: str) -> None:
    cost = cost_of(WORKLOADS[name])
    assert min(cost.flops, cost.bytes, cost.launches) > 0
    assert min(call.launches for call in cost.calls) > 0
    assert cost.json() == {"flops": cost.flops, "bytes": cost.bytes, "launches": cost.launches}
    assert seconds(cost, 1e99, 1e99, 1.0) == cost.launches
    assert seconds(cost, 1.0, 1e99, 0.0) == pytest.approx(cost.flops)


def test_a_call_takes_the_longest_of_what_bounds_it() -> None:
    cost = Cost((Call("a", 12, 1, launches=2), Call("b", 1, 40)))
    assert seconds(cost, 2.0, 10.0, 1.0) == 6.0 + 4.0


@simt
@pytest.mark.parametrize("name", predict.FUSED)
def test_of_small_mlps_there_are_few_launches(name: str) -> None:
    assert _launched(COUNTED[name], fused=True) == predict.fused_launches(COUNTED[name])
