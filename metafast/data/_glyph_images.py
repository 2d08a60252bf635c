"""Rendering of the Glyphs dataset: letters x faces x variants as 28x28 pictures.

Every letter is drawn once in every face at four times the final size, then each variant resamples that
drawing under its own rotation, scale and shift, all in batches. :func:`fingerprint` covers all that the
pictures depend on, this file included, so that a cache keyed by it never holds pictures of other fonts,
options or code.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from metafast.data._cache import Arrays

FACES = tuple(
    f"DejaVu{face}.ttf"
    for face in (
        *("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique"),
        *("SansMono", "SansMono-Bold", "SansMono-Oblique", "SansMono-BoldOblique"),
        *("Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic"),
    )
)
SPLITS = ("train", "val", "test")
# Letters of no script of their own (modifiers, the Ohm sign) are mostly Latin and Greek ones in another size.
SCRIPT_SPLIT = {
    "LATIN": "train",
    "GREEK": "train",
    "COMMON": "train",
    "CYRILLIC": "val",
    "ARMENIAN": "test",
    "GEORGIAN": "test",
}
SIZE = 28
OVERSAMPLING = 4
CANVAS = SIZE * OVERSAMPLING
EM = 22 * OVERSAMPLING  # a capital is then 16 pixels high
LARGEST = 24 * OVERSAMPLING  # letters beyond this are drawn smaller, to stay on the canvas when they turn
ALIKE = 1.0  # Euclidean distance of two 28x28 pictures of ink 0..1, below which they pass for the same
LETTERS_AT_ONCE = 16  # their drawings and samples stay within a few MB


@dataclass(frozen=True)
class Options:
    """How a letter's pictures differ: variants a face, and the half-widths of their uniform jitter."""

    variants: int
    rotation: float  # degrees
    shift: float  # pixels
    scale: float  # relative
    seed: int


def font_paths() -> list[Path]:
    """The twelve text faces of DejaVu in matplotlib's package data."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "Glyphs is drawn with the fonts that matplotlib ships: pip install 'metafast[data]'"
        ) from error
    paths = [Path(matplotlib.get_data_path(), "fonts", "ttf", face) for face in FACES]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ImportError(
            f"Glyphs needs matplotlib's fonts {', '.join(missing)} in {str(paths[0].parent)!r}, where they "
            "are missing: pip install --force-reinstall matplotlib"
        )
    return paths


def fingerprint(fonts: list[Path], options: Options) -> str:
    """A hash of all that the pictures depend on."""
    from PIL import features

    versions = (torch.__version__, features.version("freetype2"), unicodedata.unidata_version)
    parts = [str((versions, astuple(options))).encode(), Path(__file__).read_bytes()]
    parts += [font.read_bytes() for font in fonts]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def common_letters(fonts: list[Path]) -> list[str]:
    """The letters (Unicode categories L*) that all fonts have, by code point."""
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

    common: set[int] | None = None
    for path in fonts:
        with TTFont(path, lazy=True) as font:
            points = set(font.getBestCmap())
        common = points if common is None else common & points
    return [chr(p) for p in sorted(common or ()) if unicodedata.category(chr(p)).startswith("L")]


def script(letter: str) -> str:
    """The script of a letter by its Unicode name, "COMMON" where the name tells none."""
    words = unicodedata.name(letter).split()
    return next((s for s in SCRIPT_SPLIT if s in words), "COMMON")


def render(fonts: list[Path], options: Options) -> Arrays:
    """Draw the dataset.

    Returns:
        images: (C, faces * variants, 28, 28) uint8.
        letters: (C,) code points.
        splits: (C,) indices into SPLITS.
    """
    letters = common_letters(fonts)
    splits = [SPLITS.index(SCRIPT_SPLIT[script(letter)]) for letter in letters]
    pen = _Pen(fonts)
    motions = _motions(len(letters), len(fonts), options)
    upright, images = [], []
    for start in range(0, len(letters), LETTERS_AT_ONCE):
        chunk = slice(start, start + LETTERS_AT_ONCE)
        drawn = torch.from_numpy(np.stack([pen.draw(letter) for letter in letters[chunk]])).float().div_(255)
        upright.append(functional.avg_pool2d(drawn, OVERSAMPLING))
        images.append(_resample(drawn, motions[chunk]))
    kept = _distinguishable(torch.cat(upright), splits)
    return {
        "images": torch.cat(images)[kept].numpy(),
        "letters": np.array([ord(letters[i]) for i in kept], np.int32),
        "splits": np.array([splits[i] for i in kept], np.int8),
    }


class _Pen:
    """Draws a letter in all faces, centred by its ink, in its own size unless the canvas is too small."""

    def __init__(self, fonts: list[Path]) -> None:
        from PIL import ImageFont

        # The basic layout draws one glyph a code point, whether or not Pillow has a text shaper.
        self._fonts = [ImageFont.truetype(path, EM, layout_engine=ImageFont.Layout.BASIC) for path in fonts]

    def draw(self, letter: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """(faces, CANVAS, CANVAS) uint8."""
        from PIL import Image, ImageDraw

        drawn = []
        for font in self._fonts:
            left, top, right, bottom = font.getbbox(letter, anchor="ls")
            if max(right - left, bottom - top) > LARGEST:
                font = font.font_variant(size=int(EM * LARGEST / max(right - left, bottom - top)))
                left, top, right, bottom = font.getbbox(letter, anchor="ls")
            page = Image.new("L", (CANVAS, CANVAS))
            corner = ((CANVAS - left - right) // 2, (CANVAS - top - bottom) // 2)
            ImageDraw.Draw(page).text(corner, letter, fill=255, font=font, anchor="ls")
            drawn.append(np.asarray(page))
        return np.stack(drawn)


def _motions(letters: int, faces: int, options: Options) -> Tensor:
    """(letters, faces, variants, 2, 3): the affine maps from picture to drawing, in coordinates -1..1."""
    generator = torch.Generator().manual_seed(options.seed)
    jitter = torch.rand(letters, faces, options.variants, 4, generator=generator) * 2 - 1
    angle = jitter[..., 0] * math.radians(options.rotation)
    scale = 1 + jitter[..., 1] * options.scale
    shift = jitter[..., 2:] * (options.shift * 2 / SIZE)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    matrix = torch.stack([cos, sin, -sin, cos], -1).reshape(*cos.shape, 2, 2)
    return torch.cat([matrix, -matrix @ shift.unsqueeze(-1)], -1)


def _resample(drawn: Tensor, motions: Tensor) -> Tensor:
    """Drawings (n, faces, CANVAS, CANVAS) under motions (n, faces, V, 2, 3): (n, faces * V, 28, 28) uint8.

    Two by two bilinear samples a pixel: at this oversampling they cover its area.
    """
    n, faces, variants = motions.shape[:3]
    side = SIZE * 2
    grid = functional.affine_grid(motions.flatten(0, 2), [n * faces * variants, 1, side, side], align_corners=False)
    # The variants of a drawing one below the other, so that one sampling reads it for all of them.
    grid = grid.reshape(n * faces, variants * side, side, 2)
    fine = functional.grid_sample(drawn.flatten(0, 1).unsqueeze(1), grid, align_corners=False)
    pixels = functional.avg_pool2d(fine, 2).mul_(255).round_().to(torch.uint8)
    return pixels.reshape(n, faces * variants, SIZE, SIZE)


def _distinguishable(upright: Tensor, splits: list[int]) -> list[int]:
    """The letters that look like no other: of those that look alike in any face the first is kept.

    The first is the one of the earlier split, then of the lower code point; so what a later split shares with
    an earlier one is left out of the later.

    Args:
        upright: (M, faces, 28, 28) drawings without jitter, ink 0..1.
        splits: the split of each letter.
    """
    faces = upright.flatten(2).transpose(0, 1)  # (faces, M, 784)
    alike = torch.zeros(upright.shape[0], upright.shape[0], dtype=torch.bool)
    for pictures in faces:
        alike |= torch.cdist(pictures, pictures) < ALIKE
    kept: list[int] = []
    for i in sorted(range(len(splits)), key=lambda i: splits[i]):
        if not alike[i, kept].any():
            kept.append(i)
    return kept
