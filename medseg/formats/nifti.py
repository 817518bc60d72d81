"""NIfTI: the slices of a volume, masks written back. nibabel is optional, imported when used."""

import gzip
import hashlib
import importlib
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from medseg.files import atomic_write
from medseg.formats.medical import (
    NIFTI_SUFFIXES,
    import_reader,
    is_spacing,
    name_file,
    nifti_version,
    window_to_uint8,
)
from medseg.images import pixel_limit, too_many_pixels
from medseg.settings import window_limits

MAX_VOLUME_BYTES = 4 << 30  # of voxels, as stored
UNITS = {1: 1e3, 2: 1.0, 3: 1e-3}  # mm of a metre, millimetre, micrometre, by their codes
SAMPLE = 1 << 20  # voxels, at most, that the percentiles of a volume are taken from
PERCENTILES = (0.5, 99.5)


def open_nifti(path, orientation=None, *, is_mask=False):
    """The one volume in a NIfTI file, as a `Volume`.

    orientation: to turn it to, as "RAS"; None leaves it as stored. is_mask: its `limits` are not
    needed, and are not measured here. Voxels keep their stored type: a .nii file is mapped into
    memory, a .nii.gz file decoded once.
    Raises FileNotFoundError; ValueError for what is not a whole NIfTI file with one volume of
    real numbers, some of them finite, in slices of at most 89 megapixels, and for one that cannot
    be turned because its affine tells no orientation.
    """
    with name_file(path):
        volume = Volume(path, orientation)
        if not is_mask:
            _ = volume.limits
        return volume


def read_orientation(path):
    """The orientation that a NIfTI file is stored in, as "RAS", or None where none can be told.

    Only the header is read. Raises as `open_nifti` does.
    """
    with name_file(path):
        return _orientation_of(_finite_affine(_read_nifti_header(Path(path))))


class Volume:
    """A volume cut into slices across the axis of the largest spacing, the last where they tie.

    path, header (nibabel's), stored_orientation (as "RAS", or None where the affine has none).
    All that follows is of the volume as it lies after it was turned: axes flipped and swapped,
    nothing resampled. affine (4, 4); shape and spacing: of the three axes, in voxels and header
    units; axis: the one across which it is cut; limits: (low, high), the 0.5 and 99.5 percentiles
    of the finite voxels, of about a million of them spread evenly where there are more.
    `len(volume)` slices; `volume[k]` is one, float32, slope and intercept applied, its rows and
    columns the two other axes in their order.
    """

    def __init__(self, path, orientation=None):
        self.path = Path(path)
        self.header = _read_nifti_header(self.path)
        shape = (*self.header.get_data_shape(), 1, 1)[:3]
        affine = _finite_affine(self.header)
        self.stored_orientation = _orientation_of(affine)
        self._turn = _find_turn(self.stored_orientation, orientation)
        axes = np.argsort(self._turn[:, 0]).astype(int)  # in their order after turning
        self.affine = affine @ _orientations().inv_ornt_aff(self._turn, shape)
        self.shape = tuple(shape[axis] for axis in axes)
        spacing = np.nan_to_num(np.abs([*self.header.get_zooms(), 1, 1][:3]))[axes]
        self.spacing = tuple(spacing.tolist())
        self.axis = int(np.flatnonzero(spacing >= spacing.max() * (1 - 1e-4))[-1])
        height, width = (self.shape[axis] for axis in range(3) if axis != self.axis)
        if height * width > pixel_limit():
            raise too_many_pixels(height * width, f"slices of {width}x{height} pixels")
        slope, intercept = self.header.get_slope_inter()
        self._slope = 1.0 if slope is None else float(slope)
        self._intercept = 0.0 if intercept is None else float(intercept)
        voxels = _read_voxels(self.path, self.header).reshape(shape, order="F")
        self._voxels = self.turn(voxels)

    def __len__(self):
        return self.shape[self.axis]

    def __getitem__(self, index):
        values = self._scale(np.moveaxis(self._voxels, self.axis, 0)[index])
        with np.errstate(all="ignore"):
            return values.astype(np.float32)

    def whole_numbers(self, index):
        """A slice as stored, where it holds whole numbers and they are not scaled; else None."""
        if self._voxels.dtype.kind == "f" or (self._slope, self._intercept) != (1, 0):
            return None
        return np.moveaxis(self._voxels, self.axis, 0)[index]

    def slices(self):
        """Yield every slice: float32 (H, W)."""
        return (self[index] for index in range(len(self)))

    def pictures(self, window=None):
        """The slices as a sequence of uint8 arrays (H, W).

        window: (center, width); default: from `limits[0]` to `limits[1]`.
        """
        return VolumePictures(self, window_limits(window) if window else self.limits)

    def turn(self, stored):
        """A view of an array of three axes in stored order, turned as the volume is."""
        return _orientations().apply_orientation(stored, self._turn)

    @cached_property
    def stored_spacing(self):
        """mm of a voxel along the three axes as they are stored; None where one of them has none.

        A header without a unit means mm, as the format's own transforms do.
        """
        # As the file has it: nibabel makes 1 of 0.
        told = np.abs(_read_head(self.path, check=False)["pixdim"][1:4])
        unit = UNITS.get(int(self.header["xyzt_units"]) & 7, 1.0)
        spacing = [abs(float(zoom)) * unit for zoom in [*self.header.get_zooms(), 1, 1][:3]]
        known = is_spacing(spacing) and (told > 0).all()
        return tuple(spacing) if known else None

    @property
    def slice_spacing(self):
        """mm from row to row and from column to column of a slice, or None."""
        if self.stored_spacing is None:
            return None
        turned = [self.stored_spacing[axis] for axis in np.argsort(self._turn[:, 0]).astype(int)]
        return tuple(mm for axis, mm in enumerate(turned) if axis != self.axis)

    def stored(self, slices, dtype=np.uint8):
        """Arrays (H, W), one for each slice -> array of three axes in stored order.

        Raises ValueError for a slice of another shape, and for more or fewer slices.
        """
        voxels = np.zeros((*self.header.get_data_shape(), 1, 1)[:3], dtype, order="F")
        across = np.moveaxis(self.turn(voxels), self.axis, 0)
        for target, values in zip(across, slices, strict=True):
            if np.shape(values) != target.shape:
                raise ValueError(f"a slice of {np.shape(values)} in a mask of {target.shape}")
            target[...] = values
        return voxels

    def _scale(self, voxels):
        values = voxels.astype(np.float64)
        with np.errstate(all="ignore"):
            values *= self._slope
            values += self._intercept
        return values

    @cached_property
    def limits(self):
        """(low, high) of grey values, measured when first asked for; see the class."""
        step = -(-self._voxels.size // SAMPLE)
        while math.gcd(step, self.shape[0] * self.shape[1]) > 1:  # else it keeps to a few columns
            step += 1
        # Counted after turning, so that the sample is the same however the volume is stored.
        places = np.arange(0, self._voxels.size, step)
        values = self._scale(self._voxels[np.unravel_index(places, self.shape, order="F")])
        values = values[np.isfinite(values)]
        if not values.size and step > 1:
            values = np.concatenate([one[np.isfinite(one)] for one in self.slices()])
        if not values.size:
            raise ValueError("none of its voxels is finite")
        low, high = np.percentile(values, PERCENTILES).tolist()
        return (low, high) if low < high else (float(values.min()), float(values.max()))


class VolumePictures(Sequence):
    """What `Volume.pictures` returns."""

    def __init__(self, volume, limits):
        self._volume, self._limits = volume, limits

    def __len__(self):
        return len(self._volume)

    def __getitem__(self, index):
        return window_to_uint8(self._volume[index], *self._limits)


# ---- orientation -----------------------------------------------------------------------------


def _orientations():
    return importlib.import_module("nibabel").orientations  # it read the header


def _finite_affine(header):
    affine = header.get_best_affine()
    if not np.isfinite(affine).all():
        raise ValueError("its affine is not finite")
    return affine


def _orientation_of(affine):
    """As `nibabel.aff2axcodes`, in one word; None where an axis leads nowhere."""
    try:
        with np.errstate(all="ignore"):
            codes = importlib.import_module("nibabel").aff2axcodes(affine)
    except np.linalg.LinAlgError:
        return None
    return None if None in codes else "".join(codes)


def _find_turn(stored, wanted):
    """nibabel's orientation array (3, 2) that turns `stored` to `wanted`; None is as stored."""
    if wanted is None:
        return _orientations().axcodes2ornt("RAS")  # axis 0 stays 0, 1 stays 1, 2 stays 2
    if stored is None:
        raise ValueError(
            f"its affine tells no orientation, so it cannot be turned to {wanted}: mend its header"
        )
    as_arrays = (_orientations().axcodes2ornt(codes) for codes in (stored, wanted))
    return _orientations().ornt_transform(*as_arrays)


# ---- files -----------------------------------------------------------------------------------


def _open_binary(path):
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")


def _read_head(path, **options):
    """nibabel's header of a NIfTI file, made with its options."""
    nibabel = import_reader("nibabel", "NIfTI")
    nibabel.imageglobals.logger.disabled = True  # it writes on stderr what it mends in a header
    with _open_binary(path) as file:
        head = file.read(540)
    version = nifti_version(head)
    if version is None:
        raise ValueError("not a NIfTI file (.nii or .nii.gz, header and voxels in one)")
    if version == 1:
        return nibabel.Nifti1Header(head[:348], **options)
    return nibabel.Nifti2Header(head, **options)


def _read_nifti_header(path):
    """nibabel's header of a NIfTI file that holds one volume of real numbers."""
    header = _read_head(path)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    said = " x ".join(map(str, shape))
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"holds no volume: its shape is {said or 'missing'}")
    if max(shape[3:], default=1) > 1:
        raise ValueError(f"holds more than one volume ({said}): save one in a file of its own")
    if dtype.kind not in "iuf":
        raise ValueError(f"its voxels are {dtype.name}: only real numbers can be shown as grey")
    claimed = header.get_data_offset() + math.prod(map(int, shape)) * dtype.itemsize
    if claimed > MAX_VOLUME_BYTES:
        raise ValueError(f"claims {claimed / 2**30:.0f} GiB ({said}): more than 4 GiB")
    return header


def _read_voxels(path, header):
    """The voxels in their stored type and order, one axis."""
    dtype, offset = header.get_data_dtype(), header.get_data_offset()
    size = math.prod(map(int, header.get_data_shape()))
    if not path.name.lower().endswith(".gz"):
        missing = offset + size * dtype.itemsize - path.stat().st_size
        if missing > 0:
            raise ValueError(f"is cut short: {missing} bytes of voxels are missing")
        return np.memmap(path, dtype, "r", offset, size)
    # Not through nibabel, which stops before the checksum at the end.
    voxels = np.empty(size, dtype)
    room = memoryview(voxels.view(np.uint8))
    with _open_binary(path) as file:
        file.seek(offset)
        while room and (count := file.readinto(room[: 1 << 20])):
            room = room[count:]
        if room:
            raise ValueError(f"is cut short: {len(room)} bytes of voxels are missing")
        file.read(1)  # at the end of the file, this compares the checksum
    return voxels


def write_mask(path, volume, slices, dtype=np.uint8, slope=1):
    """Write the masks of all slices of a `Volume` as a NIfTI file that is whole or absent.

    slices: iterable of integer arrays (H, W) of class numbers 0..255, in order. Shape, affine and
    header geometry are those of the volume's file, to whose stored order a volume that was turned
    is turned back. path ends with .nii or .nii.gz. dtype: of the voxels, which stand for their
    values times `slope`.
    """
    path = Path(path)
    if not path.name.lower().endswith(NIFTI_SUFFIXES):
        raise ValueError(f"{path}: a mask volume is written as .nii.gz or .nii")
    try:
        mask = volume.stored(slices, dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    nibabel = importlib.import_module("nibabel")  # it read the volume
    header = volume.header.copy()
    header.set_data_dtype(dtype)
    header.set_data_offset(0)  # the header's extensions are not copied
    header.set_slope_inter(1, 0)
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = _seal(mask.ravel(order="F"))
    of_version_2 = isinstance(header, nibabel.Nifti2Header)
    make_image = nibabel.Nifti2Image if of_version_2 else nibabel.Nifti1Image
    shape = header.get_data_shape()
    image = make_image(mask.reshape(shape, order="F"), header.get_best_affine(), header)
    if slope != 1:
        image.header.set_slope_inter(slope, 0)  # which nibabel takes from its copy alone
    with atomic_write(path) as file:
        if not path.name.lower().endswith(".gz"):
            image.to_stream(file)
            return
        with gzip.GzipFile("", "wb", 6, file, mtime=0) as compressed:
            image.to_stream(compressed)


def _seal(voxels):
    """What a mask volume of ours has as its description: a digest of the voxels, one axis."""
    voxels = np.ascontiguousarray(voxels, voxels.dtype.newbyteorder("="))
    return f"medseg {hashlib.blake2b(voxels, digest_size=16).hexdigest()}".encode()


def is_sealed_mask(path):
    """Whether `write_mask` wrote a file, and its voxels have not changed since; ValueError."""
    with name_file(path):
        header = _read_nifti_header(path)
        return bytes(header["descrip"]).rstrip(b"\0") == _seal(_read_voxels(path, header))
