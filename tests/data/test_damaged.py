"""Damaged data files: what comes out is the same pictures, or a ValueError that names the file.

Seeded mutants of small valid files: bits flipped, bytes set to extremes, cut off, repeated, taken out and put in, some
in the fields of a zip's headers, some with a PNG's checksums made right again, so that its parser sees them.
"""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from metafast.data import MiniImageNet, Omniglot
from metafast.data.omniglot import MOST_BYTES
from tests.data.test_mini_imagenet import csv_layout, picture
from tests.data.test_omniglot import png

Image = pytest.importorskip("PIL.Image")
PngInfo = pytest.importorskip("PIL.PngImagePlugin").PngInfo

NAME = "images_background_small1"
DRAWINGS = {f"{NAME}/{letters}/character01/0001_0{d}.png": png(10 * a + d)
            for a, letters in enumerate(("Alpha", "Beta")) for d in range(3)}  # fmt: skip
FIRST = next(iter(DRAWINGS))
HEADERS = (b"PK\3\4", b"PK\1\2", b"PK\5\6")


def damaged(rng: random.Random, content: bytes) -> bytes:
    """One to three changes at random places."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(found) or 1)
        other, length = rng.randrange(len(found) or 1), rng.randrange(1, 64)
        kind = rng.choice(("flip", "set", "cut", "repeat", "remove", "insert"))
        if kind == "flip" and found:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == "set" and found:
            found[at] = rng.choice((0, 1, 127, 128, 255))
        elif kind == "cut":
            del found[at:]
        elif kind == "repeat":
            found[at : at + length] = found[other : other + length]
        elif kind == "remove":
            del found[at : at + length]
        else:
            found[at:at] = rng.randbytes(length)
    return bytes(found)


def damaged_headers(rng: random.Random, content: bytes) -> bytes:
    """One to three changes in what a zip's members, directory and end say of themselves."""
    found = bytearray(content)
    starts = [i for i in range(len(content)) if content[i : i + 4] in HEADERS]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, width = rng.choice(starts) + rng.randrange(46), rng.choice((1, 2, 4))
        if rng.random() < 0.5:
            found[min(at, len(found) - 1)] ^= 1 << rng.randrange(8)
        else:
            found[at : at + width] = rng.choice((b"\xff" * width, b"\0" * width, rng.randbytes(width)))
    return bytes(found)


def checksummed(content: bytes) -> bytes:
    """A PNG with the checksum of each of its chunks made right, as far as they can be told."""
    found, at = content[:8], 8
    while at + 12 <= len(content) and (end := at + 8 + int.from_bytes(content[at : at + 4], "big")) + 4 <= len(content):
        found += content[at:end] + struct.pack(">I", zlib.crc32(content[at + 4 : end]))
        at = end + 4
    return found + content[at:]


def with_everything(mode: str) -> bytes:
    """A PNG that has also chunks beside its pixels."""
    info, stream = PngInfo(), io.BytesIO()
    info.add_text("plain", "text")
    info.add_text("zipped", "text" * 20, zip=True)
    info.add_itxt("of any letters", "äöü" * 10, zip=True)
    pixels = picture(1).convert("L").resize((20, 20)).convert(mode)
    pixels.save(stream, "PNG", pnginfo=info, icc_profile=b"none" * 10, dpi=(72, 72))
    return stream.getvalue()


def jpeg(progressive: bool) -> bytes:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x112], exif[0x11A] = 6, 72.0  # orientation, resolution
    picture(1).resize((20, 20)).save(stream, "JPEG", progressive=progressive, exif=exif, dpi=(72, 72))
    return stream.getvalue()


def loaded(load: Callable[[], Tensor], path: Path) -> Tensor | None:
    """What ``load`` gives, None where it refuses a file by its path; anything else is the test's failure."""
    try:
        return load()
    except ValueError as error:
        if str(path) not in str(error) or isinstance(error, UnicodeError):
            raise
        return None


def write_zip(root: Path, files: dict[str, bytes] = DRAWINGS, method: int = zipfile.ZIP_DEFLATED) -> Path:
    path = root / f"{NAME}.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(zipfile.ZipInfo(f"{NAME}/"), b"")  # as the official files have it, stored
        for file, content in files.items():
            archive.writestr(file, content)
    return path


@pytest.fixture
def one_picture(tmp_path: Path) -> Path:
    """Where miniImageNet's only picture is to be."""
    (tmp_path / "train" / "n01").mkdir(parents=True)
    return tmp_path / "train" / "n01" / "a.png"


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED], ids=["deflated", "stored"])
@pytest.mark.parametrize(("change", "mutants"), [(damaged, 120), (damaged_headers, 250)], ids=["anywhere", "headers"])
def test_a_zip(tmp_path: Path, change: Callable[[random.Random, bytes], bytes], mutants: int, method: int) -> None:
    path = write_zip(tmp_path, method=method)
    rng, content = random.Random(method), path.read_bytes()

    def load() -> Tensor:
        data = Omniglot(tmp_path, rotations=False)
        assert data.names == ("Alpha/character01", "Beta/character01") and data.counts.tolist() == [3, 3]
        return data.items

    right, outcomes = load(), Counter[bool]()
    for _ in range(mutants):
        path.write_bytes(change(rng, content))
        found = loaded(load, path)
        assert found is None or torch.equal(found, right)
        outcomes[found is None] += 1
    assert outcomes[True] > mutants / 2 and (change is damaged or outcomes[False] > 10)


def test_a_drawing(tmp_path: Path) -> None:
    for file, content in DRAWINGS.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
    right, rng, refused = Omniglot(tmp_path, rotations=False).items, random.Random(0), 0
    for _ in range(200):
        (tmp_path / FIRST).write_bytes(damaged(rng, DRAWINGS[FIRST]))
        found = loaded(lambda: Omniglot(tmp_path, rotations=False).items, tmp_path / NAME)
        assert found is None or torch.equal(found, right)
        refused += found is None
    assert refused > 150


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_a_png(one_picture: Path, mode: str) -> None:
    """The same pixels or refused; with checksums made right, what else it may hold, or refused."""
    rng, content, outcomes = random.Random(mode), with_everything(mode), Counter[str]()
    root = one_picture.parents[2]
    one_picture.write_bytes(content)
    right = MiniImageNet(root).items
    for i in range(80):
        mutant = damaged(rng, content)
        one_picture.write_bytes(checksummed(mutant) if i % 2 else mutant)
        found = loaded(lambda: MiniImageNet(root).items, one_picture)
        assert found is None or i % 2 or torch.equal(found, right)
        outcomes["refused" if found is None else "same" if torch.equal(found, right) else "other"] += 1
    assert outcomes["refused"] > 40


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Tag data larger", "ignore:Truncated File Read")
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg(one_picture: Path, progressive: bool) -> None:
    """It has no checksums: some picture, or refused."""
    rng, content, refused = random.Random(progressive), jpeg(progressive), 0
    for _ in range(100):
        one_picture.write_bytes(damaged(rng, content))
        found = loaded(lambda: MiniImageNet(one_picture.parents[2]).items, one_picture)
        assert found is None or found.shape == (1, 3, 84, 84)
        refused += found is None
    assert 10 < refused < 90


def test_a_table(tmp_path: Path) -> None:
    """It has no checksums: each line that is left is a picture that is there."""
    table = csv_layout(tmp_path) / "train.csv"
    rng, content, outcomes = random.Random(0), table.read_bytes(), Counter[str]()
    for _ in range(150):
        table.write_bytes(damaged(rng, content))
        try:
            found = loaded(lambda: MiniImageNet(tmp_path).items, table)
            outcomes["refused" if found is None else "loaded"] += 1
        except FileNotFoundError as error:
            if f"{str(table)!r}, line " not in str(error):
                raise
            outcomes["missing"] += 1
    assert min(outcomes[kind] for kind in ("refused", "missing", "loaded")) >= 5


def patched(path: Path, header: bytes, offset: int, content: bytes) -> None:
    """Write into the first header of a kind."""
    found = bytearray(path.read_bytes())
    start = found.index(header) + offset
    found[start : start + len(content)] = content
    path.write_bytes(found)


MEMBER, DIRECTORY, END = HEADERS


@pytest.mark.parametrize(
    ("header", "offset", "content", "reason"),
    [
        (DIRECTORY, 8, b"\1\0", "it is encrypted"),
        (DIRECTORY, 8, b"\x40\0", "strong encryption"),
        (DIRECTORY, 16, b"1234", "Bad CRC-32"),
        (DIRECTORY, 10, b"\x0c\0", "compression method 12"),
        (DIRECTORY, 24, b"\0\0\0\x7f", f"expected a drawing of at most {MOST_BYTES} bytes, got {0x7F000000}"),
        (DIRECTORY, 42, b"\xff\xff\xff\x7f", "Truncated file header"),
        (DIRECTORY, 6, b"\xff\0", "no readable zip file .zip file version 25.5"),
        (DIRECTORY, 32, b"\x01\0", "no readable zip file .*central directory"),
        (END, 10, b"\2\0", "no readable zip file .its directory lists 6 members, its end tells of 2"),
        (MEMBER, 30 + len(FIRST) - 1, b"h", "differ"),
        (MEMBER, 30 + len(FIRST), b"\xff\xff\xff\xff", "Error -3 while decompressing"),
    ],
)
def test_what_a_zip_is_refused_for(tmp_path: Path, header: bytes, offset: int, content: bytes, reason: str) -> None:
    path = tmp_path / f"{NAME}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, drawing in DRAWINGS.items():
            archive.writestr(file, drawing)
    patched(path, header, offset, content)
    with pytest.raises(ValueError, match=reason) as caught:
        Omniglot(tmp_path)
    assert str(path) in str(caught.value)


def test_a_comment_that_swallows_a_member(tmp_path: Path) -> None:
    """Else a bit or two would make drawings disappear."""
    path = write_zip(tmp_path, {f"{NAME}/A/b/{d}.png": png(d) for d in range(3)})
    content = path.read_bytes()
    entry = 46 + len(f"{NAME}/A/b/0.png")
    start = content.index(DIRECTORY, content.index(DIRECTORY) + 1)
    path.write_bytes(content[: start + 32] + struct.pack("<H", entry) + content[start + 34 :])
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 3  # of four
    with pytest.raises(ValueError, match=r"lists 3 members, its end tells of 4"):
        Omniglot(tmp_path)


@pytest.mark.parametrize(
    "name", [f"../{NAME}/Alpha/character01/1.png", f"{NAME}/../character01/1.png", f"/{FIRST}", f"{NAME}/../../x.txt"]
)
def test_a_name_that_leads_out_of_the_archive(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path, {**DRAWINGS, name: png(0)})
    with pytest.raises(ValueError, match=r"^\S+ in '.*': damaged zip member .its name leads out") as caught:
        Omniglot(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", [FIRST, FIRST.replace("/", "//", 1), f"./{FIRST}"])
def test_a_name_that_is_there_twice(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, png(99))
    with pytest.raises(ValueError, match=rf"^{FIRST} in .*its name is there twice"):
        Omniglot(tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_without_a_bound_are_refused(tmp_path: Path, method: int) -> None:
    write_zip(tmp_path, method=method)
    with pytest.raises(ValueError, match=rf"^{FIRST} in .*compression method {method}"):
        Omniglot(tmp_path)


def test_a_zip_bomb(tmp_path: Path) -> None:
    path = write_zip(tmp_path, {**DRAWINGS, FIRST: bytes(4 * MOST_BYTES)})
    with pytest.raises(ValueError, match=rf"^{FIRST} in .*at most {MOST_BYTES} bytes, got {4 * MOST_BYTES}"):
        Omniglot(tmp_path)
    patched(path, DIRECTORY, 46 + len(f"{NAME}/") + 24, struct.pack("<I", 1000))  # the size, in the second entry
    with pytest.raises(ValueError, match=rf"^{FIRST} in .*Bad CRC-32"):
        Omniglot(tmp_path)


def chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of a PNG's chunks."""
    at = 8
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        yield content[at + 4 : at + 8], at, end
        at = end


@pytest.mark.parametrize("part", ["inside", "before its checksum", "after"])
def test_a_png_cut_off_at_each_chunk(one_picture: Path, part: str) -> None:
    content = with_everything("RGB")
    seen = set()
    for kind, start, end in chunks(content):
        cut = {"inside": start + 9, "before its checksum": end - 4, "after": end}[part]
        if kind == b"IEND":
            cut = end - 5
        one_picture.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"^'.*a\.png': damaged image file"):
            MiniImageNet(one_picture.parents[2])
        seen.add(kind)
    assert seen >= {b"IHDR", b"iCCP", b"zTXt", b"iTXt", b"pHYs", b"IDAT", b"IEND"}


def test_a_png_s_checksums(one_picture: Path) -> None:
    content = with_everything("L")
    for kind, _, end in chunks(content):
        for bit in (0, 13, 31) if kind != b"IEND" else ():  # which holds nothing, and Pillow stops before its checksum
            mutant = bytearray(content)
            mutant[end - 4 + bit // 8] ^= 1 << bit % 8
            one_picture.write_bytes(mutant)
            with pytest.raises(ValueError, match=r"^'.*a\.png': damaged image file"):
                MiniImageNet(one_picture.parents[2])


@pytest.mark.parametrize("side", [9500, 60000])  # Pillow warns, Pillow refuses
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_png_bomb(one_picture: Path, tmp_path: Path, side: int) -> None:
    header = struct.pack(">II", side, side) + b"\1\0\0\0\0"
    pixels = zlib.compress(bytes(side * (1 + (side + 7) // 8)) if side < 10000 else b"")
    bomb = checksummed(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + bytes(4)
            for kind, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
        )
    )
    one_picture.write_bytes(bomb)
    with pytest.raises(ValueError, match=rf"^'.*a\.png': .*({Image.MAX_IMAGE_PIXELS} pixels|decompression bomb)"):
        MiniImageNet(tmp_path)
    write_zip(tmp_path, {**DRAWINGS, FIRST: bomb})
    with pytest.raises(ValueError, match=rf"^{FIRST} in .*(105x105 pixels, got 9500x9500|decompression bomb)"):
        Omniglot(tmp_path)


def test_other_formats_are_not_tried(one_picture: Path) -> None:
    picture(1).save(one_picture, "GIF")
    with pytest.raises(ValueError, match=r"a\.png': damaged image file \(cannot identify"):
        MiniImageNet(one_picture.parents[2])


@pytest.mark.parametrize("name", ["../n010.png", "/etc/n010.png", "a/../../n010.png"])
def test_a_table_that_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    table = csv_layout(tmp_path) / "train.csv"
    table.write_text(f"filename,label\n{name},n01\n")
    with pytest.raises(ValueError, match=rf"train\.csv', line 2: '{name}' is not inside images/"):
        MiniImageNet(tmp_path)


@pytest.mark.parametrize("name", ["a" * 300, "a\tb"])
def test_a_table_with_a_name_that_no_file_has(tmp_path: Path, name: str) -> None:
    (csv_layout(tmp_path) / "train.csv").write_text(f"filename,label\n{name},n01\n")
    with pytest.raises(FileNotFoundError, match=r"train\.csv', line 2: no file"):
        MiniImageNet(tmp_path)


def test_the_fuzz_s_own_helpers() -> None:
    content = with_everything("L")
    assert checksummed(content) == content
    broken = bytearray(content)
    broken[-1] ^= 1
    assert checksummed(bytes(broken)) == content
    mutants = {damaged(random.Random(seed), content) for seed in range(50)}
    assert len(mutants - {content}) > 40
    assert np.frombuffer(max(mutants, key=len), np.uint8).size > len(content)
