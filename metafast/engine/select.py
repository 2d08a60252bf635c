"""Which engine runs a learner's tasks, and the one warning when it is not the expected one."""

from __future__ import annotations

import warnings
from collections.abc import Hashable

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from metafast.engine.autocast import autocast_state
from metafast.engine.looped import LoopEngine
from metafast.engine.native import NativeEngine
from metafast.engine.networks import NativeNetwork
from metafast.engine.task_model import Params, TaskModel
from metafast.engine.vmapped import VmapEngine
from metafast.rules import UpdateRule

Engine = NativeEngine | VmapEngine | LoopEngine


class EngineChoice:
    """Chooses and remembers an engine for one learner, for each mode (train, eval) of its model and each autocast."""

    def __init__(self, task: TaskModel, rule: UpdateRule, first_order: bool) -> None:
        self.vmapped = VmapEngine(task, rule, first_order)
        self.looped = LoopEngine(task, rule, first_order)
        self.task = task
        self.rule = rule
        self.first_order = first_order
        self._chosen: dict[tuple[Hashable, ...], Engine] = {}

    def __call__(self, x: Tensor, y: Tensor) -> Engine:
        """The engine for support sets x (T, Ns, ...), y (T, Ns, ...); warns once if it is not the native one."""
        network = self.task.native(x)
        if network is not None:
            return self.on(network)
        mode = (*self.task.mode(), *autocast_state(x.device))
        if mode not in self._chosen:
            reason = vmap_obstacle(self.task, x[:1], y[:1])
            self._chosen[mode] = self.looped if reason else self.vmapped
            warn_of_loop(self.task, reason)
            if reason is None:
                self.task.native.warn(x)
        return self._chosen[mode]

    def on(self, network: NativeNetwork) -> NativeEngine:
        """The engine of a lowered network."""
        return NativeEngine(self.task, self.rule, self.first_order, network)


def warn_of_loop(task: TaskModel, reason: str | None) -> None:
    """Say once, for each model, that its tasks run one after the other and why."""
    if reason is None or task.warned_of_loop:
        return
    task.warned_of_loop = True
    warnings.warn(
        f"metafast: {type(task.model).__name__} runs by a loop over tasks, which is slower: {reason}",
        UserWarning,
        stacklevel=6,
    )


def vmap_obstacle(task: TaskModel, x: Tensor, y: Tensor) -> str | None:
    """Why torch.func.vmap cannot take the model's gradient and Hessian-vector product; None if it can.

    Tried on one task, with the generators' state kept, since only the attempt tells.
    """
    params, constants = task.layout.split(task.theta().detach().unsqueeze(0)), task.constants()

    def probe(params: Params, x: Tensor, y: Tensor) -> Params:
        pull = vjp(lambda p: grad(task.task_loss)(p, constants, x, y), params)[1]
        product: Params = pull(params)[0]
        return product

    devices = [x.device] if x.device.type == "cuda" else []
    with task.policy(), torch.random.fork_rng(devices=devices):
        try:
            vmap(probe)(params, x, y)
        except RuntimeError as error:
            # If the model itself is at fault, the loop raises the same error in plain words.
            return str(error).strip().splitlines()[0]
    return None
