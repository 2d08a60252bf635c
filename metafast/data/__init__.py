"""Few-shot datasets; every one has a vectorised, seeded ``sample(...)`` that returns Episodes."""

from metafast.data._classes import ClassTable
from metafast.data.from_dataset import from_dataset
from metafast.data.glyphs import Glyphs
from metafast.data.mini_imagenet import MiniImageNet
from metafast.data.omniglot import Omniglot
from metafast.data.sinusoid import Sinusoid, SinusoidTasks

__all__ = [
    "ClassTable",
    "Glyphs",
    "MiniImageNet",
    "Omniglot",
    "Sinusoid",
    "SinusoidTasks",
    "from_dataset",
]
