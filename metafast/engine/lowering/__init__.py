"""Lowering: what the native engine runs of a module."""

from metafast.engine.guard import NotLowered
from metafast.engine.lowering.lower import lower
from metafast.engine.lowering.lowered import Kind, Lowered, LoweredLayer
from metafast.engine.lowering.replay import replay

__all__ = ["Kind", "Lowered", "LoweredLayer", "NotLowered", "lower", "replay"]
