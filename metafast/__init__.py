"""metafast: fast, exact meta-learning."""

from metafast import data, models, ops, reference
from metafast.backend import current_backend, use_backend
from metafast.coordinatewise import CoordinatewiseOptimizer
from metafast.episodes import Episodes, Outcome
from metafast.explain import explain
from metafast.learners import (
    CAVIA,
    LOMAML,
    MAML,
    Adapted,
    GradientLearner,
    ProtoMAML,
    ProtoNets,
    Reptile,
    TaskLearner,
)
from metafast.lstm import LSTMOptimizer
from metafast.mlp_optimizer import MLPOptimizer
from metafast.rules import SGD, LayerRates, LearnedRates, LearnedRule, Momentum, PartialSGD, StepNorms, UpdateRule
from metafast.version import __version__

__all__ = [
    "CAVIA",
    "LOMAML",
    "MAML",
    "SGD",
    "Adapted",
    "CoordinatewiseOptimizer",
    "Episodes",
    "GradientLearner",
    "LSTMOptimizer",
    "LayerRates",
    "LearnedRates",
    "LearnedRule",
    "MLPOptimizer",
    "Momentum",
    "Outcome",
    "PartialSGD",
    "ProtoMAML",
    "ProtoNets",
    "Reptile",
    "StepNorms",
    "TaskLearner",
    "UpdateRule",
    "__version__",
    "current_backend",
    "data",
    "explain",
    "models",
    "ops",
    "reference",
    "use_backend",
]
