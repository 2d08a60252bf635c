"""The learners: MAML, LOMAML, ProtoNets and their family."""

from metafast.learners.base import Adapted, GradientLearner
from metafast.learners.cavia import CAVIA
from metafast.learners.hand import TaskLearner
from metafast.learners.lomaml import LOMAML
from metafast.learners.maml import MAML
from metafast.learners.protomaml import ProtoMAML
from metafast.learners.protonets import ProtoNets
from metafast.learners.reptile import Reptile

__all__ = [
    "CAVIA",
    "LOMAML",
    "MAML",
    "Adapted",
    "GradientLearner",
    "ProtoMAML",
    "ProtoNets",
    "Reptile",
    "TaskLearner",
]
