"""Kernels on their own, for research code that wants just one."""

from metafast.ops.hvp import hvp
from metafast.ops.inner_update import inner_update
from metafast.ops.lstm import lstm_update
from metafast.ops.momentum_update import momentum_update
from metafast.ops.prototype_loss import prototype_loss
from metafast.ops.prototypes import prototype_logits

__all__ = ["hvp", "inner_update", "lstm_update", "momentum_update", "prototype_logits", "prototype_loss"]
