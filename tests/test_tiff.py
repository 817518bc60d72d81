"""TIFF files of several pages, which download.py imports as an image each."""

import struct
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    MASKS,
    annotations,
    read_rgb,
    refuse_download,
    run_download,
    save_pair,
    stored,
)
from numpy.testing import assert_array_equal
from PIL import Image

from medseg import samples
from medseg.cli import MAX_MEGAPIXELS

PAGE = np.ones((30, 40), np.uint8)


def stack(path, pages, compression=None):
    """Write arrays as the pages of a TIFF file."""
    Path(path).parent.mkdir(exist_ok=True)
    first, *others = map(Image.fromarray, pages)
    first.save(path, save_all=True, append_images=others, compression=compression)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_pages_come_back_bit_for_bit(here, compression):
    rng = np.random.default_rng(0)
    pages = {"a": [rng.integers(0, 256, (30 + n, 40), np.uint8) for n in range(3)]}
    pages["b"] = [rng.integers(0, 65536, (25, 20), np.uint16) for _ in range(2)]
    masks = {}
    for name, suffix in {"a": "tif", "b": "TIFF"}.items():
        own = [rng.integers(0, 3, page.shape, np.uint16) for page in pages[name]]
        stack(f"images/{name}.{suffix}", pages[name], compression)
        stack(f"masks/{name}_mask.tif", own, compression)
        masks |= {f"{name}_p{number:03d}": mask for number, mask in enumerate(own)}
    save_pair("c")
    Path("masks/c.png").rename("masks/c_mask.png")
    assert "pages: 5 of 2 TIFF files" in run_download(*MASKS, "--classes", "x,y")
    found = stored()
    assert found.keys() == {*masks, "c"}
    for name, mask in masks.items():
        assert_array_equal(found[name]["x"], mask == 1)
        assert_array_equal(found[name]["y"], mask == 2)
        page = pages[name[0]][int(name[-3:])]
        shown = (page * (255 / np.iinfo(page.dtype).max)).round()
        assert_array_equal(read_rgb(f"dataset/train/{name}.png"), np.stack([shown] * 3, 2))
    records = annotations("train")["images"]
    groups = {record["file_name"][0]: record.get("group") for record in records}
    assert groups == {"a": "a", "b": "b", "c": None}


def test_the_pages_of_a_file_stay_in_one_split(here):
    for name in "abcdef":
        pages = np.random.default_rng(ord(name)).integers(0, 2, (4, 30, 40), np.uint8)
        stack(f"images/{name}.tif", pages)
        stack(f"masks/{name}.tif", pages)
    run_download(*MASKS[:3], "--split", 34, 33, 33)
    places = [{name[0] for name in stored(split)} for split in ("train", "valid", "test")]
    assert sum(map(len, places)) == 6 == len(set.union(*places))


def test_bad_pages_are_one_line(here):
    stack("images/a.tif", [PAGE] * 3)
    stack("masks/a.tif", [PAGE] * 2)
    refuse_download(*MASKS, words=["masks/a.tif", "2 pages", "images/a.tif", "3"])
    stack("masks/a.tif", [PAGE, PAGE, PAGE.T])
    refuse_download(*MASKS, words=["masks/a.tif, page 3", "30x40"])
    stack("masks/a.tif", [PAGE] * 3)
    content = Path("images/a.tif").read_bytes()
    (place,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, place)
    pointer = place + 2 + 12 * entries  # to the second page
    ring = content[:pointer] + content[4:8] + content[pointer + 4 :]
    for damaged in (ring, content[:-200]):
        Path("images/a.tif").write_bytes(damaged)
        refuse_download(*MASKS, words=["a.tif"])
    stack("images/a.tif", [PAGE, np.ones((1000, 1200), np.uint8), PAGE])
    words = ["images/a.tif, page 2", "1200x1000 pixels", "--max-megapixels 2"]
    refuse_download(*MASKS, "--max-megapixels", "1", words=words)
    samples.set_pixel_limit(MAX_MEGAPIXELS)
