"""Files of volumes: their headers, whatever the format, and the masks that are written.

NIfTI by nibabel, NRRD and MetaImage by SimpleITK, DICOM series by `medseg.dicom`. The libraries are
optional, and imported when used.
"""

import gzip
import hashlib
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medseg import dicom
from medseg.files import ITK_SUFFIXES, import_reader, name_file, nifti_version

UNITS = {1: 1e3, 2: 1.0, 3: 1e-3}  # mm of a metre, millimetre, micrometre, by their codes
DATA_FILE = rb"(?mi)^(?:data ?file|elementdatafile)\s*[:=]\s*(.*\S)"  # of NRRD and MetaImage
LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])  # between the axes of DICOM and ITK and those of NIfTI


class Header(NamedTuple):
    """What the header of a file says of its volume, whatever the format; all as it is stored.

    shape: of two axes or more; spacing: of three, in units of so many mm; is_told: whether the
    file gives one. read(): the voxels. has_vectors: whether what comes after three axes is certain
    to be channels. nifti: nibabel's header. seal: by which `write_mask` marks a file.
    """

    shape: tuple
    affine: np.ndarray  # (4, 4)
    spacing: Sequence
    read: Callable
    nifti: object
    unit: float = 1.0
    is_told: bool = True
    slope: float = 1.0
    intercept: float = 0.0
    inverted: bool = False  # MONOCHROME1 of DICOM: low is bright
    has_vectors: bool = False
    seal: bytes = b""


def read_header(path):
    """The Header of the volume at a Path; ValueError for what is none."""
    if path.is_dir():
        return _read_series(path)
    if path.name.lower().endswith(ITK_SUFFIXES):
        return _read_itk(path)
    return _read_nifti(path)


def _check_kind(shape, dtype):
    """ValueError for what is no volume of grey values."""
    if len(shape) < 2 or dtype.kind not in "iuf":
        raise ValueError(f"holds no volume of real numbers: {len(shape)} axes of {dtype.name}")


def _read_nifti(path):
    """The Header of a NIfTI file, compressed or not, whatever its suffix."""
    nibabel = import_reader("nibabel", "NIfTI")
    nibabel.imageglobals.logger.disabled = True  # it writes on stderr what it mends in a header
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if compressed else open(path, "rb") as file:
        head = file.read(540)
    version = nifti_version(head)
    if version is None:
        raise ValueError("not a NIfTI file (.nii or .nii.gz, header and voxels in one)")
    make = nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header
    header, unmended = (make(head[: make.sizeof_hdr], check=check) for check in (True, False))
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    _check_kind(shape, dtype)
    offset = header.get_data_offset()

    def read():
        if not compressed:
            return np.memmap(path, dtype, "r", offset, shape, order="F")
        size = offset + math.prod(shape) * dtype.itemsize
        with gzip.open(path) as file:
            content = file.read(size + 1)  # to its end, where the checksum is
        return np.ndarray(shape, dtype, content, offset, order="F")

    slope, intercept = header.get_slope_inter()
    return Header(
        shape,
        header.get_best_affine(),
        [*header.get_zooms(), 1, 1][:3],
        read,
        header,
        unit=UNITS.get(int(header["xyzt_units"]) & 7, 1.0),
        is_told=bool((np.abs(unmended["pixdim"][1:4]) > 0).all()),  # nibabel makes 1 of 0
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        seal=bytes(header["descrip"]).rstrip(b"\0"),
    )


def _make_nifti(shape, affine):
    """nibabel's header for a volume in mm that came from a file of another format."""
    header = import_reader("nibabel", "volumes").Nifti1Header()
    header.set_data_shape(shape)
    with np.errstate(all="ignore"):
        header.set_qform(affine, 1)
        header.set_sform(affine, 1)
    header.set_xyzt_units("mm")
    return header


def _read_series(folder):
    """The Header of a folder with a DICOM series."""
    slices, affine, spacing = dicom.open_series(folder)
    header = slices[0][0].header
    shape = header.Columns, header.Rows, len(slices)

    def read():
        voxels = np.empty(shape, np.float32, order="F")
        for place, (frames, index) in enumerate(slices):
            voxels[..., place] = frames.values(index).T
        return voxels

    inverted = slices[0][0].photometric == "MONOCHROME1"
    return Header(shape, affine, spacing, read, _make_nifti(shape, affine), inverted=inverted)


def _read_itk(path):
    """The Header of an NRRD or MetaImage file."""
    itk, is_nrrd = import_reader("SimpleITK", "NRRD and MetaImage"), path.suffix.lower()[1] == "n"
    _check_data_file(path)
    reader = itk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if is_nrrd else "MetaImageIO")
    reader.SetFileName(str(path))
    _ask_itk(reader.ReadImageInformation)
    ndim, vectors = reader.GetDimension(), reader.GetNumberOfComponents()
    shape = (*reader.GetSize(), *((1,) * (3 - ndim)), *((vectors,) if vectors > 1 else ()))
    one_voxel = itk.Image([1] * ndim, reader.GetPixelID(), vectors)
    _check_kind(shape, itk.GetArrayViewFromImage(one_voxel).dtype)
    affine, axes = np.eye(4), min(ndim, 3)
    spacing = [*reader.GetSpacing(), 1, 1][:3]
    direction = np.reshape(reader.GetDirection(), (ndim, ndim))[:axes, :axes]
    affine[:axes, :axes], affine[:axes, 3] = direction, reader.GetOrigin()[:axes]
    affine[:3, :3] *= spacing
    # SimpleITK does not say whether the file has a spacing, and makes the default of none.
    is_told = reader.HasMetaDataKey("NRRD_space") or not np.array_equal(affine, np.eye(4))
    affine = LPS_TO_RAS @ affine

    def read():
        voxels = itk.GetArrayFromImage(_ask_itk(reader.Execute))
        return (voxels if vectors == 1 else np.moveaxis(voxels, -1, 0)).T.reshape(shape, order="F")

    return Header(
        shape,
        affine,
        spacing,
        read,
        _make_nifti(reader.GetSize(), affine),
        is_told=is_told,
        has_vectors=vectors > 1,
        seal=(reader.GetMetaData("medseg") if reader.HasMetaDataKey("medseg") else "").encode(),
    )


def _check_data_file(path):
    """ValueError where a header leads out of its folder, as one that is uploaded to a page may."""
    with open(path, "rb") as file:
        named = re.search(DATA_FILE, file.read(1 << 16))
    name, folder = os.fsdecode(named[1]) if named else "LOCAL", path.parent.resolve()
    if name.startswith("LIST") or not (folder / name).resolve().is_relative_to(folder):
        raise ValueError(f"its voxels, {name}, are not in one file in its folder")


def _ask_itk(function):
    """What the function returns; its errors name its own source files, in many lines."""
    try:
        return function()
    except RuntimeError:
        raise ValueError("SimpleITK cannot read it: is it damaged or cut?") from None


# ---- masks -----------------------------------------------------------------------------------


def write_nifti(mask, header, slope, file):
    """Write a mask (X, Y, Z) with the geometry of nibabel's header to a binary file."""
    nibabel, header = import_reader("nibabel", "volumes"), header.copy()
    header.set_data_dtype(mask.dtype)
    header.set_data_offset(0)  # the header's extensions are not copied
    header.set_slope_inter(1, 0)
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = _seal(mask)
    of_version_2 = isinstance(header, nibabel.Nifti2Header)
    make_image = nibabel.Nifti2Image if of_version_2 else nibabel.Nifti1Image
    image = make_image(mask, header.get_best_affine(), header)
    if slope != 1:
        image.header.set_slope_inter(slope, 0)  # which nibabel takes from its copy alone
    image.to_stream(file)


def write_itk(mask, affine, suffix, file):
    """Write a mask (X, Y, Z) that lies by an affine as .nrrd or .mha to a binary file."""
    itk = import_reader("SimpleITK", "NRRD and MetaImage")
    axes, lps = min(mask.ndim, 3), LPS_TO_RAS @ affine
    image = itk.GetImageFromArray(mask.T)
    spacing, direction = np.ones(mask.ndim), np.eye(mask.ndim)
    spacing[:axes] = np.linalg.norm(lps[:3, :axes], axis=0)
    direction[:axes, :axes] = lps[:axes, :axes] / spacing[:axes]
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin([*lps[:3, 3], 0][: mask.ndim])
    image.SetMetaData("medseg", _seal(mask).decode())
    with tempfile.TemporaryDirectory() as folder:  # for it writes by name alone
        name = os.path.join(folder, f"mask{suffix}")
        itk.WriteImage(image, name, True)
        file.write(Path(name).read_bytes())


def _seal(voxels):
    """What a mask volume of ours has as its description: a digest of the voxels."""
    voxels = voxels.ravel(order="F")
    voxels = np.ascontiguousarray(voxels, voxels.dtype.newbyteorder("="))
    return f"medseg {hashlib.blake2b(voxels, digest_size=16).hexdigest()}".encode()


def is_sealed_mask(path):
    """Whether `write_mask` wrote a file, and its voxels have not changed since; ValueError."""
    with name_file(path):
        header = read_header(Path(path))
        return header.seal == _seal(header.read())
