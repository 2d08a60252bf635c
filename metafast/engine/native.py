"""The native engine: the inner loop over all tasks by the extension's kernels, for any update rule.

From the public function to the loop: metafast/learners -> here -> csrc/torch/engine.cpp -> csrc/cpu/unroll.h or
csrc/cuda/engine.cu, and in both csrc/engine/unroll.h.
"""

from __future__ import annotations

from torch import Tensor

from metafast.engine.adjoint import AdjointEngine
from metafast.engine.networks import NativeNetwork
from metafast.engine.task_model import TaskModel
from metafast.rules import UpdateRule


class NativeEngine(AdjointEngine):
    """The four functions by the extension, for any update rule."""

    def __init__(self, task: TaskModel, rule: UpdateRule, first_order: bool, network: NativeNetwork) -> None:
        super().__init__(task, rule, first_order)
        self.network = network

    def support_grad(self, phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """(T, P) gradients of the support losses at phi (T, P)."""
        gradients: Tensor = self.network.engine.gradient(phi, self.network.constants(), x, y)
        return gradients

    def hvp(self, phi: Tensor, x: Tensor, y: Tensor, vector: Tensor) -> Tensor:
        """(T, P) products of the support losses' Hessians at phi (T, P) with vectors (T, P)."""
        products: Tensor = self.network.engine.hvp(phi, self.network.constants(), x, y, vector)
        return products

    def outputs(self, phi: Tensor, x: Tensor) -> Tensor:
        """(T, N, D) outputs, outside of autograd; phi (T, P), or (P,) for all tasks."""
        outputs: Tensor = self.network.engine.outputs(phi, self.network.constants(), x)
        return outputs

    def pullback(self, phi: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
        """(T, P) cotangents of phi for those of the outputs, (T, N, D)."""
        cotangents: Tensor = self.network.engine.pullback(phi, self.network.constants(), x, cotangent)
        return cotangents
