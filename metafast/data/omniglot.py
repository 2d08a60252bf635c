"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn by 20 people."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from metafast import _check
from metafast.data._classes import ClassTable
from metafast.data._images import decode, folder

# source: (the set that trains, the set that tests)
SOURCES = {
    "full": ("images_background", "images_evaluation"),
    "small": ("images_background_small1", "images_background_small2"),
    "small-swapped": ("images_background_small2", "images_background_small1"),
}
SPLITS = ("train", "test", "all")
PAPER_SIZE = 105
SIZE = 28
MOST_BYTES = 2**20  # of a drawing's file: the official ones have some 400
# What zipfile raises on damaged files: BadZipFile for most, ValueError for names that are no UTF-8, the others for
# versions and offsets that make no sense and from the depths of the decompressor.
_DAMAGED = (
    *(zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError, OverflowError),
    *(struct.error, zlib.error),
)


class Omniglot(ClassTable):
    """Omniglot from the official files, as 28x28 pictures with ink 1 on background 0.

    Args:
        root: folder with the official zip files (``images_background.zip``, ...) or with these extracted; the
            subfolders ``omniglot`` and ``omniglot-py`` (torchvision's) are looked into as well. Where a zip
            file and its extracted folder are both there, the zip file is read.
        split: "train", "test", or "all" for both together. No alphabet is in both "train" and "test".
        rotations: add every character turned by 90, 180 and 270 degrees as a class of its own, as Santoro et
            al. (2016) do. Default: only for "train".
        alphabets: keep these alphabets of the split only, for example to hold some out for validation:
            ``Omniglot(root, "all", alphabets=[...])``.
        source: "full": train on images_background (30 alphabets, 964 characters), test on images_evaluation
            (20 alphabets, 659 characters). "small": train on images_background_small1 (5 alphabets, 136
            characters), test on those alphabets of images_background_small2 that small1 lacks (3 alphabets,
            106 characters). "small-swapped": the other way round, train on images_background_small2 (5 alphabets, 156
            characters), test on the 3 alphabets, 86 characters, that only small1 has. Default: "full" where one of its
            two sets is found, else "small".

    Raises:
        TypeError: an argument of the wrong type.
        FileNotFoundError: root is no folder, or the files that the split needs are not in it.
        ValueError: an unknown split, source or alphabet; a damaged zip or image file, named in the message.
        ImportError: Pillow is not installed.

    A drawing is reduced from 105x105 to 28x28 by exact averaging over areas, and stored as uint8. Class names
    are "alphabet/character", with "/rot90" and so on behind them for turned characters.

    Example:
        >>> omniglot = Omniglot("data", "train")  # doctest: +SKIP
        >>> omniglot.sample(tasks=32, ways=20, shots=1, queries=5).support_x.shape  # doctest: +SKIP
        torch.Size([32, 20, 1, 28, 28])

    Reference: Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program
    induction", Science 2015.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        rotations: bool | None = None,
        alphabets: Sequence[str] | None = None,
        source: str | None = None,
    ) -> None:
        where = folder("root", root)
        _check.choice("split", split, SPLITS)
        turned = split == "train" if rotations is None else _check.flag("rotations", rotations)
        if source is not None:
            _check.choice("source", source, SOURCES)
        if isinstance(alphabets, str) or not (alphabets is None or isinstance(alphabets, Sequence)):
            raise TypeError(f"alphabets: expected a list of names or None, got {_check.describe(alphabets)}")
        drawings = _read_split(where, split, source)
        if alphabets is not None:
            drawings = _keep_alphabets(drawings, alphabets)
        items, names = _decode(drawings), list(drawings)
        counts = [len(files) for files in drawings.values()]
        if turned:
            items = torch.cat([torch.rot90(items, k, (-2, -1)) for k in range(4)])
            names = names + [f"{name}/rot{90 * k}" for k in (1, 2, 3) for name in names]
            counts = counts * 4
        super().__init__(items, counts, names)


# The drawings of each "alphabet/character": (what to call the file in an error message, its bytes).
_Drawings = dict[str, list[tuple[str, bytes]]]


def _places(root: Path, name: str) -> Iterator[Path]:
    """Where the image set ``name`` may be."""
    for place in (root, root / "omniglot", root / "omniglot-py"):
        yield place / f"{name}.zip"
        yield place / name


def _read_set(root: Path, name: str) -> _Drawings:
    """All files of the image set ``name``, from the first place that has it."""
    path = next((p for p in _places(root, name) if p.exists()), None)
    if path is None:
        raise FileNotFoundError(
            f"root: expected Omniglot's {name}.zip or the folder {name} in {str(root)!r} or its subfolders "
            "omniglot and omniglot-py, found neither"
        )
    drawings: _Drawings = {}
    for file, content in _read_folder(path) if path.is_dir() else _read_zip(path):
        # Names that begin with a dot are what macOS leaves beside the real files.
        if len(file.parts) == 4 and file.parts[0] == name and not file.name.startswith("."):
            drawings.setdefault("/".join(file.parts[1:3]), []).append((f"{file} in {str(path)!r}", content))
    if not drawings:
        raise ValueError(f"root: expected {name}/ALPHABET/CHARACTER/*.png in {str(path)!r}, found none")
    return drawings


def _read_folder(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The PNG files of an extracted image set, in the order of their names."""
    for file in sorted(path.glob("*/*/*.png")):
        yield PurePosixPath(*file.relative_to(path.parent).parts), file.read_bytes()


def _read_zip(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The PNG files of a zip file, in the order of their names."""
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGED as error:
        raise ValueError(f"root: {str(path)!r} is no readable zip file ({error})") from error
    with archive:
        told = _told_members(path)
        if told not in (0xFFFF, len(archive.infolist()) % 2**16):
            raise ValueError(
                f"root: {str(path)!r} is no readable zip file (its directory lists {len(archive.infolist())} members, "
                f"its end tells of {told})"
            )
        members: dict[PurePosixPath, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            file = PurePosixPath(member.filename)
            if file in members:
                raise ValueError(f"{file} in {str(path)!r}: damaged zip member (its name is there twice)")
            members[file] = member
        for file, member in sorted(members.items()):
            content = _read_member(archive, member, file, f"{file} in {str(path)!r}")
            if file.suffix == ".png":
                yield file, content


def _told_members(path: Path) -> int:
    """How many members the end of a zip file tells of; 0xFFFF: more.

    zipfile does not look, and one flipped bit in the length of a comment makes the members behind it part of that.
    """
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 22 - 2**16))
        tail = stream.read()
    start = tail.rfind(b"PK\5\6") + 10
    return int.from_bytes(tail[start : start + 2], "little")


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: PurePosixPath, name: str) -> bytes:
    """A drawing's bytes; of others the headers are checked, since a damaged name makes a drawing one of these."""
    drawing = file.suffix == ".png"
    if file.is_absolute() or ".." in file.parts:
        raise ValueError(f"{name}: damaged zip member (its name leads out of the archive)")
    if member.flag_bits & 1:
        raise ValueError(f"{name}: damaged zip member (it is encrypted)")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # The other methods' decompressors do not stop at the size that the directory gives.
        raise ValueError(f"{name}: damaged zip member (compression method {member.compress_type})")
    if drawing and member.file_size > MOST_BYTES:
        raise ValueError(f"{name}: expected a drawing of at most {MOST_BYTES} bytes, got {member.file_size}")
    try:
        with archive.open(member) as stream:
            return stream.read() if drawing else b""
    except _DAMAGED as error:
        raise ValueError(f"{name}: damaged zip member ({error})") from error


def _read_split(root: Path, split: str, source: str | None) -> _Drawings:
    """The characters of a split, sorted by name."""
    if source is None:
        source = _find_source(root)
    names = SOURCES[source]
    # The small sets share alphabets, and what trains must not be in the test.
    first = _read_set(root, names[0]) if split != "test" or source != "full" else {}
    used = {character.split("/")[0] for character in first}
    drawings = {} if split == "test" else first
    if split != "train":
        second = _read_set(root, names[1])
        drawings = drawings | {c: files for c, files in second.items() if c.split("/")[0] not in used}
    return dict(sorted(drawings.items()))


def _find_source(root: Path) -> str:
    """The first source of which an image set is there."""
    for source, names in SOURCES.items():
        if any(place.exists() for name in names for place in _places(root, name)):
            return source
    wanted = ", ".join(f"{name}.zip" for names in SOURCES.values() for name in names)
    raise FileNotFoundError(
        f"root: expected one of Omniglot's {wanted}, or a folder of that name, in {str(root)!r} or its "
        "subfolders omniglot and omniglot-py, found none"
    )


def _keep_alphabets(drawings: _Drawings, alphabets: Sequence[str]) -> _Drawings:
    """The characters of some alphabets."""
    known = sorted({character.split("/")[0] for character in drawings})
    if not alphabets:
        raise ValueError(f"alphabets: expected some of {', '.join(known)}, got none")
    for alphabet in alphabets:
        if alphabet not in known:
            raise ValueError(f"alphabets: expected some of {', '.join(known)}, got {alphabet!r}")
    return {c: files for c, files in drawings.items() if c.split("/")[0] in alphabets}


def _decode(drawings: _Drawings) -> Tensor:
    """(M, 1, 28, 28) uint8: all drawings."""
    weights = _area_weights(PAPER_SIZE, SIZE)
    classes = []
    for files in drawings.values():
        ink = torch.from_numpy(np.stack([_ink(content, name) for name, content in files]))
        classes.append((weights @ ink @ weights.T * 255).round_().to(torch.uint8))
    return torch.cat(classes).unsqueeze(1)


def _ink(content: bytes, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """(105, 105), 1 where there is ink: the files are black on white."""
    pixels = np.asarray(decode(content, name, "L", (PAPER_SIZE, PAPER_SIZE)))
    return (pixels < 128).astype(np.float32)


def _area_weights(size: int, smaller: int) -> Tensor:
    """(smaller, size): row i averages the pixels under output pixel i, by the length it covers of each."""
    edges = torch.arange(smaller + 1) * (size / smaller)
    pixels = torch.arange(size)
    low = torch.maximum(edges[:-1, None], pixels)
    high = torch.minimum(edges[1:, None], pixels + 1)
    return (high - low).clamp_(min=0) * (smaller / size)
