"""The plain, readable implementations that everything else is compared with."""

from metafast.reference.family import cavia, mamlpp, protomaml, reptile
from metafast.reference.learners import lomaml, maml, protonets
from metafast.reference.lstm import lstm_step, mlp_step

__all__ = ["cavia", "lomaml", "lstm_step", "maml", "mamlpp", "mlp_step", "protomaml", "protonets", "reptile"]
