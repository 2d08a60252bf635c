"""DistributedDataParallel(learner): two processes take the steps of one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import metafast as mf
from tests.nets import build, episodes_for, relative_error
from tests.processes import in_two
from tests.test_robustness import LEARNERS, made

BAR = 1e-10
TASKS = 5


def frozen_start() -> mf.LOMAML:
    return mf.LOMAML(build("mlp"), mf.LSTMOptimizer(3).double(), lr=0.1, steps=2, learn_init=False)


def conv4(batch_norm: str) -> mf.MAML:
    return mf.MAML(build("conv4"), lr=0.1, steps=1, batch_norm=batch_norm)


# The learner, its net's name, DistributedDataParallel's options.
CASES: dict[str, tuple[Callable[[], Any], str, dict[str, bool]]] = {
    **{kind: (lambda kind=kind: made(kind), "mlp", {}) for kind in LEARNERS},
    "maml, static": (lambda: made("maml"), "mlp", {"static_graph": True}),
    "lomaml, static": (lambda: made("lomaml"), "mlp", {"static_graph": True}),
    "protonets, static": (lambda: made("protonets"), "mlp", {"static_graph": True}),
    "maml, views": (lambda: made("maml"), "mlp", {"gradient_as_bucket_view": True}),
    "lomaml, unused": (frozen_start, "mlp", {"find_unused_parameters": True}),
    "conv4": (lambda: conv4("batch"), "conv4", {}),
    # By torch; DistributedDataParallel sends the statistics, which are buffers, at each call.
    "conv4, running": (lambda: conv4("running"), "conv4", {}),
}


def steps(learner: Any, net: str, gradient: Callable[[mf.Episodes], None]) -> Tensor:
    """The parameters after ten steps of gradient descent with momentum."""
    outer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for number in range(2 if net == "conv4" else 10):
        outer.zero_grad()
        gradient(episodes_for(net, tasks=TASKS, seed=number))
        outer.step()
    return torch.nn.utils.parameters_to_vector(learner.parameters()).detach()


def shared(rank: int) -> dict[str, Tensor]:
    """The parameters of each case, two of the five tasks here and three there."""
    mine = [slice(0, 2), slice(2, TASKS)][rank]
    found = {}

    def trained(learner: Any, net: str, options: dict[str, bool], accumulate: bool = False) -> Tensor:
        wrapped = DistributedDataParallel(learner, **options)

        def gradient(episodes: mf.Episodes) -> None:
            parts = [episodes[mine]]
            if accumulate:  # all but the last part's gradients stay here
                parts = [parts[0][:1], parts[0][1:]]
            for part in parts:
                # The mean over two processes of these weights' sums is the mean over all tasks.
                weights = torch.full((part.tasks,), 2 / TASKS, dtype=torch.float64)
                with contextlib.nullcontext() if part is parts[-1] else wrapped.no_sync():
                    wrapped(part, weights).loss.backward()

        return steps(learner, net, gradient)

    for name, (make, net, options) in CASES.items():
        found[name] = trained(make(), net, options)
    found["accumulated"] = trained(made("maml"), "mlp", {}, accumulate=True)
    with mf.use_backend("torch"):
        found["torch"] = trained(made("maml"), "mlp", {})
    return found


@pytest.mark.filterwarnings("ignore:.*runs by torch, without native kernels")
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    first, second = in_two(shared, tmp_path)
    assert list(first) == [*CASES, "accumulated", "torch"]
    wanted = {}
    for name, (make, net, _) in {**CASES, "accumulated": CASES["maml"], "torch": CASES["maml"]}.items():
        learner = make()
        start = torch.nn.utils.parameters_to_vector(learner.parameters()).detach().clone()
        wanted[name] = steps(learner, net, lambda episodes, learner=learner: learner(episodes).loss.backward())
        assert relative_error(wanted[name], start) >= 1e-4, name
    for name, parameters in wanted.items():
        assert torch.equal(first[name], second[name]), name
        assert relative_error(first[name], parameters) <= BAR, name


def test_tensors_of_an_outcome_are_seen() -> None:
    """By torch's walk over what a module returns, on which DistributedDataParallel relies."""
    out = made("maml")(episodes_for("mlp"))
    leaves, spec = torch.utils._pytree.tree_flatten(out)
    assert [id(leaf) for leaf in leaves] == [id(t) for t in (out.loss, out.losses, out.logits, out.accuracy)]
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, mf.Outcome) and again.loss is out.loss
