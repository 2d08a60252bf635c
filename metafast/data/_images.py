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

# The formats of the datasets: Pillow knows dozens, whose parsers a damaged file has no business to reach.
_FORMATS = ("PNG", "JPEG")
# What Pillow raises on damaged files: OSError for most, the others from the depths of its parsers.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def pillow() -> Any:
    """The module ``PIL.Image``, an optional dependency."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'metafast[data]'") from error
    return Image


def decode(content: bytes, name: str, mode: str, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode a PNG or JPEG into a Pillow mode ("L", "RGB").

    Args:
        content: the file.
        name: what to call it in an error message.
        mode: Pillow's name of the mode.
        size: the only (width, height) that is right; None: any, up to Pillow's ``MAX_IMAGE_PIXELS``.

    Raises:
        ValueError: a damaged file, or one of another size, which is found out before its pixels are decoded.
    """
    image = pillow()
    damaged = (*_DAMAGED, image.DecompressionBombError, image.DecompressionBombWarning)
    try:
        # Decoding leaves out the checksums of a PNG's pixels, and after verify() a file has to be opened again.
        with image.open(io.BytesIO(content), formats=_FORMATS) as opened:
            width, height = opened.size
            opened.verify()
    except damaged as error:
        raise ValueError(f"{name}: damaged image file ({error})") from error
    if size is not None and (width, height) != size:
        raise ValueError(f"{name}: expected {size[0]}x{size[1]} pixels, got {width}x{height}")
    most = image.MAX_IMAGE_PIXELS  # up to twice as many Pillow only warns
    if most is not None and width * height > most:
        raise ValueError(f"{name}: expected at most {most} pixels, got {width}x{height}")
    try:
        with image.open(io.BytesIO(content), formats=_FORMATS) as opened:
            converted: Image.Image = opened.convert(mode)
    except damaged as error:
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
