"""miniImageNet: 100 ImageNet classes of 600 pictures, 84x84."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import torch

from metafast import _check
from metafast.data._classes import ClassTable
from metafast.data._images import decode, folder, pillow

SPLITS = ("train", "val", "test")
SIZE = 84
SUFFIXES = (".jpg", ".jpeg", ".png")


class MiniImageNet(ClassTable):
    """miniImageNet from either of its usual layouts, as 3x84x84 pictures in [0, 1].

    Args:
        root: folder with ``images/`` and ``train.csv``, ``val.csv``, ``test.csv`` (columns filename, label),
            or with a folder for each split that has a folder for each class (``train/n01532829/*.jpg``).
        split: "train", "val" or "test".

    Raises:
        TypeError: an argument of the wrong type.
        FileNotFoundError: root is no folder or has neither layout; a picture that the CSV file names is
            missing.
        ValueError: an unknown split, a CSV file of another form, a damaged picture, one of more pixels than Pillow's
            ``MAX_IMAGE_PIXELS``; the message names the file.
        ImportError: Pillow is not installed.

    Pictures of another size are resized with Lanczos' filter, as the MAML paper's code does. The whole split
    is decoded once and held as uint8: 810 MB for "train". A PNG's checksums are checked; a JPEG has none, so
    that a flipped bit in its pixels may go unnoticed.

    Example:
        >>> data = MiniImageNet("data/miniimagenet", "train")  # doctest: +SKIP
        >>> data.sample(ways=5, shots=5).support_x.shape  # doctest: +SKIP
        torch.Size([32, 25, 3, 84, 84])

    Reference: Vinyals et al., "Matching Networks for One Shot Learning", NeurIPS 2016; the split is that of
    Ravi and Larochelle, "Optimization as a Model for Few-Shot Learning", ICLR 2017.
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        where = folder("root", root)
        _check.choice("split", split, SPLITS)
        table, tree = where / f"{split}.csv", where / split
        if table.is_file():
            files = _from_csv(table, where / "images")
        elif tree.is_dir():
            files = _from_folders(tree)
        else:
            raise FileNotFoundError(
                f"root: expected {split}.csv beside images/, or a folder {split}/ with a folder for each "
                f"class, in {str(where)!r}, found neither"
            )
        items = torch.empty(sum(map(len, files.values())), 3, SIZE, SIZE, dtype=torch.uint8)
        for item, path in zip(items, (path for paths in files.values() for path in paths), strict=True):
            item.copy_(torch.from_numpy(_picture(path)).movedim(-1, 0))
        super().__init__(items, [len(paths) for paths in files.values()], list(files))


def _from_csv(table: Path, images: Path) -> dict[str, list[Path]]:
    """The files of each class, from a CSV file."""
    files: dict[str, list[Path]] = {}
    try:
        with table.open(newline="", encoding="utf-8") as stream:
            rows = csv.DictReader(stream)
            if rows.fieldnames is None or not {"filename", "label"} <= set(rows.fieldnames):
                raise ValueError(f"{str(table)!r}: expected the columns filename, label, got {rows.fieldnames}")
            for row in rows:
                if not row["filename"] or not row["label"]:
                    raise ValueError(f"{str(table)!r}, line {rows.line_num}: expected a filename and a label")
                path = images / row["filename"]
                if Path(row["filename"]).is_absolute() or ".." in Path(row["filename"]).parts:
                    raise ValueError(f"{str(table)!r}, line {rows.line_num}: {row['filename']!r} is not inside images/")
                if not os.path.isfile(path):  # not path.is_file(), which raises on a name that is too long
                    raise FileNotFoundError(f"{str(table)!r}, line {rows.line_num}: no file {str(path)!r}")
                files.setdefault(row["label"], []).append(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{str(table)!r}: no readable CSV file ({error})") from error
    if not files:
        raise ValueError(f"{str(table)!r}: expected a line for each picture, found none")
    return dict(sorted(files.items()))


def _from_folders(tree: Path) -> dict[str, list[Path]]:
    """The files of each class, from a folder a class."""
    files = {}
    for place in sorted(p for p in tree.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files[place.name] = sorted(
            p for p in place.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
        )
        if not files[place.name]:
            raise ValueError(f"root: expected pictures in {str(place)!r}, found none")
    if not files:
        raise ValueError(f"root: expected a folder for each class in {str(tree)!r}, found none")
    return files


def _picture(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """(84, 84, 3)."""
    image = decode(path.read_bytes(), repr(str(path)), "RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), pillow().Resampling.LANCZOS)
    return np.array(image)
