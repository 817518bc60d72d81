"""One picture file to its samples: every depth, arrangement and format, masks, what is refused.

The files are written by Pillow, OpenCV, tifffile and by hand.
"""

import io
import itertools
import struct
import subprocess
import sys
import zlib
from unittest import mock

import cv2
import numpy as np
import pytest
import tifffile
from helpers import STORED_TURNED, png_bytes, read_rgb, save_turned
from numpy.testing import assert_array_equal
from PIL import Image
from PIL.TiffImagePlugin import AppendingTiffWriter

from medseg.masks import read_mask
from medseg.samples import Page, count_pages, pixel_format, read_samples, to_uint8

GREY = np.tile(np.arange(0, 250, 5, dtype=np.uint8), (40, 1))
RNG = np.random.default_rng(0)
CHANNELS = {"photometric": "minisblack", "planarconfig": "contig"}  # in one page


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
        "16bit.tif": Image.fromarray(GREY.astype(np.uint16) * 257),
        "float.tif": Image.fromarray(GREY.astype(np.float32) / 255),
        "32bit.tif": Image.fromarray(GREY.astype(np.int32)),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
        assert_array_equal(read_rgb(tmp_path / name), rgb, err_msg=name)
    Image.fromarray(rgb).save(tmp_path / "photo.jpg", quality=95)
    assert np.abs(read_rgb(tmp_path / "photo.jpg").astype(int) - rgb).max() < 12
    Image.fromarray(rgb).convert("1").save(tmp_path / "bilevel.png")
    assert set(np.unique(read_rgb(tmp_path / "bilevel.png"))) == {0, 255}
    cmyk = Image.fromarray(rgb).convert("CMYK")
    cmyk.save(tmp_path / "cmyk.tif")
    assert_array_equal(values_of(tmp_path / "cmyk.tif"), np.asarray(cmyk.convert("RGB")))


@pytest.mark.parametrize("dtype", "u1 u2 u4 u8 i1 i2 i4 i8 f2 f4 f8".split())
def test_tiff_of_every_type_order_and_arrangement(tmp_path, dtype):
    path = tmp_path / "a.tif"
    for channels, order, planar in itertools.product((1, 2, 3, 4, 5, 7, 16), "<>", (False, True)):
        values = drawn(dtype, 21, 18, channels)
        stored = np.moveaxis(values, 2, 0) if planar and channels > 1 else values.squeeze()
        layout = {"planarconfig": "separate" if planar else "contig"} if channels > 1 else {}
        options = {"photometric": "rgb" if channels == 3 else "minisblack", "metadata": None}
        for extra in (
            {},
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


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colours_and_alpha(tmp_path, suffix, channels):
    """OpenCV's channels are blue, green, red and alpha."""
    values, path = drawn(np.uint16, 30, 20, channels), str(tmp_path / f"a{suffix}")
    cv2.imwrite(path, values)
    assert_array_equal(values_of(path), values[..., 2::-1])
    assert_array_equal(
        values_of(io.BytesIO((tmp_path / f"a{suffix}").read_bytes())), values_of(path)
    )
    assert pixel_format(path).startswith("16-bit RGB")
    (tmp_path / "la.png").write_bytes(png_bytes(values[..., :2]))
    assert_array_equal(values_of(tmp_path / "la.png"), values[..., :1])


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i2", "f4"])
def test_what_stores_white_as_zero_is_inverted(tmp_path, dtype):
    values = drawn(dtype, 20, 30)
    white = {"u": np.iinfo("u4").max >> 32 - 8 * int(dtype[1]), "i": -1, "f": 1}[dtype[0]]
    for order, compression in itertools.product("<>", (None, "lzw")):
        options = {"byteorder": order, "compression": compression, "photometric": "miniswhite"}
        tifffile.imwrite(tmp_path / "a.tif", values, **options)
        assert_array_equal(values_of(tmp_path / "a.tif")[..., 0], values.dtype.type(white) - values)
    tifffile.imwrite(tmp_path / "a.tif", (values > 0).astype(dtype), photometric="miniswhite")
    read = read_mask(tmp_path / "a.tif")[1]
    assert_array_equal(read, white - (values > 0).astype(int))


def test_bits_and_palettes(tmp_path):
    path, indices = tmp_path / "a.tif", drawn(np.uint16, 20, 30, top=4095)
    for photometric in ("minisblack", "miniswhite"):
        tifffile.imwrite(path, indices, bitspersample=12, photometric=photometric)
        shown = 4095 - indices if photometric == "miniswhite" else indices
        assert_array_equal(values_of(path)[..., 0], shown)
    for dtype, size in ((np.uint8, 256), (np.uint16, 65536)):
        colours, indices = drawn(np.uint16, 3, size), drawn(dtype, 20, 30)
        tifffile.imwrite(path, indices, photometric="palette", colormap=colours)
        assert_array_equal(values_of(path), (colours >> 8).T[indices])
        assert_array_equal(read_mask(path, palette_colours=False)[1], indices)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_more_than_8_bits_are_scaled_by_range_or_window(bits):
    white = 2**bits - 1
    values = np.arange(white + 1, dtype=np.uint16).reshape(-1, 1, 1)
    assert_array_equal(to_uint8(values), (values * (255 / white)).round())
    assert_array_equal(to_uint8(values), to_uint8(values.astype(np.int64)))
    for kind in (np.uint16, np.int32, np.float32):
        scaled = to_uint8(values.astype(kind), window=(100, 50)).ravel()
        assert (
            (scaled[:76] == 0).all() and (scaled[125:] == 255).all() and scaled[100] in (127, 128)
        )
    eight = values[:256].astype(np.uint8)
    assert_array_equal(to_uint8(eight, window=(100, 50)), eight)
    assert_array_equal(to_uint8(eight, 255.0 * 2, (100, 50)), to_uint8(eight, 510))
    with pytest.raises(ValueError):
        to_uint8(np.float32([[[np.nan]]]))
    with pytest.raises(ValueError):
        to_uint8(np.int16([[[-1]]]))
    assert to_uint8(np.int16([[[-5]], [[5]]]), window=(0, 10)).ravel().tolist() == [0, 255]


def test_alpha_is_told_from_other_extra_samples(tmp_path):
    path, values = tmp_path / "a.tif", drawn(np.uint16, 8, 9, 5)
    for extra, kept in {
        ("unspecified", "unspecified"): [0, 1, 2, 3, 4],
        ("unspecified", "unassalpha"): [0, 1, 2, 3],
    }.items():
        tifffile.imwrite(path, values, photometric="rgb", extrasamples=extra)
        assert_array_equal(values_of(path), values[..., kept])
    options = {
        "photometric": "miniswhite",
        "planarconfig": "contig",
        "extrasamples": ["unassalpha"],
    }
    for dtype in (np.uint8, np.uint16):
        grey = drawn(dtype, 8, 9, 2)
        tifffile.imwrite(path, grey, **options)
        half = np.iinfo(dtype).max // 2
        shown = np.where(grey[..., 1] > half, np.iinfo(dtype).max - grey[..., 0], 0)
        assert_array_equal(read_mask(path)[1], shown)


# name: (bytes of 3 x 2 pixels, the red ones)
PNM = {
    "a.ppm": (b"P6 3 2 255\n" + bytes(range(18)), [0, 3, 6, 9, 12, 15]),
    "b.ppm": (b"P6\n# by hand\n3 2\n100\n" + bytes(range(0, 90, 5)), [0, 38, 76, 115, 153, 191]),
    "c.ppm": (b"P6 3 2 65535\n" + bytes([128, 0] * 15 + [255] * 6), [128] * 5 + [255]),
    "d.pgm": (b"P5 3 2 255\n" + bytes(range(6)), [0, 1, 2, 3, 4, 5]),
    "e.pgm": (b"P5 3 2 4095\n" + bytes([4, 0] * 6), [64] * 6),
    "f.pgm": (b"P5 3 2 65535\n" + bytes([8, 0] * 5 + [15, 255]), [128] * 5 + [255]),
    "g.pgm": (b"P2 3 2 10 # ten\n0 1 2\n10 5 10", [0, 26, 51, 255, 128, 255]),
    "h.ppm": (b"P3 3 2 1\n1 1 1 0 0 0 1 1 1\n0 0 0 1 1 1 0 0 0\n", [255, 0, 255, 0, 255, 0]),
    "i.pbm": (b"P4 3 2\n\x40\xa0", [255, 0, 255, 0, 255, 0]),
    "j.pnm": (b"P5 3 2 255\n" + bytes(range(6)), [0, 1, 2, 3, 4, 5]),
}


@pytest.mark.parametrize("name", PNM)
def test_pnm_is_scaled_from_the_range_that_it_names(tmp_path, name):
    content, red = PNM[name]
    (tmp_path / name).write_bytes(content)
    assert read_rgb(tmp_path / name)[..., 0].ravel().tolist() == red
    bits = {"c.ppm": 16, "e.pgm": 16, "f.pgm": 16, "i.pbm": 1}.get(name, 8)
    assert pixel_format(tmp_path / name).startswith(f"{bits}-bit")
    for damaged in (content.rstrip()[:-2], content[:6]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=name) as caught:
            read_rgb(tmp_path / name)
        assert "reshape" not in str(caught.value)  # it says what is wrong with the file


# ---- several pictures in a file --------------------------------------------------------------


def test_axes_that_the_file_names_are_channels_or_pages(tmp_path):
    path = tmp_path / "a.tif"
    values = drawn(np.uint16, 4, 3, 20, 30)  # slices, channels
    for options in ({"ome": True}, {"imagej": True}, {}):
        for axes, stored in (("ZCYX", values), ("CZYX", values.swapaxes(0, 1))):
            if "imagej" in options and axes != "ZCYX":
                continue
            tifffile.imwrite(
                path, stored, photometric="minisblack", metadata={"axes": axes}, **options
            )
            assert count_pages(path) == 4
            for number in range(4):
                assert_array_equal(values_of(Page(path, number)), np.moveaxis(values[number], 0, 2))
            with pytest.raises(ValueError, match="4 pictures"):
                read_samples(path)
        tifffile.imwrite(
            path, values[0], photometric="minisblack", metadata={"axes": "CYX"}, **options
        )
        assert count_pages(path) == 1
        assert_array_equal(values_of(path), np.moveaxis(values[0], 0, 2))
    tifffile.imwrite(path, values[0], photometric="minisblack", metadata=None)  # pages, unnamed
    assert count_pages(path) == 3
    assert_array_equal(values_of(Page(path, 1))[..., 0], values[0, 1])


def test_smaller_copies_and_masks_of_a_page_are_no_pages(tmp_path):
    path, values = tmp_path / "a.tif", drawn(np.uint8, 64, 64, 3)
    with tifffile.TiffWriter(path) as file:
        file.write(values[::4, ::4], subfiletype=1, photometric="rgb", metadata=None)
        file.write(values, photometric="rgb", metadata=None)
        file.write(values[::2, ::2], subfiletype=1, photometric="rgb", metadata=None)
        file.write(values[..., 0] > 9, subfiletype=4, metadata=None)
    assert count_pages(path) == 1
    assert_array_equal(values_of(path), values)


def test_the_first_picture_of_a_camera_s_file(tmp_path):
    first, second = (Image.fromarray(drawn(np.uint8, 24, 24, 3)) for _ in range(2))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    first.save(tmp_path / "b.jpg", "JPEG")
    assert Image.open(tmp_path / "a.jpg").n_frames == 2
    assert_array_equal(values_of(tmp_path / "a.jpg"), values_of(tmp_path / "b.jpg"))


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_animations_are_refused(tmp_path, suffix):
    moving = tmp_path / f"moving{suffix}"
    Image.fromarray(GREY).save(moving, save_all=True, append_images=[Image.fromarray(255 - GREY)])
    with pytest.raises(ValueError, match=f"{moving.name}.*2 pictures"):
        read_rgb(moving)
    moving.write_bytes(moving.read_bytes()[:90])
    with pytest.raises(ValueError, match=moving.name):
        read_rgb(moving)


# ---- damaged, forged and too large -----------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "packbits"])
def test_a_cut_tiff_is_an_error_and_not_zeros(tmp_path, compression):
    path = tmp_path / "a.tif"
    for values in (drawn(np.uint8, 40, 30), drawn(np.uint16, 40, 30, 5), drawn("f8", 40, 30)):
        for tile in (None, (16, 16)):
            options = {"tile": tile, "rowsperstrip": None if tile else 7, "metadata": None}
            tifffile.imwrite(path, values, compression=compression, **options)
            content = path.read_bytes()
            for part in (0.3, 0.6, 0.9):
                path.write_bytes(content[: int(len(content) * part)])
                with pytest.raises(ValueError, match="a.tif"):
                    read_rgb(path)


def test_forged_headers_do_not_fill_the_memory(tmp_path):
    path = tmp_path / "a.tif"
    for tag, value in {"ImageWidth": 1 << 30, "SamplesPerPixel": 60000}.items():
        tifffile.imwrite(path, drawn(np.uint16, 32, 32, 5), tile=(16, 16), **CHANNELS)
        with tifffile.TiffFile(path, mode="r+b") as file:
            file.pages[0].tags[tag].overwrite(value)
        with mock.patch("tifffile.TiffPage.asarray", side_effect=AssertionError("decoded")):
            with pytest.raises(ValueError, match="a.tif") as caught:
                read_rgb(path)
        assert "decoded" not in str(caught.value)
    for size in ((40_000, 40_000), (10_000, 10_000)):  # Pillow only warns of the second
        (tmp_path / "bomb.png").write_bytes(png_bytes(GREY[..., None], size=size))
        with pytest.raises(ValueError, match="bomb.png.*--max-megapixels"):
            read_rgb(tmp_path / "bomb.png")


def test_pictures_that_are_refused(tmp_path):
    Image.new("L", (64, 64)).save(
        tmp_path / "stack.tif", save_all=True, append_images=[Image.new("L", (64, 64))]
    )
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "head.tif").write_bytes(b"II*\0" + bytes(4))
    Image.effect_noise((200, 200), 50).save(tmp_path / "complete.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "complete.jpg").read_bytes()[:3000])
    tifffile.imwrite(tmp_path / "many.tif", drawn(np.uint8, 8, 8, 17), **CHANNELS)
    tifffile.imwrite(tmp_path / "complex.tif", drawn("f4", 8, 8).astype(np.complex64))
    tifffile.imwrite(
        tmp_path / "deep.tif", drawn(np.uint8, 16, 16, 16), volumetric=True, tile=(16,) * 3
    )
    refused = "stack.tif text.png empty.jpg head.tif cut.jpg many.tif complex.tif deep.tif"
    for name in refused.split():
        with pytest.raises(ValueError, match=name):
            read_rgb(tmp_path / name)
    with pytest.raises(ValueError, match="folder"):
        read_rgb(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing.png"):
        read_rgb(tmp_path / "nothing.png")


def test_without_imagecodecs_a_tiff_that_needs_it_says_so(tmp_path):
    """What Pillow reads right is read without it."""
    values = drawn(np.uint8, 20, 30, 3)
    tifffile.imwrite(tmp_path / "a.tif", values, compression="lzw", photometric="rgb")
    tifffile.imwrite(tmp_path / "b.tif", values.astype(np.uint16), compression="lzw")
    code = "import sys; sys.modules['imagecodecs'] = None; from medseg.images import read_image; "
    code += f"print(read_image(r'{tmp_path}/a.tif').size); read_image(r'{tmp_path}/b.tif')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "(30, 20)" in result.stdout and "b.tif" in result.stderr
    assert "`pip install imagecodecs`" in result.stderr


# ---- masks -----------------------------------------------------------------------------------


def test_masks_of_every_format_keep_their_values(tmp_path):
    values = drawn(np.uint8, 9, 12, top=3)
    grey, colour = Image.fromarray(values), np.stack([values] * 3, 2)
    files = {
        "a.pgm": b"P5 12 9 3\n" + values.tobytes(),
        "b.pgm": b"P2 12 9 3\n" + " ".join(map(str, values.ravel())).encode(),
        "c.pgm": b"P5 12 9 300\n" + values.astype(">u2").tobytes(),
        "e.png": png_bytes(colour * np.uint16(257)),
        "f.png": png_bytes(np.stack([values, np.full_like(values, 255)], 2) * np.uint16(257)),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    tifffile.imwrite(tmp_path / "d.tif", colour.astype(np.uint16), photometric="rgb")
    for dtype in ("i8", "u8", "f2", "f8"):
        tifffile.imwrite(tmp_path / f"t{dtype}.tif", values.astype(dtype))
    grey.save(tmp_path / "g.webp", lossless=True)
    grey.save(tmp_path / "h.gif")
    grey.convert("RGB").save(tmp_path / "i.ppm")
    for path in sorted(tmp_path.iterdir()):
        kind, read = read_mask(path)
        colour = path.name in ("d.tif", "e.png", "g.webp", "i.ppm")
        assert kind == ("colour" if colour else "grey"), path.name
        factor = 0x010101 if colour else 257 if path.name == "f.png" else 1
        assert_array_equal(read, values.astype(int) * factor, err_msg=path.name)
    clear = np.stack([values, np.zeros_like(values)], 2).astype(np.uint16)
    (tmp_path / "f.png").write_bytes(png_bytes(clear))
    assert not read_mask(tmp_path / "f.png")[1].any()  # all of it is transparent
    wrong = {"d.tif": np.full((8, 8, 3), 300, np.uint16), "e.tif": drawn(np.uint8, 8, 8, 5)}
    wrong |= {"f.tif": drawn(np.uint8, 8, 8, 2), "g.tif": np.full((8, 8), 0.5)}
    for name, pixels in wrong.items():
        options = {"d.tif": {"photometric": "rgb"}, "g.tif": {}}.get(name, CHANNELS)
        tifffile.imwrite(tmp_path / name, pixels, **options)
        with pytest.raises(ValueError, match=name):
            read_mask(tmp_path / name)


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_labels_that_are_whole_but_for_rounding(tmp_path, suffix, capsys):
    labels = drawn(np.uint8, 9, 12)
    for name in "ab":
        path = tmp_path / f"{name}{suffix}"
        values = (labels * 1.0000153).astype(np.float32)
        np.save(path, values) if suffix == ".npy" else tifffile.imwrite(path, values)
        assert_array_equal(read_mask(path)[1], labels)
    assert capsys.readouterr().out.count("warning: ") == 1  # for the folder


def palette_mask(path, colours, indices):
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette(np.array(colours, np.uint8).tobytes())
    image.save(path)


def test_palettes_in_the_order_of_their_writer_are_read_by_colour(tmp_path):
    """Class numbers begin with a background that is black or not there, and keep their indices."""
    black, white, red = (0, 0, 0), (255, 255, 255), (200, 0, 0)
    indices = drawn(np.uint8, 9, 12, top=1)
    for suffix in (".png", ".tif", ".bmp"):
        path = tmp_path / f"a{suffix}"
        for colours in ((white, black), (red, black)):
            palette_mask(path, [*colours, *[(7, 7, 7)] * 254], indices)
            encoding, codes = read_mask(path)
            code = 0xFFFFFF if colours[0] == white else 0xC80000
            assert encoding == "colour" and set(codes[indices == 0].tolist()) == {code}
            assert not codes[indices == 1].any()
        for colours in ((black, white, red), (white, red), (red, (9, 9, 9), black)):
            palette_mask(path, [*colours, *[(7, 7, 7)] * (256 - len(colours))], indices)
            assert read_mask(path)[0] == "palette"
            assert_array_equal(read_mask(path)[1], indices)
    palette_mask(path, [red] * 255 + [black], indices * 255)  # what is ignored, in black
    assert read_mask(path)[0] == "palette"
    disc = Image.fromarray(np.kron(indices, np.ones((9, 9), np.uint8)) * 255)
    for mode, share in itertools.product(
        ("RGB", "RGBA"), (disc, Image.eval(disc, lambda v: 255 - v))
    ):
        share.convert(mode).save(tmp_path / "a.gif")
        assert_array_equal(read_mask(tmp_path / "a.gif")[1] & 255, np.asarray(share))


def test_a_mask_that_is_black_everywhere_is_its_alpha(tmp_path):
    alpha = drawn(np.uint8, 9, 12, top=1) * np.uint8(255)
    for bands, factor in ((4, 1), (2, 1), (4, 257)):
        pixels = np.zeros((9, 12, bands), np.uint16 if factor > 1 else np.uint8)
        pixels[..., -1] = alpha * np.uint16(factor)
        (tmp_path / "a.png").write_bytes(png_bytes(pixels))
        encoding, values = read_mask(tmp_path / "a.png")
        assert encoding == "alpha"
        assert_array_equal(values, alpha)
    pixels[..., -1] = 65535
    (tmp_path / "a.png").write_bytes(png_bytes(pixels))
    assert not read_mask(tmp_path / "a.png")[1].any()  # an empty mask


@pytest.mark.parametrize("profile", [b"", b"odd"])
def test_lossy_webp_is_told_by_whatever_chunks_it_has(tmp_path, profile):
    """A profile lies before the pixels, and a chunk of odd length has a byte of padding."""
    mask = Image.fromarray(np.eye(40, dtype=np.uint8) * 255).convert("RGBA")
    for lossless, kind in ((False, "lossy WebP"), (True, "colour")):
        mask.save(tmp_path / "a.webp", lossless=lossless, icc_profile=profile)
        assert read_mask(tmp_path / "a.webp")[0] == kind
    mask.convert("RGB").save(tmp_path / "a.tif", compression="jpeg")
    assert read_mask(tmp_path / "a.tif")[0] == "JPEG"


# ---- pictures that are stored turned (EXIF) --------------------------------------------------


def with_exif(content, orientation):
    """The bytes of a PNG with an eXIf chunk behind its pixels, where the format allows it too."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    chunk = b"eXIf" + exif.tobytes(8)[6:]
    packed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content[:-12] + packed + content[-12:]  # 12: IEND


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_and_masks_are_read_as_they_are_shown(tmp_path, orientation):
    shown, turn = drawn(np.uint8, 24, 40, 3), STORED_TURNED[orientation]
    codes = shown.astype(int) @ (65536, 256, 1)
    for suffix in (".png", ".webp", ".tif"):
        path = tmp_path / f"a{suffix}"
        options = {"lossless": True} if suffix == ".webp" else {}
        save_turned(shown[..., 0], path, orientation, **options)
        assert_array_equal(read_rgb(path)[..., 1], shown[..., 0])
        assert_array_equal(read_mask(path)[1] & 255, shown[..., 0])
        save_turned(shown, path, orientation, **options)
        assert_array_equal(read_rgb(path), shown, err_msg=suffix)
        assert_array_equal(read_mask(path)[1], codes, err_msg=suffix)
        assert read_samples(path).orientation == orientation
    save_turned(shown, tmp_path / "a.jpg", orientation, quality=95)
    inverse = {6: 8, 8: 6}.get(orientation, orientation)  # turns a picture back
    expected = STORED_TURNED[inverse](np.asarray(Image.open(tmp_path / "a.jpg")))  # of the file
    assert_array_equal(read_rgb(tmp_path / "a.jpg"), expected)
    deep = shown.astype(np.uint16) * 257
    for channels in (1, 2, 3, 4):
        values = np.concatenate([deep, deep[..., :1] | 32768], 2)[..., :channels]
        (tmp_path / "a.png").write_bytes(with_exif(png_bytes(turn(values)), orientation))
        colours = channels - 1 + channels % 2
        assert_array_equal(values_of(tmp_path / "a.png"), values[..., :colours])
        layout = CHANNELS if channels > 1 else {}
        tag = [(0x0112, 3, 1, orientation, True)]
        tifffile.imwrite(tmp_path / "b.tif", turn(values.squeeze()), extratags=tag, **layout)
        assert_array_equal(values_of(tmp_path / "b.tif"), values)


def test_a_damaged_png_is_refused_though_its_exif_is_looked_for(tmp_path):
    """Pillow looks for it behind the pixels, and forgets the damage that it met on the way."""
    content = bytearray(png_bytes(drawn(np.uint8, 24, 40, 3)))
    content[900] ^= 255
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png"):
        read_rgb(tmp_path / "a.png")


def test_pages_of_a_tiff_have_their_own_orientation(tmp_path):
    shown = drawn(np.uint8, 3, 9, 14)
    with AppendingTiffWriter(tmp_path / "a.tif", True) as file:
        for orientation, page in zip((6, 1, 3), shown, strict=True):
            save_turned(page, file, orientation, format="TIFF")
            file.newFrame()
    for number, expected in enumerate(shown):
        assert_array_equal(read_rgb(Page(tmp_path / "a.tif", number))[..., 0], expected)
