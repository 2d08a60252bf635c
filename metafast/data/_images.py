"""Decoding image files, with errors that name the file."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

# What Pillow raises on damaged files: OSError for most, the others from the depths of its parsers.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def pillow() -> Any:
    """The module ``PIL.Image``, an optional dependency."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'metafast[data]'") from error
    return Image


def decode(content: bytes, name: str, mode: str) -> Image.Image:
    """Decode a PNG or JPEG into a Pillow mode ("L", "RGB"); ``name`` is for the error message."""
    image = pillow()
    try:
        with image.open(io.BytesIO(content)) as opened:
            converted: Image.Image = opened.convert(mode)
    except _DAMAGED as error:
        raise ValueError(f"{name}: damaged image file ({error})") from error
    return converted


def folder(name: str, value: str | os.PathLike[str]) -> Path:
    """``value`` as an existing folder."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a path to a folder, got {value!r}")
    path = Path(value).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: expected a folder, found none at {str(path)!r}")
    return path
