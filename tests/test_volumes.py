"""Volumes, against values by hand, nibabel's own files and its reader, and SimpleITK's."""

import gzip
import math
import struct
import sys
import tracemalloc

import nibabel
import numpy as np
import pytest
import SimpleITK
from helpers import (
    refuse,
    slices_of,
    stored_as,
    voxels_of,
    write_dicom,
    write_itk,
    write_nifti,
)
from numpy.testing import assert_allclose, assert_array_equal

from medseg import volumes
from medseg.dicom import read_dicom
from medseg.files import base_name, file_format
from medseg.volume_files import is_sealed_mask
from medseg.volumes import StackedVolume, open_volume, write_mask

TURN = np.array([[0, 0, 3, 10], [-1, 0.1, 0, 20], [0.1, 1, 0, -30], [0, 0, 0, 1.0]])
VOXELS = np.random.default_rng(0).integers(-999, 999, (4, 5, 6)).astype(np.int16)


@pytest.mark.parametrize("version", [1, 2])
def test_the_format_is_told_by_suffix_and_without_one_by_content(tmp_path, version):
    assert [*map(file_format, ("x/a.Ima", "A.NII.GZ", "a.txt"))] == ["dicom", "volume", None]
    path = write_nifti(tmp_path / "a.nii", VOXELS, version=version)
    plain = path.read_bytes()
    in_two_members = gzip.compress(plain[:500]) + gzip.compress(plain[500:])
    for name in ("1.2.840", "b.nii", "b.nii.gz"):
        for content in (plain, gzip.compress(plain), in_two_members):
            (tmp_path / name).write_bytes(content)
            assert_array_equal(voxels_of(open_volume(tmp_path / name)), VOXELS)
    path.rename(tmp_path / "1.2.840")
    assert file_format(tmp_path / "1.2.840") == "volume"
    assert [*map(base_name, ("x/a.b.nii.gz", "x/1.2.840"))] == ["a.b", "1.2.840"]


# ---- slices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 9), (8, 1, 9), (8, 9)])
def test_a_picture_that_is_stored_as_a_volume_is_one_slice(tmp_path, shape):
    axis, voxels = (*shape, 1).index(1), np.arange(72, dtype=np.int16).reshape(shape)
    sides = np.insert(np.full(3, 2), axis, 1)[:3]  # the pixels are larger than the slice is thick
    write_nifti(tmp_path / "a.nii.gz", voxels, np.diag([*sides, 1]))
    write_itk(tmp_path / "a.mha", voxels)
    for suffix in (".nii.gz", ".mha"):
        volume = open_volume(tmp_path / f"a{suffix}")
        assert (volume.axis, len(volume)) == (axis, 1)
        assert_array_equal(volume[0][..., 0], voxels.reshape(8, 9))
        write_mask(tmp_path / f"m{suffix}", volume, [voxels.reshape(8, 9) > 50])
        mask = open_volume(tmp_path / f"m{suffix}")
        assert mask.header.shape == volume.header.shape
        assert_array_equal(mask[0][..., 0], voxels.reshape(8, 9) > 50)


def test_spacing_is_in_mm_where_the_file_tells_it(tmp_path):
    image = nibabel.Nifti1Image(VOXELS, np.diag([2000, 3000, 5000, 1]))
    image.header.set_xyzt_units("micron")
    image.to_filename(tmp_path / "a.nii")
    volume = open_volume(tmp_path / "a.nii", "ASR")
    assert (volume.stored_spacing, volume.axis, volume.slice_spacing) == ((2, 3, 5), 1, (3, 2))
    content = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii").write_bytes(content[:84] + bytes(4) + content[88:])  # none along axis 1
    assert open_volume(tmp_path / "b.nii").stored_spacing is None


def test_slope_intercept_and_nan_by_hand(tmp_path):
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = write_nifti(tmp_path / "a.nii", voxels, slope=2.0, intercept=-10.0)
    volume = open_volume(path)
    assert_array_equal(slices_of(volume)[3], voxels[..., 3] * 2 - 10)
    assert_allclose(volume.limits, [np.percentile(voxels * 2 - 10, [0.5, 99.5])])
    # Center 10, width 20: 0 to 20. Slice 3 holds 3, 7, ... 23: -4, 4, 12 / 20, 28, 36.
    assert volume.pictures((10, 20))[3][..., 0].tolist() == [[0, 51, 153], [255, 255, 255]]
    voxels = np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    voxels[0, 0], voxels[1, 2, 3] = np.nan, np.inf
    volume = open_volume(write_nifti(tmp_path / "a.nii.gz", voxels))
    assert_allclose(volume.limits[0], np.percentile(voxels[np.isfinite(voxels)], [0.5, 99.5]))
    assert volume.pictures()[0][0, 0] == 0 and volume.pictures()[3][1, 2] == 255


def test_vectors_are_channels_and_modalities_are_stacked(tmp_path):
    channels = np.random.default_rng(1).normal(0, 99, (4, 5, 6, 3)).astype(np.float32)
    for path in (tmp_path / "v.nrrd", tmp_path / "v.mha"):
        volume = open_volume(write_itk(path, channels, vector=True))
        assert_array_equal(np.stack([*volume], volume.axis), channels)
    itk_default = np.diag([-1, -1, 1, 1])
    turned = stored_as(nibabel.Nifti1Image(VOXELS, itk_default), "PSL")
    turned.to_filename(tmp_path / "b.nii")
    stacked = StackedVolume([volume, open_volume(tmp_path / "b.nii", "LPS")])
    assert_array_equal(np.stack([*stacked], volume.axis)[..., :3], channels)
    assert_array_equal(slices_of(stacked, 3), VOXELS.transpose(2, 0, 1))
    assert stacked.pictures()[0].shape[2] == len(stacked.limits) == 4
    shifted = itk_default.astype(float)
    shifted[0, 3] = 2.5
    for voxels, word in ((VOXELS, "2.5 mm"), (VOXELS[1:], "3 x 5 x 6")):
        apart = write_nifti(tmp_path / "c.nii", voxels, shifted)
        with pytest.raises(ValueError, match=f"c.nii: .*{word}"):
            StackedVolume([stacked, open_volume(apart)])


@pytest.mark.parametrize("shape", [(6, 4, 50), (5, 4, 60), (4, 5, 60)])
def test_percentiles_come_from_every_column(here, monkeypatch, shape):
    """One voxel of four is dark, at the same columns of every slice: a step of four is misled."""
    monkeypatch.setattr(volumes, "SAMPLE", math.prod(shape) // 4)
    columns = np.arange(shape[0])[:, None] + shape[0] * np.arange(shape[1])
    voxels = np.where(columns % 4 == 0, 10, 200)[..., None].repeat(shape[2], 2).astype(np.int16)
    assert open_volume(write_nifti(here / "a.nii", voxels)).limits == [(10, 200)]


# ---- refused ---------------------------------------------------------------------------------


def test_what_is_no_volume_of_real_numbers_is_one_line(tmp_path):
    path, shape = tmp_path / "a.nii", (2, 3, 4)
    for voxels in (np.zeros(shape, np.complex64), np.full(shape, np.nan), np.zeros(5)):
        refuse(open_volume, write_nifti(path, voxels))
    path.write_bytes(b"hello" * 200)
    refuse(open_volume, path)
    refuse(open_volume, tmp_path)
    with pytest.raises(FileNotFoundError, match="none.nii: no such file"):
        open_volume(tmp_path / "none.nii")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_cut_damaged_and_too_large_volumes_are_one_line(tmp_path, suffix):
    path, write = tmp_path / f"a{suffix}", write_nifti if "nii" in suffix else write_itk
    write(path, np.random.default_rng(0).integers(0, 99, (20, 20, 20)).astype("i2"))
    content = path.read_bytes()
    for keep in (0, 5, 347, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        refuse(open_volume, path)
    if suffix == ".nii.gz":
        path.write_bytes(content[:-6] + bytes([content[-6] ^ 1]) + content[-5:])  # the checksum
        refuse(open_volume, path)
    if suffix == ".nii":
        path.write_bytes(content[:42] + struct.pack("<3h", 12000, 12000, 1) + content[48:])
        refuse(open_volume, path, "--max-megapixels")


def test_a_header_leads_to_voxels_in_its_own_folder_alone(here):
    header = "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\n"
    nrrd = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: "
    folder = here / "in"
    folder.mkdir()
    (here / "secret.raw").write_bytes(bytes(8))
    (folder / "link.raw").symlink_to("../secret.raw")
    (folder / "ok.raw").write_bytes(bytes(range(8)))
    for data in ("../secret.raw", "link.raw", "none.raw", "LIST\n../secret.raw"):
        for name, start in (("a.mhd", f"{header}ElementDataFile = "), ("a.nhdr", nrrd)):
            (folder / name).write_text(f"{start}{data}\n\n")
            refuse(open_volume, folder / name)
    (folder / "b.mhd").write_text(f"{header}ElementDataFile = ok.raw\n")
    volume = open_volume(folder / "b.mhd")
    assert voxels_of(volume).ravel(order="F").tolist() == [*range(8)]
    assert volume.stored_spacing is None  # the header has none


@pytest.mark.parametrize(
    "name, library", [("a.dcm", "pydicom"), ("a.nii", "nibabel"), ("a.mha", "SimpleITK")]
)
def test_missing_libraries_are_named_with_the_command(here, monkeypatch, name, library):
    write_dicom(here / name)
    monkeypatch.setitem(sys.modules, library, None)
    refuse(read_dicom if name == "a.dcm" else open_volume, name, f"`pip install {library}`")


# ---- other formats, and masks ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "make", "shape"),
    [(".nii", nibabel.Nifti1Image, (4, 5, 6, 1)), (".nii.gz", nibabel.Nifti2Image, (4, 5))],
)
def test_a_mask_volume_lies_where_the_volume_lies(tmp_path, suffix, make, shape):
    rng = np.random.default_rng(0)
    image = make(rng.normal(0, 99, shape).astype(np.float32), TURN)
    image.header.set_slope_inter(0.5, 3)
    image.set_sform(TURN, "mni")
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"] = 99
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"secret name"))
    image.to_filename(tmp_path / "a.nii")
    volume, path = open_volume(tmp_path / "a.nii"), tmp_path / f"a_mask{suffix}"
    masks = rng.integers(0, 3, slices_of(volume).shape).astype(np.uint8)
    with pytest.raises(ValueError):
        write_mask(path, volume, iter(masks[1:]))
    write_mask(path, volume, iter(masks))
    back = nibabel.load(path)
    assert isinstance(back, make) and back.shape == shape and back.get_data_dtype() == np.uint8
    assert_array_equal(back.affine, nibabel.load(tmp_path / "a.nii").affine)
    written = np.asarray(back.dataobj).reshape(volume.shape)
    assert_array_equal(written, np.moveaxis(masks, 0, volume.axis))
    for key in ("sform_code", "xyzt_units", "pixdim"):
        assert_array_equal(back.header[key], image.header[key])
    assert back.header["cal_max"] == 0 and not back.header.extensions
    assert back.header.get_slope_inter() in [(1, 0), (None, None)]


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "SRA", "PIL", "IAR", "ASL"])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mhd"])
def test_a_volume_is_turned_and_its_mask_back(here, orientation, name):
    """Bit for bit as nibabel turns it, and every voxel at its place in the world."""
    image = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), TURN)
    as_stored, turned = stored_as(image, orientation), stored_as(image, "LPS")
    if name == "a.nii.gz":
        as_stored.to_filename(name)
    else:
        write_itk(name, np.asarray(as_stored.dataobj), as_stored.affine)
    volume = open_volume(name, "LPS")
    assert volume.stored_orientation == orientation
    assert_allclose(volume.affine, turned.affine, atol=1e-5)
    assert_allclose(volume.stored_spacing, as_stored.header.get_zooms(), rtol=1e-6)
    assert_array_equal(voxels_of(volume), turned.dataobj)
    assert_array_equal(voxels_of(open_volume(name)), as_stored.dataobj)  # untold: as stored
    for mask in ("m.nii.gz", "m.nrrd", "m.mha"):
        write_mask(mask, volume, slices_of(volume) > 30)
        back = open_volume(mask)
        assert_array_equal(voxels_of(back), np.asarray(as_stored.dataobj) > 30)
        assert_allclose(back.affine, as_stored.affine, atol=1e-5)
        assert is_sealed_mask(mask)
        changed = SimpleITK.ReadImage(mask)
        changed[1, 1, 1] = 1 - changed[1, 1, 1]
        SimpleITK.WriteImage(changed, mask)
        assert not is_sealed_mask(mask)


def test_memory_stays_near_the_stored_size(here):
    voxels = np.zeros((256, 256, 150), np.int16)  # 19.7 MB; 79 MB as float32
    voxels[::7, ::5, ::3] = 900
    path = write_nifti(here / "a.nii.gz", voxels)
    tracemalloc.start()
    volume = open_volume(path)
    write_mask("m.nii.gz", volume, (one[..., 0] > 100 for one in volume))
    assert [picture.max() > 0 for picture in volume.pictures()] == [True, False, False] * 50
    peak = tracemalloc.get_traced_memory()[1] >> 20  # mask 10, a million voxels as float64, twice
    tracemalloc.stop()
    assert peak < 70, f"{peak} MiB"
