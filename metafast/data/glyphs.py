"""Glyphs: real letters for few-shot learning without a download."""

from __future__ import annotations

import unicodedata

import torch

from metafast import _check
from metafast.data._cache import cached
from metafast.data._classes import ClassTable
from metafast.data._glyph_images import SPLITS, Options, fingerprint, font_paths, render


class Glyphs(ClassTable):
    """Letters of five scripts, drawn in the twelve text faces of DejaVu that matplotlib ships.

    A class is a letter; its items are its pictures in the twelve faces (sans, mono and serif; regular, bold
    and slanted), ``variants`` of each, under uniformly random rotation, scale and shift: 28x28, antialiased,
    ink 1 on background 0. The splits share no script:

        ======= ================== ===========================
        split   scripts            letters, with 24 items each
        ======= ================== ===========================
        "train" Latin, Greek       about 1,090
        "val"   Cyrillic           about 107
        "test"  Armenian, Georgian about 108
        ======= ================== ===========================

    The faces have some 1,500 letters in common. Some of them are one picture with several code points (Latin
    A, Greek Alpha, Cyrillic A) or nearly so; of letters that look alike in any face only the first is kept,
    "train" before "val" before "test". So no two classes of an episode are the same picture, and none of
    "test" was trained on under another name. What is left is often hard all the same (accents, letters of one
    stem), as it should be.

    Args:
        split: "train", "val" or "test".
        variants: pictures of each letter in each face.
        rotation: the largest rotation, degrees, either way.
        shift: the largest shift, pixels, in each direction.
        scale: the largest relative change of size, either way, below 1.
        seed: seed of the pictures.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown split, variants below one, a negative amount or seed, scale not below 1.
        ImportError: matplotlib or its fonts are not installed.

    The pictures are rendered at first use, which takes some seconds, and cached in ``$METAFAST_CACHE``
    (default ``~/.cache/metafast``, 25 MB). A damaged cache file is rendered anew, with a warning.

    Example:
        >>> glyphs = Glyphs("train")
        >>> glyphs.letters[0], glyphs.names[0]
        ('A', 'LATIN CAPITAL LETTER A')
        >>> glyphs.sample(tasks=32, ways=5, shots=1, queries=15).support_x.shape
        torch.Size([32, 5, 1, 28, 28])
    """

    letters: tuple[str, ...]

    def __init__(
        self,
        split: str = "train",
        *,
        variants: int = 2,
        rotation: float = 15.0,
        shift: float = 2.0,
        scale: float = 0.1,
        seed: int = 0,
    ) -> None:
        _check.choice("split", split, SPLITS)
        options = Options(
            _check.integer("variants", variants, minimum=1),
            _check.number("rotation", rotation, minimum=0),
            _check.number("shift", shift, minimum=0),
            _check.number("scale", scale, minimum=0),
            _check.integer("seed", seed, minimum=0),
        )
        if options.scale >= 1:
            raise ValueError(f"scale: expected a number below 1, got {scale}")
        if options.seed >= 2**63:
            raise ValueError(f"seed: expected an int below 2**63, got {seed}")
        fonts = font_paths()
        arrays = cached(f"glyphs-{fingerprint(fonts, options)}.npz", lambda: render(fonts, options))
        mine = arrays["splits"] == SPLITS.index(split)
        images = torch.from_numpy(arrays["images"][mine])  # (C, items, 28, 28)
        self.letters = tuple(map(chr, arrays["letters"][mine].tolist()))
        super().__init__(
            images.flatten(0, 1).unsqueeze(1),
            [images.shape[1]] * images.shape[0],
            [unicodedata.name(letter) for letter in self.letters],
        )
