"""Volumes, against values by hand, nibabel's own files and its reader, and SimpleITK's."""

import gzip
import itertools
import math
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from helpers import (
    NIBABEL_DATA,
    ROOT,
    refuse,
    slices_of,
    stored_as,
    voxels_of,
    write_dicom,
    write_itk,
    write_nifti,
)
from numpy.testing import assert_allclose, assert_array_equal

from medseg import settings, volumes
from medseg.dicom import read_dicom
from medseg.drawing import overlay
from medseg.files import base_name, file_format
from medseg.results.folder import montage
from medseg.settings import window_limits, window_to_uint8
from medseg.volume_files import is_sealed_mask
from medseg.volumes import open_volume, stack_volumes, write_mask

# ---- kinds and names -------------------------------------------------------------------------


def test_the_format_is_told_by_suffix_and_without_one_by_content(tmp_path):
    assert file_format("a.dcm") == file_format("a.DICOM") == file_format("x/a.Ima") == "dicom"
    for name in ("a.nii", "A.NII.GZ", "a.nrrd", "a.nhdr", "a.mha", "a.MHD"):
        assert file_format(name) == "volume", name
    for name in ("a.png", "a.gz", "missing", tmp_path):
        assert file_format(name) is None, name
    dicom_file, nifti = write_dicom(tmp_path / "a.dcm"), tmp_path / "a.nii"
    write_nifti(nifti, np.zeros((2, 3, 4), np.int16))
    write_nifti(tmp_path / "b.nii", np.zeros((2, 3, 4), np.int16), version=2)
    for name, source, wanted in [
        ("IM0001", dicom_file, "dicom"),
        ("1.2.840.113619", dicom_file, "dicom"),
        ("volume", nifti, "volume"),
        ("volume2", tmp_path / "b.nii", "volume"),
        ("note.7", Path(__file__), None),
        ("a.txt", dicom_file, None),
    ]:
        (tmp_path / name).write_bytes(source.read_bytes())
        assert file_format(tmp_path / name) == wanted, name
    assert file_format(tmp_path) == "volume"  # there is a DICOM file in it
    assert len(read_dicom(tmp_path / "1.2.840.113619")) == 1
    for name in ("volume", "volume2"):
        assert open_volume(tmp_path / name).shape == (2, 3, 4)
    names = {"x/a.b.nii.gz": "a.b", "a.NII": "a", "a.dcm": "a", "1.2.840": "1.2.840", "a.mha": "a"}
    for name, wanted in names.items():
        assert base_name(name) == wanted


def test_window_to_uint8_by_hand():
    values = [-np.inf, -5, 0, 1, 2.5, 5, 10, 11, np.inf, np.nan]
    wanted = [0, 0, 0, 26, 64, 128, 255, 255, 255, 0]  # 25.5, 63.75 and 127.5 are rounded to even
    assert window_to_uint8(values, 0, 10).tolist() == wanted
    inverted = window_to_uint8(values, 0, 10, inverted=True).tolist()
    assert inverted == [255 - one for one in wanted[:-1]] + [0]
    assert window_to_uint8(np.array([3, 4, 5], np.int16), 4, 4).tolist() == [0, 0, 255]
    assert window_limits((40, 80)) == (0, 80)
    for bad in [(0, 0), (0, -1), (np.nan, 1), (0, np.inf)]:
        with pytest.raises(ValueError, match="shows nothing"):
            window_limits(bad)


# ---- volumes ---------------------------------------------------------------------------------

TURN = np.array([[0, 0, 3, 10], [-1, 0.1, 0, 20], [0.1, 1, 0, -30], [0, 0, 0, 1.0]])
SHEARED = np.array([[1, 0.4, 0, 5], [0, 2, 0.3, 6], [0.2, 0, 3, -7], [0, 0, 0, 1]])
VOXELS = np.random.default_rng(0).integers(-999, 999, (4, 5, 6)).astype(np.int16)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("zooms", [(3, 1, 1), (1, 3, 1), (1, 1, 3), (1, 1, 1), (1, 3, 3)])
def test_slices_are_cut_across_the_largest_spacing_in_stored_order(tmp_path, zooms, suffix):
    volume = open_volume(write_nifti(tmp_path / f"a{suffix}", VOXELS, zooms=zooms))
    axis = {(3, 1, 1): 0, (1, 3, 1): 1}.get(zooms, 2)
    assert (volume.axis, volume.shape, volume.spacing) == (axis, (4, 5, 6), zooms)
    assert len(volume) == VOXELS.shape[axis]
    assert_array_equal(voxels_of(volume), VOXELS)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("shape", [(1, 8, 9), (8, 1, 9), (8, 9, 1), (8, 9)])
def test_a_picture_that_is_stored_as_a_volume_is_one_slice(tmp_path, suffix, shape):
    axis = (*shape, 1).index(1)
    path, voxels = tmp_path / f"a{suffix}", np.arange(72, dtype=np.int16).reshape(shape)
    if suffix in (".mha", ".nrrd"):
        write_itk(path, voxels)
    else:
        affine = np.diag([*(1 if side == 1 else 2 for side in (*shape, 1)[:3]), 1])
        write_nifti(path, voxels, affine)
    volume = open_volume(path)
    assert (volume.axis, len(volume)) == (axis, 1)
    assert_array_equal(volume[0][..., 0], voxels.reshape(8, 9))
    write_mask(tmp_path / f"m{suffix}", volume, [voxels.reshape(8, 9) > 50])
    again = open_volume(tmp_path / f"m{suffix}")
    assert again.header.shape == volume.header.shape
    assert_array_equal(again[0][..., 0], voxels.reshape(8, 9) > 50)


@pytest.mark.parametrize("content", ["plain", "compressed", "in two members"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_whatever_the_suffix_says_of_compression(tmp_path, name, content):
    plain = write_nifti(tmp_path / "x.nii", VOXELS).read_bytes()
    written = plain if content == "plain" else gzip.compress(plain)
    if content == "in two members":
        written = gzip.compress(plain[:500]) + gzip.compress(plain[500:])
    (tmp_path / name).write_bytes(written)
    assert_array_equal(voxels_of(open_volume(tmp_path / name)), VOXELS)


def test_slope_and_intercept_by_hand(tmp_path):
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = write_nifti(tmp_path / "a.nii", voxels, slope=2.0, intercept=-10.0)
    assert_array_equal(nibabel.load(path).get_fdata(), voxels * 2 - 10)
    volume = open_volume(path)
    assert_array_equal(slices_of(volume)[3], voxels[..., 3] * 2 - 10)
    assert_allclose(volume.limits, [np.percentile(voxels * 2 - 10, [0.5, 99.5])])
    # Center 10, width 20: 0 to 20. Slice 3 holds 3, 7, ... 23: -4, 4, 12 / 20, 28, 36.
    assert volume.pictures((10, 20))[3][..., 0].tolist() == [[0, 51, 153], [255, 255, 255]]


def test_samples_of_nibabel(tmp_path):
    volume = open_volume(NIBABEL_DATA / "anatomical.nii")  # big-endian
    image = nibabel.load(NIBABEL_DATA / "anatomical.nii")
    data = image.get_fdata()
    assert_array_equal(voxels_of(volume), data.astype(np.float32))
    assert_allclose(volume.limits[0], np.percentile(data, [0.5, 99.5]))
    write_mask(tmp_path / "m.nii.gz", volume, slices_of(volume) > 9000)
    back = nibabel.load(tmp_path / "m.nii.gz")
    assert_array_equal(np.asarray(back.dataobj), data > 9000)
    assert_array_equal(back.affine, image.affine)


@pytest.mark.parametrize("name", ["example4d.nii.gz", "functional.nii", "example_nifti2.nii.gz"])
def test_four_axes_are_channels_or_time(tmp_path, name):
    path = NIBABEL_DATA / name
    refuse(open_volume, path, " x ", "--channels", "--time")
    data = nibabel.load(path).get_fdata().astype(np.float32)
    volumes_in_time = data.shape[3]
    volume = open_volume(path, time=True)
    count = volume.shape[volume.axis]
    assert (volume.n_channels, len(volume)) == (1, volumes_in_time * count)
    wanted = np.moveaxis(data, (3, volume.axis), (0, 1)).reshape(len(volume), *volume[0].shape[:2])
    assert_array_equal(slices_of(volume), wanted)
    write_mask(tmp_path / "m.nii.gz", volume, wanted > 100)
    back = nibabel.load(tmp_path / "m.nii.gz")
    assert_array_equal(np.asarray(back.dataobj), data > 100)
    assert_array_equal(back.affine, nibabel.load(path).affine)
    if volumes_in_time > 16:
        return refuse(lambda path: open_volume(path, time=False), path, f"{volumes_in_time} ch")
    volume = open_volume(path, time=False)
    assert (volume.n_channels, len(volume)) == (volumes_in_time, count)
    assert_array_equal(np.stack([*volume]), np.moveaxis(data, volume.axis, 0))
    limits = [np.percentile(one, [0.5, 99.5]) for one in np.moveaxis(data, 3, 0)]
    assert_allclose(volume.limits, limits)
    picture = volume.pictures()[count // 2]
    for channel, (low, high) in enumerate(limits):
        own = (volume[count // 2][..., channel].clip(low, high) - low) * 255 / (high - low)
        assert np.abs(picture[..., channel] - own).max() <= 0.501
    write_mask(tmp_path / "m.nii.gz", volume, slices_of(volume) > 100)
    assert_array_equal(nibabel.load(tmp_path / "m.nii.gz").dataobj, data[..., 0] > 100)


def test_vectors_are_channels_and_modalities_are_stacked(tmp_path):
    channels = np.random.default_rng(1).normal(0, 99, (4, 5, 6, 3)).astype(np.float32)
    for suffix in (".nrrd", ".mha"):
        volume = open_volume(write_itk(tmp_path / f"v{suffix}", channels, vector=True))
        assert volume.n_channels == 3
        assert_array_equal(np.stack([*volume], volume.axis), channels)
    apart = np.eye(4)
    apart[0, 3] = 2.5
    turned = stored_as(nibabel.Nifti1Image(VOXELS, np.eye(4)), "PSL")
    turned.to_filename(tmp_path / "b.nii")
    paths = write_nifti(tmp_path / "a.nii", channels[..., 0]), tmp_path / "b.nii"
    stacked = stack_volumes([open_volume(path, "RAS") for path in paths], ["t1", "flair"])
    assert (stacked.channels, stacked.n_channels, stacked.shape) == (("t1", "flair"), 2, (4, 5, 6))
    assert_array_equal(voxels_of(stacked), channels[..., 0])
    assert_array_equal(np.moveaxis(slices_of(stacked, 1), 0, stacked.axis), VOXELS)
    assert stacked.pictures()[0].shape[2] == len(stacked.limits) == 2
    for voxels, word in ((VOXELS, "2.5 mm"), (VOXELS[1:], "3 x 5 x 6")):
        other = open_volume(write_nifti(tmp_path / "c.nii", voxels, apart))
        with pytest.raises(ValueError, match=f"c.nii: .*{word}"):
            stack_volumes([stacked, other], ["t1", "t2"])


def test_nan_is_dark_and_not_counted(tmp_path):
    voxels = np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    voxels[0, 0], voxels[1, 2, 3] = np.nan, np.inf
    volume = open_volume(write_nifti(tmp_path / "a.nii.gz", voxels))
    assert_allclose(volume.limits[0], np.percentile(voxels[np.isfinite(voxels)], [0.5, 99.5]))
    assert volume.pictures()[0][0, 0] == 0 and volume.pictures()[3][1, 2] == 255


@pytest.mark.parametrize("shape", [(6, 4, 50), (5, 4, 60), (4, 5, 60)])
def test_percentiles_come_from_every_column(here, monkeypatch, shape):
    """One voxel of four is dark, at the same columns of every slice: a step of four is misled."""
    monkeypatch.setattr(volumes, "SAMPLE", math.prod(shape) // 4)
    columns = np.arange(shape[0])[:, None] + shape[0] * np.arange(shape[1])
    voxels = np.where(columns % 4 == 0, 10, 200)[..., None].repeat(shape[2], 2).astype(np.int16)
    assert open_volume(write_nifti(here / "a.nii", voxels)).limits == [(10, 200)]


COLOUR = np.zeros((2, 3, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(
    "content, word",
    [
        (np.zeros((2, 3, 4), np.complex64), "complex64"),
        (COLOUR, "real numbers"),
        (np.full((2, 3, 4), np.nan, np.float32), "finite"),
        (np.zeros(5, np.int16), "no volume"),
        (b"hello" * 200, "not a NIfTI"),
        (b"", "not a NIfTI"),
        (None, "a folder"),
    ],
)
def test_what_is_no_volume_of_real_numbers_is_one_line(tmp_path, content, word):
    path = tmp_path / "a.nii"
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_nifti(path, content)
    refuse(open_volume, path, word)
    for read in (open_volume, read_dicom):
        with pytest.raises(FileNotFoundError, match="none.nii: no such file"):
            read(tmp_path / "none.nii")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_cut_and_damaged_volumes_are_one_line(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write = write_itk if suffix in (".nrrd", ".mha") else write_nifti
    write(path, np.random.default_rng(0).integers(0, 99, (20, 20, 20)).astype("i2"))
    content = path.read_bytes()
    contents = [content]
    if suffix == ".mha":
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(path)), str(path), True)  # compressed
        contents.append(path.read_bytes())
    for content in contents:
        for keep in (0, 5, 200, 347, 351, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:keep])
            refuse(open_volume, path)
    if suffix == ".nii.gz":
        damaged = bytearray(content)
        damaged[-6] ^= 1  # the checksum
        path.write_bytes(damaged)
        refuse(open_volume, path, "CRC")


@pytest.mark.parametrize(
    "shape, word",
    [
        ((32767, 32767, 32767), "GiB"),
        ((12000, 12000, 1), "89 million"),
        ((9400, 9400, 1), ""),
    ],
)
def test_an_absurd_size_is_refused_before_memory_is_taken(tmp_path, shape, word):
    content = bytearray(write_nifti(tmp_path / "x.nii", np.zeros((2, 3, 4), "u1")).read_bytes())
    content[42:48] = struct.pack("<3h", *shape)
    (tmp_path / "a.nii").write_bytes(content)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(bytes(content)))
    for name in ("a.nii", "b.nii.gz"):
        tracemalloc.start()
        refuse(open_volume, tmp_path / name, word)
        assert not word or tracemalloc.get_traced_memory()[1] < 1_000_000
        tracemalloc.stop()


# ---- NRRD and MetaImage ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr", "a.mha", "a.mhd"])
@pytest.mark.parametrize("affine", [TURN, SHEARED, np.diag([-0.5, -0.8, 2, 1])])
def test_other_formats_are_read_as_nifti_is(tmp_path, name, affine):
    image = write_nifti(tmp_path / "a.nii", VOXELS, affine)
    nifti, volume = open_volume(image), open_volume(write_itk(tmp_path / name, VOXELS, affine))
    assert_allclose(volume.affine, nifti.affine, atol=1e-5)
    assert_allclose(volume.stored_spacing, nifti.stored_spacing, rtol=1e-6)
    assert (volume.axis, volume.stored_orientation) == (nifti.axis, nifti.stored_orientation)
    assert_array_equal(slices_of(volume), slices_of(nifti))
    assert volume.limits == nifti.limits
    for suffix in (".nrrd", ".mha", ".nii.gz"):
        path = tmp_path / f"m{suffix}"
        write_mask(path, volume, slices_of(volume) > 100)
        again = open_volume(path)
        assert_array_equal(voxels_of(again), VOXELS > 100)
        assert_allclose(again.affine, volume.affine, atol=1e-5)
        assert is_sealed_mask(path)
        content = bytearray(path.read_bytes())
        write_mask(path, volume, slices_of(volume) > 200)
        assert path.read_bytes() != content and is_sealed_mask(path)
        changed = SimpleITK.ReadImage(str(path))
        changed[1, 1, 1] = 1 - changed[1, 1, 1]
        SimpleITK.WriteImage(changed, str(path))
        assert not is_sealed_mask(path)


HEADER = "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\n"
NRRD = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n"


@pytest.mark.parametrize(
    "name, content",
    [
        *[
            ("a.mhd", f"{HEADER}ElementDataFile = {data}\n")
            for data in ("../secret.raw", "link.raw", "none.raw", "LIST\n../v.raw", "short.raw")
        ],
        ("a.nrrd", f"{NRRD}data file: ../secret.raw\n\n"),
        ("a.nhdr", f"{NRRD}datafile: /etc/hostname\n\n"),
        ("a.mha", HEADER.replace("2 2 2", "9999 9999 999") + "ElementDataFile = LOCAL\n"),
        ("a.mha", "nothing"),
        ("a.nrrd", "nothing"),
    ],
)
def test_headers_that_lead_elsewhere_or_claim_too_much(here, name, content):
    (here / "in").mkdir()
    (here / "secret.raw").write_bytes(bytes(8))
    (here / "in" / "link.raw").symlink_to("../secret.raw")
    (here / "in" / "short.raw").write_bytes(bytes(7))
    path = here / "in" / name
    path.write_text(content)
    refuse(open_volume, path)
    (here / "in" / "ok.raw").write_bytes(bytes(range(8)))
    (here / "in" / "b.mhd").write_text(f"{HEADER}ElementDataFile = ok.raw\n")
    volume = open_volume(here / "in" / "b.mhd")
    assert voxels_of(volume).ravel(order="F").tolist() == [*range(8)]
    assert volume.stored_spacing is None  # the header has none


# ---- mask volumes ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 1), (4, 5)])
def test_a_mask_volume_lies_where_the_volume_lies(tmp_path, suffix, version, shape):
    rng = np.random.default_rng(0)
    make = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = make(rng.normal(0, 99, shape).astype(np.float32), TURN)
    image.header.set_slope_inter(0.5, 3)
    image.set_sform(TURN, "mni")
    image.set_qform(TURN, "scanner")
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"] = 99
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"secret name"))
    image.to_filename(tmp_path / "a.nii")
    volume = open_volume(tmp_path / "a.nii")
    masks = rng.integers(0, 3, slices_of(volume).shape).astype(np.uint8)
    path = tmp_path / f"a_mask{suffix}"
    write_mask(path, volume, iter(masks))
    back = nibabel.load(path)
    assert isinstance(back, make) and back.shape == shape
    assert back.get_data_dtype() == np.uint8
    assert_array_equal(back.affine, nibabel.load(tmp_path / "a.nii").affine)
    written = np.asarray(back.dataobj).reshape(volume.shape)
    assert_array_equal(written, np.moveaxis(masks, 0, volume.axis))
    for key in ("sform_code", "qform_code", "xyzt_units", "pixdim"):
        assert_array_equal(back.header[key], image.header[key])
    assert back.header["cal_max"] == 0 and not back.header.extensions
    assert back.header.get_slope_inter() in [(1, 0), (None, None)]
    again = open_volume(path)
    assert (again.axis, again.shape, again.spacing) == (volume.axis, volume.shape, volume.spacing)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_mask_volume_is_whole_or_absent(tmp_path):
    volume = open_volume(write_nifti(tmp_path / "a.nii", np.ones((4, 5, 3), np.int16)))

    def failing():
        yield np.zeros((4, 5))
        raise RuntimeError("the network stopped")

    for name in ("a_mask.nii.gz", "a_mask.mha"):
        path = tmp_path / name
        path.write_bytes(b"earlier")
        with pytest.raises(RuntimeError):
            write_mask(path, volume, failing())
        for wrong in ([np.zeros((4, 5))] * 2, [np.zeros((4, 5))] * 4):
            with pytest.raises(ValueError):
                write_mask(path, volume, wrong)
        assert path.read_bytes() == b"earlier"
    assert sorted(os.listdir(tmp_path)) == ["a.nii", "a_mask.mha", "a_mask.nii.gz"]


def test_the_48_orientations():
    letters = ["".join(letters) for letters in itertools.permutations("LRPAIS", 3)]
    opposite = dict(zip("LRPAIS", "RLAPSI", strict=True))
    wanted = {word for word in letters if len({*word, *map(opposite.get, word)}) == 6}
    assert settings.ORIENTATIONS == wanted and len(wanted) == 48


@pytest.mark.parametrize("orientation", sorted(settings.ORIENTATIONS))
def test_a_volume_is_turned_and_its_mask_back(here, orientation):
    """Bit for bit as nibabel turns it, and every voxel at its place in the world."""
    image = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), TURN)
    as_stored, turned = stored_as(image, orientation), stored_as(image, "LPS")
    as_stored.to_filename("a.nii.gz")
    write_itk("a.nrrd", np.asarray(as_stored.dataobj), as_stored.affine)
    for name in ("a.nii.gz", "a.nrrd"):
        volume = open_volume(name, "LPS")
        assert volume.stored_orientation == orientation
        assert_allclose(volume.affine, turned.affine, atol=1e-5)
        assert_array_equal(voxels_of(volume), turned.dataobj)
        assert_array_equal(voxels_of(open_volume(name)), as_stored.dataobj)  # untold: as stored
        write_mask("m.nii.gz", volume, slices_of(volume))
        back = nibabel.load("m.nii.gz")
        assert_array_equal(back.dataobj, as_stored.dataobj)
        assert_allclose(back.affine, as_stored.affine, atol=1e-5)


# ---- missing libraries, memory, damage -------------------------------------------------------


@pytest.mark.parametrize(
    "name, library", [("a.dcm", "pydicom"), ("a.nii", "nibabel"), ("a.mha", "SimpleITK")]
)
def test_missing_libraries_are_named_with_the_command(here, monkeypatch, name, library):
    write_dicom(here / "a.dcm")
    write_nifti(here / "a.nii", VOXELS)
    write_itk(here / "a.mha", VOXELS)
    monkeypatch.setitem(sys.modules, library, None)
    refuse(read_dicom if name == "a.dcm" else open_volume, name, f"`pip install {library}`")


def test_importing_the_readers_imports_no_library():
    code = (
        "import sys, medseg.dicom, medseg.volumes; "
        "print({'torch', 'pydicom', 'nibabel', 'SimpleITK'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


def test_memory_stays_near_the_stored_size(tmp_path):
    voxels = np.zeros((256, 256, 150), np.int16)  # 19.7 MB; 79 MB as float32
    voxels[::7, ::5, ::3] = 900
    path = write_nifti(tmp_path / "a.nii.gz", voxels)
    tracemalloc.start()
    volume = open_volume(path)
    write_mask(tmp_path / "m.nii.gz", volume, (one[..., 0] > 100 for one in volume))
    assert [picture.max() > 0 for picture in volume.pictures()] == [True, False, False] * 50
    peak = tracemalloc.get_traced_memory()[1] >> 20  # mask 10, a million voxels as float64, twice
    tracemalloc.stop()
    assert peak < 60, f"{peak} MiB"
    assert np.count_nonzero(nibabel.load(tmp_path / "m.nii.gz").dataobj) == 37 * 52 * 50


def test_a_large_slice_takes_little_memory(here):
    """At the limit of 89 million pixels, 20 bytes each are 1.8 GB."""
    pixels = np.full((2000, 1000, 1), 90, np.uint8)
    pixels[::3] = 200
    volume = open_volume(write_nifti(here / "a.nii", pixels, slope=2.0, intercept=-10.0))
    tracemalloc.start()
    picture = volume.pictures((200, 400))[0]
    sheet = montage([picture], [np.ones(picture.shape[:2], np.uint8)], draw=overlay)
    peak = tracemalloc.get_traced_memory()[1] / picture.size
    tracemalloc.stop()
    assert peak < 20, f"{peak:.1f} bytes a pixel"
    assert np.unique(picture).tolist() == [108, 249]  # 170 and 390 of 0..400: 108.4, 248.6
    assert sheet.size[1] > 256
