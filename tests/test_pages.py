"""TIFF files of several pages, which download.py imports as an image each."""

import struct
from pathlib import Path

import numpy as np
import pytest
from helpers import ALL, annotations, photo, read_rgb, refuse_download, run_download, save, stored
from numpy.testing import assert_array_equal
from PIL import Image

from medseg import samples
from medseg.cli import MAX_MEGAPIXELS

FLAGS = ("--masks", "images", "masks")


def stack(path, pages, compression=None):
    """Write arrays or PIL images as the pages of a TIFF file."""
    Path(path).parent.mkdir(exist_ok=True)
    first, *others = (Image.fromarray(page) for page in pages)
    first.save(path, save_all=True, append_images=others, compression=compression)


@pytest.mark.parametrize("compression", [None, "packbits", "tiff_lzw", "tiff_adobe_deflate"])
def test_pages_come_back_bit_for_bit(here, compression):
    rng = np.random.default_rng(0)
    grey = [rng.integers(0, 256, (30 + n, 40), np.uint8) for n in range(3)]
    deep = [rng.integers(0, 65536, (25, 20), np.uint16) for _ in range(2)]
    cells = [rng.integers(0, 3, page.shape, np.uint8) for page in grey]
    wide = [rng.integers(0, 3, page.shape, np.uint16) for page in deep]
    stack("images/a.tif", grey, compression)
    stack("images/b.TIFF", deep, compression)
    stack("masks/a_mask.tif", cells, compression)
    stack("masks/b_mask.tif", wide, compression)
    save(photo(5), "images/c.png")
    save(Image.new("L", (40, 30), 1), "masks/c_mask.png")
    out = run_download(*FLAGS, *ALL, "--classes", "x,y")
    assert "pages: 5 of 2 TIFF files" in out
    masks = {f"a_p{n:03d}": mask for n, mask in enumerate(cells)}
    masks |= {f"b_p{n:03d}": mask for n, mask in enumerate(wide)}
    assert stored().keys() == {*masks, "c"}
    for name, mask in masks.items():
        assert_array_equal(stored()[name]["x"], mask == 1)
        assert_array_equal(stored()[name]["y"], mask == 2)
    for number, page in enumerate(grey):
        image = read_rgb(f"dataset/train/a_p{number:03d}.png")
        assert_array_equal(image, np.stack([page] * 3, 2))
    for number, page in enumerate(deep):
        image = read_rgb(f"dataset/train/b_p{number:03d}.png")[..., 0]
        assert_array_equal(image, (page * (255 / 65535)).round())
    groups = {
        record["file_name"][0]: record.get("group") for record in annotations("train")["images"]
    }
    assert groups == {"a": "a", "b": "b", "c": None}


def test_the_pages_of_a_file_stay_in_one_split(here):
    rng = np.random.default_rng(0)
    for name in "abcdef":
        pages = rng.integers(0, 2, (4, 30, 40), np.uint8)
        stack(f"images/{name}.tif", pages)
        stack(f"masks/{name}.tif", pages)
    run_download(*FLAGS, "--split", 34, 33, 33)
    places = [{name[0] for name in stored(split)} for split in ("train", "valid", "test")]
    assert sum(map(len, places)) == 6 == len(set.union(*places))
    refuse_download(*FLAGS, "--into", "train", "--add", words=["dataset/"])


def test_bad_pages_are_one_line(here):
    page = np.ones((30, 40), np.uint8)
    stack("images/a.tif", [page] * 3)
    stack("masks/a.tif", [page] * 2)
    refuse_download(*FLAGS, *ALL, words=["masks/a.tif", "2 pages", "images/a.tif", "3"])
    stack("masks/a.tif", [page, page, page.T])
    refuse_download(*FLAGS, *ALL, words=["masks/a.tif, page 3", "30x40"])
    stack("masks/a.tif", [page] * 3)
    content = Path("images/a.tif").read_bytes()
    (place,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, place)
    pointer = place + 2 + 12 * entries  # to the second page
    ring = content[:pointer] + content[4:8] + content[pointer + 4 :]
    for damaged in (ring, content[:-200], content[: pointer + 40]):
        Path("images/a.tif").write_bytes(damaged)
        refuse_download(*FLAGS, *ALL, words=["a.tif"])
    Path("images/a.tif").write_bytes(content)
    stack("images/a.tif", [page, np.ones((1000, 1200), np.uint8), page])
    limit = ("--max-megapixels", "1")
    refused = ["images/a.tif, page 2", "1200x1000 pixels", "--max-megapixels 2"]
    refuse_download(*FLAGS, *ALL, *limit, words=refused)
    samples.set_pixel_limit(MAX_MEGAPIXELS)
