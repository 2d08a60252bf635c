"""The learners: MAML, LOMAML, ProtoNets."""

from metafast.learners.base import Adapted, GradientLearner
from metafast.learners.hand import TaskLearner
from metafast.learners.lomaml import LOMAML
from metafast.learners.maml import MAML
from metafast.learners.protonets import ProtoNets

__all__ = ["LOMAML", "MAML", "Adapted", "GradientLearner", "ProtoNets", "TaskLearner"]
