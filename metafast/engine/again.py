"""A plain meta-step like one before: what was checked then is looked at once more by the extension, in one go.

A meta-step of a small network takes a tenth of a millisecond, and checks in Python would be a tenth of that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from metafast import _native, backend
from metafast.episodes import Episodes, Outcome
from metafast.rules import SGD

if TYPE_CHECKING:
    from metafast.engine.networks import Inner, NativeNetwork

# The outcome of episodes, into ``.grad`` too where that is True; None, before any work, where anything has changed or
# wants another look.
Again = Callable[[Episodes, bool], Outcome | None]

_MODE = frozenset({"training"})  # of a learner and its rule, in which both do the same


def again(learner: nn.Module, network: NativeNetwork, inner: Inner, episodes: Episodes) -> Again | None:
    """The next call of a learner like that for these episodes; None where only the long way is one.

    Args:
        learner: whose attributes, and those of its ``rule``, an :class:`~metafast.rules.SGD`, decide what ``inner`` is.
        network: its model, lowered.
        inner: the inner loop.
        episodes: that fit the model.
    """
    extension = _native.native()
    modules = learner._modules
    rule = modules["rule"]
    plain = type(rule) is SGD and isinstance(inner.rates, float) and inner.optimizer is None and inner.learn_init
    here = backend.current_backend() in ("auto", "cpu") and episodes.support_x.is_cpu
    if extension is None or network.watched is None or not (plain and here):
        return None
    watched = network.watched.and_tables([vars(learner), modules, vars(rule)], _MODE)
    return partial(
        extension.again,
        network.engine,
        extension.PlainInner(
            inner.steps,
            inner.rates,
            inner.first_order,
            inner.batch or 0,
            inner.query_weights or (),
            inner.truncate or 0,
        ),
        watched.and_entries([(vars(backend), "_current")]),
        episodes.signature[0],
        Episodes,
        Outcome,
    )
