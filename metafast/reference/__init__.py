"""The plain, readable implementations that everything else is compared with."""

from metafast.reference.learners import lomaml, maml, protonets
from metafast.reference.lstm import lstm_step, mlp_step

__all__ = ["lomaml", "lstm_step", "maml", "mlp_step", "protonets"]
