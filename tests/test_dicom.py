"""DICOM frames and series, against values by hand, pydicom's own files and its reader."""

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from helpers import STORED, refuse, sample, slices_of, write_dicom, write_series
from numpy.testing import assert_allclose, assert_array_equal

from medseg.dicom import read_dicom
from medseg.predicting.inputs import expand, open_file
from medseg.volumes import open_volume

RESCALED = {"RescaleSlope": "2", "RescaleIntercept": "-100"}  # -100 100 200 / 300 500 1900
WINDOWED = {**RESCALED, "WindowCenter": ["200", "5"], "WindowWidth": ["400", "5"]}  # 0..400
MONO1 = {"PhotometricInterpretation": "MONOCHROME1"}
WHOLE_RANGE = [[0, 26, 38], [51, 76, 255]]  # 25.5, 38.25, 51, 76.5 of 0..1000
SIGNED = STORED.astype(np.int16) - 1000
SIGNED_PADDING = pydicom.DataElement(0x00280120, "US", 64536)


@pytest.mark.parametrize(
    "pixels, fields, wanted",
    [
        (STORED, WINDOWED, [[0, 64, 128], [191, 255, 255]]),  # 63.75 127.5 / 191.25
        (STORED, {**WINDOWED, **MONO1}, [[255, 191, 128], [64, 0, 0]]),
        (STORED, {"WindowCenter": "0", "WindowWidth": "0"}, WHOLE_RANGE),  # useless
        (SIGNED, {}, WHOLE_RANGE),
        (STORED * 0, {}, [[0, 0, 0], [0, 0, 0]]),
        (STORED, {"PixelPaddingValue": 1000, **WINDOWED}, [[0, 64, 128], [191, 255, 0]]),
        (STORED, {"PixelPaddingValue": 200, "PixelPaddingRangeLimit": 0}, [[0, 0, 0], [0, 0, 255]]),
        (SIGNED, {"PixelPaddingValue": SIGNED_PADDING}, [[0, 0, 14], [28, 57, 255]]),  # -900..0
    ],
)
def test_frames_by_hand(tmp_path, pixels, fields, wanted):
    path = write_dicom(tmp_path / "a.dcm", pixels, **fields)
    assert read_dicom(path)[0].tolist() == wanted
    if fields is WINDOWED:
        assert read_dicom(path, (100, 400))[0].tolist() == [[0, 128, 191], [255, 255, 255]]


def item(**values):
    dataset = pydicom.Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def test_frames_have_their_own_slope_and_window_and_share_their_range(tmp_path):
    stack = np.stack([STORED // 4, STORED // 2, STORED])  # the first alone would be too bright
    factors = np.array([1, 2, 4])[:, None, None]
    rescale = [item(RescaleSlope=k, RescaleIntercept=0, RescaleType="US") for k in (1, 2, 4)]
    slopes = [item(PixelValueTransformationSequence=[one]) for one in rescale]
    windows = [item(WindowCenter=500 * k, WindowWidth=1000 * k) for k in (1, 2, 4)]
    windows = [item(FrameVOILUTSequence=[one]) for one in windows]
    shared, own = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
    for groups, wanted in (
        ({}, stack * 0.255),
        ({own: slopes, shared: windows[:1]}, (stack * factors * 0.255).clip(0, 255)),
        ({own: windows}, stack * (0.255 / factors)),
    ):
        frames = read_dicom(write_dicom(tmp_path / "a.dcm", stack, **groups))
        assert_array_equal(list(frames), wanted.round())
        assert_array_equal(frames[-1], wanted[2].round())


def test_deflated_jpeg_2000_and_colour_whatever_the_window():
    for name, size in [("image_dfl.dcm", (512, 512)), ("JPEG2000.dcm", (1024, 256))]:
        (frame,) = read_dicom(sample(name))
        assert frame.shape == size and frame.max() == 255
    path = sample("SC_rgb_rle_2frame.dcm")
    frames = list(read_dicom(path, (0, 1)))
    assert_array_equal(frames, pydicom.dcmread(path).pixel_array)
    assert frames[0].shape == (100, 100, 3) and frames[0][5, 5].tolist() == [255, 0, 0]
    assert_array_equal(read_dicom(sample("SC_rgb_rle_16bit_2frame.dcm")), frames)
    ybr = read_dicom(sample("SC_ybr_full_422_uncompressed.dcm"))[0]  # the same test picture
    assert np.abs(ybr[5, 5].astype(int) - [255, 0, 0]).max() < 5
    palette = pydicom.dcmread(sample("examples_palette.dcm"))
    reds = np.frombuffer(palette.RedPaletteColorLookupTableData, "<u2") >> 8
    shown = read_dicom(sample("examples_palette.dcm"))[0]
    assert_array_equal(shown[..., 0], reds[palette.pixel_array])
    pictures, _ = open_file(*expand([path]))
    assert [one.name[-5:] for one in pictures] == ["_f000", "_f001"]


def test_what_cannot_be_read_is_one_line(tmp_path):
    def read_frames(path):
        return list(read_dicom(path))

    path = tmp_path / "a.dcm"
    for keep in (0, 133, 400, 39000):
        path.write_bytes(Path(sample("CT_small.dcm")).read_bytes()[:keep])
        refuse(read_frames, path)
    for name in "MR_truncated rtplan meta_missing_tsyntax".split():
        refuse(read_frames, sample(f"{name}.dcm"))
    refuse(read_frames, sample("JPEG-lossy.dcm"), "`pip install")
    refuse(read_frames, write_dicom(path, Rows=65535, Columns=65535), "--max-megapixels")
    (tmp_path / "empty").mkdir()
    refuse(open_volume, tmp_path / "empty")
    for values in ({"NumberOfFrames": 3}, {"Rows": 3}, {"PhotometricInterpretation": "HSV"}):
        refuse(read_frames, write_dicom(path, **values))


# ---- a DICOM series as a volume ---------------------------------------------------------------

SERIES = np.random.default_rng(3).integers(0, 900, (5, 6, 4)).astype(np.int16)
OBLIQUE = (0.8, 0.6, 0, 0, 0, -1)


@pytest.mark.parametrize(("axes", "fields"), [((0, 0, -1, 0, 1, 0), {}), (OBLIQUE, MONO1)])
def test_a_series_is_a_volume(tmp_path, axes, fields):
    slopes = {"RescaleSlope": lambda number: str(number + 1), "RescaleIntercept": "-3"}
    folder = write_series(tmp_path / "s", SERIES, axes=axes, **slopes, **fields)
    shutil.copy(sample("rtplan.dcm"), folder / "plan.dcm")  # without pixels
    (folder / "notes.txt").write_text("notes")
    volume, normal = open_volume(folder), np.cross(axes[:3], axes[3:])
    files = [pydicom.dcmread(path) for path in folder.glob("?_*.dcm")]
    files.sort(key=lambda one: np.dot(one.ImagePositionPatient, normal))
    assert (len(volume), volume.shape, volume.axis) == (5, (4, 6, 5), 2)
    assert_allclose(volume.stored_spacing, (0.8, 0.5, 2))
    for values, one in zip(slices_of(volume), files, strict=True):
        wanted = one.pixel_array * float(one.RescaleSlope) - 3
        assert_array_equal(values.T, wanted)
        (x, y, z), step = one.ImagePositionPatient, np.array(one.PixelSpacing)
        place = volume.affine @ [0, 0, files.index(one), 1]  # in RAS, where DICOM has LPS
        assert_allclose(place, [-x, -y, z, 1], atol=1e-6)
    sides = volume.affine[:3, :2] / step[::-1]
    assert_allclose(sides.T * [-1, -1, 1], np.reshape(axes, (2, 3)), atol=1e-6)
    low, high = volume.limits[0]
    clipped = (slices_of(volume).clip(low, high) - low) * 255 / (high - low)
    pictures = np.stack([*volume.pictures()])[..., 0]
    assert_array_equal(pictures, abs(255 * bool(fields) - clipped).round())


def test_padding_of_a_series_and_frames_of_one_file(tmp_path):
    padded = {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 100, **MONO1}
    rescaled = {"RescaleIntercept": "7", "RescaleSlope": "1"}
    volume = open_volume(write_series(tmp_path / "s", SERIES, **padded, **rescaled))
    wanted = np.where(SERIES <= 100, np.nan, SERIES + 7)
    assert_array_equal(slices_of(volume).transpose(0, 2, 1), wanted)
    assert_allclose(volume.limits[0], np.nanpercentile(wanted, [0.5, 99.5]))
    assert not np.stack([*volume.pictures()])[np.isnan(slices_of(volume))].any()
    (tmp_path / "e").mkdir()
    places = [item(ImagePositionPatient=[5, 70, z]) for z in (4, 0, 2)]
    groups = {"PerFrameFunctionalGroupsSequence": [item(PlanePositionSequence=[p]) for p in places]}
    shared = item(PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])])
    shared.PixelMeasuresSequence = [item(PixelSpacing=[1, 1])]
    groups["SharedFunctionalGroupsSequence"] = [shared]
    write_dicom(tmp_path / "e" / "a", SERIES[:3], SeriesInstanceUID="1.2", **groups)
    volume = open_volume(tmp_path / "e")
    assert_array_equal(slices_of(volume).transpose(0, 2, 1), SERIES[[1, 2, 0]])


def add_slice(z=0, **fields):
    """Add a slice to a series, whose slices lie from -10 to -2 mm, 2 mm apart."""
    fields = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [0.5, 0.8], **fields}
    fields = {"ImagePositionPatient": [5, 70, z], "SeriesInstanceUID": "1.2.9", **fields}
    return lambda folder: write_dicom(folder / "other.dcm", SERIES[0], **fields)


def tilt(folder):
    for path in folder.iterdir():
        one = pydicom.dcmread(path)
        one.ImagePositionPatient[1] += one.ImagePositionPatient[2] * 0.1
        one.save_as(path)


@pytest.mark.parametrize(
    "change, words",
    [
        (add_slice(SeriesInstanceUID="1.2.10"), "2 series"),
        (add_slice(1), "2 to 3 mm"),
        (add_slice(PixelSpacing=[0.5, 0.9]), "PixelSpacing"),
        (add_slice(ImagePositionPatient=None), "place"),
        (add_slice(ImageOrientationPatient=[0, 1, 0, 0, 0, 1]), "direction"),
        (tilt, "tilted"),
        (lambda folder: [path.unlink() for path in list(folder.iterdir())[1:]], "1 slices"),
    ],
)
def test_what_is_no_series_of_even_slices_is_one_line(tmp_path, change, words):
    folder = write_series(tmp_path / "s", SERIES)
    change(folder)
    refuse(open_volume, folder, words, "dcm2niix")
