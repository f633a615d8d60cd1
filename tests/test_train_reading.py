"""One reader for every command, all kinds of files in a folder, links, and what must not be read."""

import io
import os
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.seg_trees import write_png
from train.common.errors import UserError
from train.data import images as reading
from train.data.image_folders import Folders
from train.data.images import ImageError, describe_unread, list_pictures
from train.data.mask_files import read_ids, read_picture
from train.data.shards import Shards
from train.show import open_picture

GREY = np.random.default_rng(0).integers(0, 256, (48, 64), dtype=np.uint8)


def save_odd(folder):
    """Write pictures that readers differ on, and give the pixels that a viewer shows."""
    folder.mkdir(parents=True)
    shown = np.repeat(GREY[..., None], 3, axis=2)
    Image.fromarray(GREY.astype(np.uint16) * 257).save(folder / "grey16.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(shown).save(folder / "phone.png", exif=exif)
    logo = np.zeros((48, 64, 4), dtype=np.uint8)
    logo[10:30, 10:30, 3] = 255
    Image.fromarray(logo).save(folder / "logo.png")
    palette = Image.fromarray(GREY // 128)
    palette.putpalette([1, 2, 3, 200, 100, 50])
    palette.save(folder / "palette.png")
    cmyk = np.dstack([GREY, 255 - GREY, GREY // 2, np.zeros_like(GREY)])
    Image.fromarray(cmyk, "CMYK").save(folder / "cmyk.tif")
    on_white = np.full((48, 64, 3), 255, dtype=np.uint8)
    on_white[10:30, 10:30] = 0
    colours = np.array([[1, 2, 3], [200, 100, 50]], dtype=np.uint8)[GREY // 128]
    return {
        "grey16.png": shown,
        "phone.png": np.rot90(shown, -1),
        "logo.png": on_white,
        "palette.png": colours,
        "cmyk.tif": 255 - cmyk[..., :3],
    }


def test_every_command_sees_what_a_viewer_shows(tmp_path):
    expected = save_odd(tmp_path / "root" / "x")
    source = Folders(tmp_path / "root")
    assert len(source) == len(expected)
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name in expected:
            if name.endswith(".png"):
                shard.add(tmp_path / "root" / "x" / name, name)
                label = tarfile.TarInfo(name.replace("png", "cls"))
                label.size = 1
                shard.addfile(label, io.BytesIO(b"0"))
    shards = Shards([str(tmp_path / "a.tar")], 1, 1)
    for index in range(len(source)):
        path = source.name(index)
        pixels = expected[os.path.basename(path)]
        assert np.array_equal(np.asarray(source.load(index)[0]), pixels), path
        assert np.array_equal(read_picture(path), pixels), path
        assert np.array_equal(open_picture(path, 48), pixels), path
    for index in range(len(shards)):
        pixels = expected[shards.keys[index] + ".png"]
        assert np.array_equal(np.asarray(shards.load(index)[0]), pixels)


def test_all_kinds_and_links_are_listed_and_others_counted(tmp_path):
    image, folder = Image.new("RGB", (8, 8)), tmp_path / "pictures"
    kinds = ["avif", "bmp", "gif", "jfif", "jpe", "jpg", "jp2", "pgm", "png", "tga", "tif", "webp", "PNG"]
    (folder / "deep").mkdir(parents=True)
    for kind in kinds:
        form = {"jfif": "JPEG", "jpe": "JPEG"}.get(kind)
        image.save(folder / f"{kind}.{kind}", format=form)
    elsewhere = tmp_path / "elsewhere"
    write_png(elsewhere / "far.png", np.zeros((4, 4), dtype=np.uint8))
    os.symlink(elsewhere, folder / "deep" / "linked")
    os.symlink(folder, elsewhere / "round")  # a ring of links ends
    os.symlink(elsewhere / "far.png", folder / "one.png")
    for name in ("a.heic", "b.HEIC", "c.svg", "notes.txt"):
        (folder / name).write_bytes(b"")
    found = list_pictures(folder)
    assert [each.name for each in found].count("far.png") == 1
    assert {each.name for each in found} == {*(f"{kind}.{kind}" for kind in kinds), "far.png", "one.png"}
    for path in found:
        assert read_picture(path).shape[2] == 3
    assert describe_unread(folder) == f"{folder}: 3 files left out (2 .heic, 1 .svg): save them as .png or .jpg"
    assert describe_unread(elsewhere / "none") is None


def test_pipes_and_folders_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert list_pictures(tmp_path) == []
    with pytest.raises(ImageError, match="no picture .*pipe.png"):
        read_picture(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="no mask"):
        read_ids(tmp_path)
    with pytest.raises(UserError, match="pipe.tar"):
        os.mkfifo(tmp_path / "pipe.tar")
        Shards([str(tmp_path / "pipe.tar")], 1, 1)


def one_bit_png(width, height):
    """Write a PNG of one bit a pixel by hand: some kilobytes, however large the picture."""

    def chunk(kind, content):
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_too_many_pixels_are_refused_before_they_are_read(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(one_bit_png(12000, 12000))
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("its pixels were read"))
    for read in (read_picture, read_ids):
        with pytest.raises(ImageError, match=r"large.png: it has 12,000 x 12,000 pixels, more than 67,108,864"):
            read(path)
    assert reading.MOST_PIXELS == 67_108_864


def test_values_outside_16_bits_are_refused(tmp_path):
    for value in (-1, 65536):
        Image.fromarray(np.full((4, 4), value, dtype=np.int32)).save(tmp_path / "a.tif")
        with pytest.raises(ImageError, match="32 bits"):
            read_picture(tmp_path / "a.tif")


def test_grey_masks_in_three_channels_are_numbers_and_colours_are_refused(tmp_path):
    ids = GREY % 5
    write_png(tmp_path / "grey.png", np.repeat(ids[..., None], 3, axis=2))
    assert np.array_equal(read_ids(tmp_path / "grey.png"), ids)
    write_png(tmp_path / "colour.png", np.dstack([ids, ids, ids + 1]))
    with pytest.raises(ImageError, match="colour picture"):
        read_ids(tmp_path / "colour.png")
