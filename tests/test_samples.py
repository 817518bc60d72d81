"""One picture file to its samples: every depth, arrangement and format, masks, pages, refusals.

The files are written by Pillow, OpenCV, tifffile and by hand.
"""

import io
import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from helpers import (
    MASKS,
    STORED_TURNED,
    annotations,
    png_bytes,
    read_rgb,
    refuse,
    refuse_download,
    run_download,
    run_python,
    save_pair,
    save_turned,
    stored,
)
from numpy.testing import assert_array_equal
from PIL import Image

from medseg.cli import MAX_MEGAPIXELS
from medseg.images import read_image, resize_nearest
from medseg.masks import read_mask
from medseg.samples import Page, count_pages, pixel_format, read_samples, set_pixel_limit, to_uint8

GREY = np.tile(np.arange(0, 250, 5, dtype=np.uint8), (40, 1))
RNG = np.random.default_rng(0)


def drawn(dtype, *shape, top=None):
    """Random values of a type, over all of its range or up to `top`."""
    if np.dtype(dtype).kind == "f":
        return RNG.random(shape).astype(dtype)
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max if top is None else top, shape, dtype, endpoint=True)


def values_of(path):
    return read_samples(path).values


# ---- depths and arrangements -----------------------------------------------------------------


def test_formats_and_modes(tmp_path):
    grey, rgb = Image.fromarray(GREY), np.stack([GREY] * 3, 2)
    pictures = {
        **{"grey.png": grey, "palette.png": grey.convert("P"), "la.png": grey.convert("LA")},
        **{name: Image.fromarray(rgb) for name in ("rgb.bmp", "rgb.tif", "a.webp", "b.gif")},
        "rgba.png": Image.fromarray(rgb).convert("RGBA"),
        "16bit.png": Image.fromarray(GREY.astype(np.uint16) * 257),
        "float.tif": Image.fromarray(GREY.astype(np.float32) / 255),
        "32bit.tif": Image.fromarray(GREY.astype(np.int32)),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
        assert_array_equal(read_rgb(tmp_path / name), rgb, err_msg=name)
    photos = [Image.fromarray(drawn(np.uint8, 24, 24, 3)) for _ in range(2)]
    photos[0].save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=photos[1:])
    photos[0].save(tmp_path / "plain.jpg")
    assert Image.open(tmp_path / "camera.jpg").n_frames == 2  # of which the first is read
    assert_array_equal(values_of(tmp_path / "camera.jpg"), Image.open(tmp_path / "plain.jpg"))
    Image.fromarray(rgb).convert("1").save(tmp_path / "bilevel.png")
    assert set(np.unique(read_rgb(tmp_path / "bilevel.png"))) == {0, 255}
    cmyk = Image.fromarray(rgb).convert("CMYK")
    cmyk.save(tmp_path / "cmyk.tif")
    assert_array_equal(values_of(tmp_path / "cmyk.tif"), np.asarray(cmyk.convert("RGB")))


@pytest.mark.parametrize("dtype", "u1 u2 u4 u8 i1 i2 i4 i8 f2 f4 f8".split())
def test_tiff_of_every_type_order_and_arrangement(tmp_path, dtype):
    """Whole ones have their values; cut ones are an error, not zeros."""
    path = tmp_path / "a.tif"
    for channels, order, planar in itertools.product((1, 2, 3, 4, 5, 16), "<>", (False, True)):
        values = drawn(dtype, 21, 18, channels)
        stored = np.moveaxis(values, 2, 0) if planar and channels > 1 else values.squeeze()
        layout = {"planarconfig": "separate" if planar else "contig"} if channels > 1 else {}
        options = {"photometric": "rgb" if channels == 3 else "minisblack", "metadata": None}
        for extra in (
            {"bigtiff": True},
            {"tile": (16, 16), "compression": "zlib"},
            {"compression": "zlib", "predictor": dtype not in ("u8", "i8"), "rowsperstrip": 5},
            {"compression": "lzw", "rowsperstrip": 4},
        ):
            tifffile.imwrite(path, stored, byteorder=order, **layout, **options, **extra)
            assert_array_equal(values_of(path), values, err_msg=f"{channels} {order} {extra}")
            name = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
            kind = "floating-point" if dtype[0] == "f" else f"{8 * int(dtype[1])}-bit"
            assert pixel_format(path) == f"{kind} {name}"
            content = path.read_bytes()
            path.write_bytes(content[: len(content) * 9 // 10])
            refuse(read_image, path)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colours_and_alpha(tmp_path, channels):
    values, colours = drawn(np.uint16, 30, 20, channels), channels - 1 + channels % 2
    (tmp_path / "a.png").write_bytes(content := png_bytes(values))
    for source in (tmp_path / "a.png", io.BytesIO(content)):
        assert_array_equal(values_of(source), values[..., :colours])
    assert pixel_format(tmp_path / "a.png").startswith("16-bit")
    if channels == 2:  # what is transparent in a mask is background
        opaque = values[..., 1] > 32767
        assert_array_equal(read_mask(tmp_path / "a.png")[1], np.where(opaque, values[..., 0], 0))
    else:  # OpenCV's are blue, green, red and alpha
        cv2.imwrite(str(tmp_path / "a.tif"), values)
        assert_array_equal(values_of(tmp_path / "a.tif"), values[..., 2::-1])


def test_white_as_zero_palettes_and_extra_samples(tmp_path):
    path, white_is_zero = tmp_path / "a.tif", {"photometric": "miniswhite"}
    for bits, dtype in ((8, np.uint8), (16, np.uint16), (32, np.uint32)):
        values = drawn(dtype, 20, 30, top=min(2**bits - 1, 99_999))
        for order, compression in (("<", None), (">", "lzw")):
            options = {"byteorder": order, "compression": compression, **white_is_zero}
            tifffile.imwrite(path, values, **options)
            assert_array_equal(values_of(path)[..., 0], 2**bits - 1 - values)
            assert_array_equal(read_mask(path)[1], 2**bits - 1 - values)
    values = drawn(np.uint16, 20, 30, top=4095)
    for options, shown in (({}, values), (white_is_zero, 4095 - values)):
        tifffile.imwrite(path, values, bitspersample=12, **options)
        assert_array_equal(values_of(path)[..., 0], shown)
    for dtype, size in ((np.uint8, 256), (np.uint16, 65536)):
        colours, indices = drawn(np.uint16, 3, size), drawn(dtype, 20, 30)
        tifffile.imwrite(path, indices, photometric="palette", colormap=colours)
        assert_array_equal(values_of(path), (colours >> 8).T[indices])
        assert_array_equal(read_mask(path, palette_colours=False)[1], indices)
    values = drawn(np.uint16, 8, 9, 5)
    for last, kept in (("unspecified", 5), ("unassalpha", 4), ("assocalpha", 4)):
        tifffile.imwrite(path, values, photometric="rgb", extrasamples=("unspecified", last))
        assert_array_equal(values_of(path), values[..., :kept])


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_more_than_8_bits_are_scaled_by_range_or_window(bits):
    white = 2**bits - 1
    values = np.arange(white + 1, dtype=np.uint16).reshape(-1, 1, 1)
    for kind in (np.uint16, np.int64):
        assert_array_equal(to_uint8(values.astype(kind)), (values * (255 / white)).round())
    for kind in (np.uint16, np.int32, np.float32):
        scaled = to_uint8(values.astype(kind), window=(100, 50)).ravel()
        assert set(scaled[:76]) == {0} and set(scaled[125:]) == {255} and scaled[100] in (127, 128)
    eight = values[:256].astype(np.uint8)
    assert_array_equal(to_uint8(eight, window=(100, 50)), eight)
    assert_array_equal(to_uint8(eight, 510.0, (100, 50)), (eight / 2).round())
    for wrong in (np.float32([[[np.nan]]]), np.int16([[[-1]]])):
        with pytest.raises(ValueError):
            to_uint8(wrong)
    assert to_uint8(np.int16([[[-5]], [[5]]]), window=(0, 10)).ravel().tolist() == [0, 255]


def test_nearest_takes_the_pixel_under_the_centre():
    mask = drawn(np.uint8, 7, 10)
    for size in ((3, 5), (14, 23), (9, 4)):
        tensor = torch.from_numpy(mask)[None, None]
        wanted = torch.nn.functional.interpolate(tensor, size, mode="nearest-exact")[0, 0]
        assert_array_equal(resize_nearest(mask, *size), wanted)


@pytest.mark.parametrize(
    "content, red, bits",  # of 3 x 2 pixels
    [
        (b"P6\n# by hand\n3 2\n100\n" + bytes(range(0, 90, 5)), [0, 38, 76, 115, 153, 191], 8),
        (b"P6 3 2 65535\n" + bytes([128, 0] * 15 + [255] * 6), [128] * 5 + [255], 16),
        (b"P5 3 2 4095\n" + bytes([4, 0] * 6), [64] * 6, 16),
        (b"P2 3 2 10 # ten\n0 1 2\n10 5 10", [0, 26, 51, 255, 128, 255], 8),
        (b"P4 3 2\n\x40\xa0", [255, 0, 255, 0, 255, 0], 1),
    ],
)
def test_pnm_is_scaled_from_the_range_that_it_names(tmp_path, content, red, bits):
    path = tmp_path / "a.pnm"
    path.write_bytes(content)
    assert read_rgb(path)[..., 0].ravel().tolist() == red
    assert pixel_format(path).startswith(f"{bits}-bit")
    path.write_bytes(content.rstrip()[:-2])
    refuse(read_rgb, path)


# ---- several pictures in a file --------------------------------------------------------------


def test_axes_that_the_file_names_are_channels_or_pages(tmp_path):
    path, values = tmp_path / "a.tif", drawn(np.uint16, 4, 3, 20, 30)  # slices, channels

    def write(stored, axes, **options):
        metadata = {"axes": axes} if axes else None
        tifffile.imwrite(path, stored, photometric="minisblack", metadata=metadata, **options)
        return count_pages(path)

    for options, axes in (({"ome": True}, "CZYX"), ({"imagej": True}, "ZCYX"), ({}, "CZYX")):
        assert write(values if axes == "ZCYX" else values.swapaxes(0, 1), axes, **options) == 4
        for number in range(4):
            assert_array_equal(values_of(Page(path, number)), np.moveaxis(values[number], 0, 2))
        with pytest.raises(ValueError, match="4 pictures"):
            read_samples(path)
        assert write(values[0], "CYX", **options) == 1
        assert_array_equal(values_of(path), np.moveaxis(values[0], 0, 2))
    assert write(values[0], None) == 3  # pages without a name
    assert_array_equal(values_of(Page(path, 1))[..., 0], values[0, 1])
    with tifffile.TiffWriter(path) as file:  # smaller copies of a page and its mask are no pages
        for step, kind in ((4, 1), (1, 0), (2, 1)):
            file.write(values[0, 0, ::step, ::step], subfiletype=kind, metadata=None)
        file.write(values[0, 0] > 9, subfiletype=4, metadata=None)
    assert_array_equal(values_of(path)[..., 0], values[0, 0])


# ---- damaged, too large and refused ----------------------------------------------------------


def test_pictures_that_are_refused(tmp_path):
    two = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    for name in ("stack.tif", "moving.webp", "moving.gif"):
        two[0].save(tmp_path / name, save_all=True, append_images=two[1:])
        refuse(read_rgb, tmp_path / name, "2 pictures")
    Image.effect_noise((200, 200), 50).save(tmp_path / "whole.jpg")
    cut = (tmp_path / "whole.jpg").read_bytes()[:3000]
    for content in (b"not a picture", b"", b"II*\0" + bytes(4), cut):
        (tmp_path / "a.png").write_bytes(content)
        refuse(read_rgb, tmp_path / "a.png")
    for side in (40_000, 10_000):  # Pillow only warns of the second
        (tmp_path / "bomb.png").write_bytes(png_bytes(GREY[..., None], size=(side, side)))
        refuse(read_rgb, tmp_path / "bomb.png", "--max-megapixels")
    for pixels, options in (
        (drawn(np.uint8, 8, 8, 17), {"photometric": "minisblack", "planarconfig": "contig"}),
        (drawn("f4", 8, 8).astype(np.complex64), {}),
        (drawn(np.uint8, 8, 8, 3), {"photometric": "cielab"}),
    ):
        tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
        refuse(read_rgb, tmp_path / "a.tif")
    refuse(read_rgb, tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing.png"):
        read_rgb(tmp_path / "nothing.png")


def test_without_imagecodecs_a_tiff_that_needs_it_says_so(tmp_path):
    """What Pillow reads right is read without it."""
    values = drawn(np.uint8, 20, 30, 3)
    tifffile.imwrite(tmp_path / "a.tif", values, compression="lzw", photometric="rgb")
    tifffile.imwrite(tmp_path / "b.tif", values.astype(np.uint16), compression="lzw")
    code = "import sys; sys.modules['imagecodecs'] = None; from medseg.images import read_image; "
    code += f"print(read_image(r'{tmp_path}/a.tif').size); read_image(r'{tmp_path}/b.tif')"
    result = run_python("-c", code, cwd=tmp_path)
    assert "(30, 20)" in result.stdout
    assert "b.tif" in result.stderr and "`pip install imagecodecs`" in result.stderr


# ---- masks -----------------------------------------------------------------------------------


def test_masks_keep_their_values(tmp_path):
    values, path = drawn(np.uint8, 9, 12, top=3), tmp_path / "a.tif"
    colour = np.stack([values] * 3, 2)
    for content in (
        b"P5 12 9 3\n" + values.tobytes(),
        b"P5 12 9 300\n" + values.astype(">u2").tobytes(),
    ):
        (tmp_path / "a.pgm").write_bytes(content)
        assert_array_equal(read_mask(tmp_path / "a.pgm")[1], values)
    for factor in (1, 256, 257):  # 8 bits a colour, in the lower byte, the upper one and both
        tifffile.imwrite(path, colour * np.uint16(factor), photometric="rgb")
        kind, read = read_mask(path)
        assert kind == "colour"
        assert_array_equal(read, values.astype(int) * 0x010101, err_msg=str(factor))
    for pixels in (np.full((8, 8, 3), 300, np.uint16), drawn(np.uint8, 8, 8, 5)):
        tifffile.imwrite(path, pixels, photometric="rgb" if pixels.shape[2] == 3 else "minisblack")
        refuse(read_mask, path)
    mask = Image.fromarray(values * np.uint8(80)).convert("RGBA")
    for lossless, kind in ((False, "lossy WebP"), (True, "colour")):
        # A profile lies before the pixels, and a chunk of odd length has a byte of padding.
        mask.save(tmp_path / "a.webp", lossless=lossless, icc_profile=b"odd")
        assert read_mask(tmp_path / "a.webp")[0] == kind
    mask.convert("RGB").save(path, compression="jpeg")
    assert read_mask(path)[0] == "JPEG"


# ---- pictures that are stored turned (EXIF) --------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_and_masks_are_read_as_they_are_shown(tmp_path, orientation):
    shown, turn = drawn(np.uint8, 24, 40, 3), STORED_TURNED[orientation]
    for suffix in (".png", ".webp", ".tif"):
        path = tmp_path / f"a{suffix}"
        options = {"lossless": True} if suffix == ".webp" else {}
        save_turned(shown, path, orientation, **options)
        assert_array_equal(read_rgb(path), shown, err_msg=suffix)
        assert_array_equal(read_mask(path)[1], shown.astype(int) @ (65536, 256, 1), err_msg=suffix)
        assert read_samples(path).orientation == orientation
    save_turned(shown, tmp_path / "a.jpg", orientation, quality=95)
    inverse = {6: 8, 8: 6}.get(orientation, orientation)  # turns a picture back
    expected = STORED_TURNED[inverse](np.asarray(Image.open(tmp_path / "a.jpg")))  # of the file
    assert_array_equal(read_rgb(tmp_path / "a.jpg"), expected)
    deep, tag = drawn(np.uint16, 24, 40, 3), [(0x0112, 3, 1, orientation, True)]
    tifffile.imwrite(tmp_path / "deep.tif", turn(deep), photometric="rgb", extratags=tag)
    assert_array_equal(values_of(tmp_path / "deep.tif"), deep)


# ---- pages, which download.py imports as an image each ---------------------------------------


def stack(path, pages):
    """Write arrays as the pages of a TIFF file."""
    Path(path).parent.mkdir(exist_ok=True)
    first, *others = map(Image.fromarray, pages)
    first.save(path, save_all=True, append_images=others, compression="tiff_lzw")


def test_pages_come_back_bit_for_bit(here):
    pages = {"a": [drawn(np.uint8, 30 + n, 40) for n in range(3)]}
    pages["b"] = [drawn(np.uint16, 25, 20) for _ in range(2)]
    masks = {}
    for name in "ab":
        own = [drawn(np.uint16, *page.shape, top=2) for page in pages[name]]
        stack(f"images/{name}.TIFF", pages[name])
        stack(f"masks/{name}_mask.tif", own)
        masks |= {f"{name}_p{number:03d}": mask for number, mask in enumerate(own)}
    save_pair("c")
    Path("masks/c.png").rename("masks/c_mask.png")
    assert "pages: 5 of 2 TIFF files" in run_download(*MASKS, "--classes", "x,y")
    written = stored()
    assert written.keys() == {*masks, "c"}
    for name, mask in masks.items():
        assert_array_equal(written[name]["x"] + 2 * written[name]["y"], mask)
        page = pages[name[0]][int(name[-3:])]
        shown = (page * (255 / np.iinfo(page.dtype).max)).round()
        assert_array_equal(read_rgb(f"dataset/train/{name}.png")[..., 0], shown)
    records = annotations("train")["images"]
    groups = {record["file_name"][0]: record.get("group") for record in records}
    assert groups == {"a": "a", "b": "b", "c": None}  # those of a file stay in one split


def test_bad_pages_are_one_line(here):
    page = np.ones((30, 40), np.uint8)
    stack("images/a.tif", [page] * 3)
    stack("masks/a.tif", [page] * 2)
    refuse_download(*MASKS, words=["masks/a.tif", "2 pages", "images/a.tif", "3"])
    stack("masks/a.tif", [page, page, page.T])
    refuse_download(*MASKS, words=["masks/a.tif, page 3", "30x40"])
    stack("masks/a.tif", [page] * 3)
    stack("images/a.tif", [page, np.ones((1000, 1200), np.uint8), page])
    words = ["images/a.tif, page 2", "1200x1000 pixels", "--max-megapixels 2"]
    refuse_download(*MASKS, "--max-megapixels", "1", words=words)
    set_pixel_limit(MAX_MEGAPIXELS)
    Path("images/a.tif").write_bytes(Path("images/a.tif").read_bytes()[:-200])
    refuse_download(*MASKS, words=["a.tif"])
