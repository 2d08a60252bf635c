"""What mkdocstrings reads of a docstring: reStructuredText's roles as Markdown, and ``Example:`` as a section of it."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`(~?)([\w.]+)`")


def _reference(role: re.Match[str]) -> str:
    shown = role[2].rpartition(".")[2] if role[1] else role[2]
    # Optional: what has no entry stays plain code.
    return f'<autoref identifier="{role[2]}" optional><code>{shown}</code></autoref>'


def markdown(docstring: str) -> str:
    """The docstring as Markdown in Google's style; doctests stay as they are."""
    text = _ROLE.sub(_reference, docstring)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


class Roles(griffe.Extension):
    """Applies :func:`markdown` to every docstring of the package."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
