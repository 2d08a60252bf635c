"""A plain meta-step like one before: what was checked then is looked at once more by the extension, in one go.

A meta-step of a small network takes a tenth of a millisecond, and checks in Python would be a tenth of that.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from metafast import _native, backend
from metafast.episodes import Episodes, Outcome
from metafast.rules import SGD

if TYPE_CHECKING:
    from metafast.engine.networks import Inner, NativeNetwork

# The outcome of a learner's episodes, into ``.grad`` too where that is True; None, before any work, where anything has
# changed or wants another look.
Again = partial[Outcome | None]  # of a learner, episodes and whether into ``.grad``

_MODE = frozenset({"training"})  # of a learner and its rule, in which both do the same
_SETTINGS = ("steps", "first_order", "learn_init", "_support_batch", "_query_weights", "_truncate")
# What a subclass may define that the short way does not pass by.
_HARMLESS = frozenset(
    {"__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__parameters__", "__abstractmethods__"}
    | {"_abc_impl", "__static_attributes__", "__firstlineno__"}
)


def again(
    learner: nn.Module, base: type[nn.Module], network: NativeNetwork, inner: Inner, episodes: Episodes
) -> Again | None:
    """The next call of a learner like that for these episodes; None where only the long way is one.

    Args:
        learner: whose attributes, and those of its ``rule``, an :class:`~metafast.rules.SGD`, decide what ``inner`` is.
        base: the class whose methods are the long way; a subclass that has more than a constructor goes that alone.
        network: its model, lowered.
        inner: the inner loop.
        episodes: that fit the model.
    """
    extension = _native.native()
    rule = learner._modules["rule"]
    here = backend.current_backend() in ("auto", "cpu") and episodes.support_x.is_cpu
    if extension is None or network.watched is None or not here or type(rule) is not SGD:
        return None
    if not (_adds_nothing(type(learner), base) and _is_plain(inner)):
        return None
    if any(_shadows(m) for m in (learner, rule)) or not vars(learner).keys() >= set(_SETTINGS):
        return None
    watched = network.watched.and_modules([learner, rule], _MODE)
    return partial(
        extension.again,
        learner,
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


def is_good(found: Again, learner: nn.Module, network: NativeNetwork) -> bool:
    """Whether a short way is this learner's, by this network, and nothing that it watches has changed."""
    owner, engine, _, watched = found.args[:4]
    extension = _native.native()
    return owner is learner and engine is network.engine and extension is not None and extension.unchanged(watched)


def _adds_nothing(kind: type, base: type) -> bool:
    """Whether a subclass has the methods and properties of its base, all of them and no more."""
    return all(vars(one).keys() <= _HARMLESS for one in kind.__mro__ if one not in base.__mro__)


def _is_plain(inner: Inner) -> bool:
    """Whether it is phi - rate g from learned parameters, of values that cannot change in place."""
    immutable = (type(inner.steps), type(inner.rates), type(inner.first_order)) == (int, float, bool)
    return immutable and inner.learn_init is True and inner.optimizer is None


def _shadows(module: nn.Module) -> bool:
    """Whether a module has attributes of its own in the place of its class's, a method for instance."""
    return any(hasattr(type(module), key) for key in vars(module))
