"""Volumes as slices, turned to one orientation, and their masks written back; see volume_files.

nibabel turns volumes whatever their format.
"""

import gzip
import math
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from medseg.files import ITK_SUFFIXES, NIFTI_SUFFIXES, atomic_write, import_reader, name_file
from medseg.samples import check_size
from medseg.settings import context_offsets, is_spacing, window_limits, window_to_uint8
from medseg.volume_files import read_header, write_itk, write_nifti

SAMPLE = 1 << 20  # voxels, at most, that the percentiles of a channel are taken from
PERCENTILES = (0.5, 99.5)
SINGLE_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".mha")  # of the files that masks are written to


def open_volume(path, orientation=None, *, is_mask=False, time=None):
    """The volume in a NIfTI, NRRD or MetaImage file or in a folder with a DICOM series: a `Volume`.

    orientation: to turn it to, as "RAS"; None leaves it as stored. is_mask: its `limits` are not
    needed, and are not measured here. time: what a fourth axis is: volumes in time, whose slices
    follow one another (True), or channels of each slice (False); None refuses it.
    Voxels keep their stored type: a .nii file is mapped into memory, others are decoded once.
    Raises FileNotFoundError; ValueError for what is not a whole file with a volume of real
    numbers, some of them finite, in slices of at most 89 megapixels, and for one that cannot be
    turned because its affine tells no orientation.
    """
    with name_file(path):
        volume = Volume(path, orientation, time)
        if not is_mask:
            _ = volume.limits
        return volume


def read_orientation(path):
    """The orientation that a volume is stored in, as "RAS", or None where none can be told.

    Only headers are read. Raises as `open_volume` does.
    """
    with name_file(path):
        return _orientation_of(read_header(Path(path)).affine)


class Volume:
    """A volume cut into slices across the axis of the largest spacing, the last where they tie.

    An axis of one voxel comes first: a picture that is stored as a volume is one slice.
    path, stored_affine, stored_orientation (as "RAS", or None where the affine has none).
    All that follows is of the volume as it lies after it was turned: axes flipped and swapped,
    nothing resampled. affine (4, 4); shape and spacing: of the three axes, in voxels and header
    units; axis: the one across which it is cut; limits: (low, high) of each channel, the 0.5 and
    99.5 percentiles of its finite voxels, of about a million of them spread evenly where there are
    more. n_channels: of a slice; times: volumes that follow one another, else 1.
    `len(volume)` slices; `volume[k]` is one, float32 (H, W, C), slope and intercept applied, its
    rows and columns the two other axes in their order. NaN is padding.
    """

    def __init__(self, path, orientation=None, time=None):
        self.path = Path(path)
        self.header = read_header(self.path)
        *sides, extra = self._split_shape(time)
        self.times, self.n_channels = (extra, 1) if time else (1, extra)
        self.stored_affine, self._stored_sides = self.header.affine, tuple(sides)
        self.stored_orientation = _orientation_of(self.stored_affine)
        self._turn = _find_turn(self.stored_orientation, orientation)
        self._axes = np.argsort(self._turn[:, 0]).astype(int)  # in their order after turning
        self.affine = self.stored_affine @ _orientations().inv_ornt_aff(self._turn, sides)
        self.shape = tuple(sides[axis] for axis in self._axes)
        spacing = np.nan_to_num(np.abs(self.header.spacing))[self._axes]
        self.spacing = tuple(spacing.tolist())
        flat = np.array(self.shape) == 1
        widest = flat if flat.any() else spacing >= spacing.max() * (1 - 1e-4)
        self.axis = int(np.flatnonzero(widest)[-1])
        height, width = (self.shape[axis] for axis in range(3) if axis != self.axis)
        check_size(width, height)
        self._voxels = self.turn(self.header.read().reshape((*sides, extra), order="F"))

    def _split_shape(self, time):
        """(x, y, z, number of volumes) of the file; ValueError where nobody says what these are."""
        shape = self.header.shape
        extra = math.prod(shape[3:])
        if extra > 1 and time is None and not self.header.has_vectors:
            raise ValueError(
                f"holds more than one volume ({' x '.join(map(str, shape))}): --channels A,B names "
                "them as channels of each slice, --time takes them as volumes in time"
            )
        return (*shape, 1, 1)[:3] + (extra,)

    def __len__(self):
        return self.shape[self.axis] * self.times

    def __getitem__(self, index):
        with np.errstate(all="ignore"):
            return self._scale(self._slice(index)).astype(np.float32)

    def whole_numbers(self, index):
        """A slice as stored, where it holds whole numbers and they are not scaled; else None."""
        if self._voxels.dtype.kind == "f" or (self.header.slope, self.header.intercept) != (1, 0):
            return None
        return self._slice(index)

    def _slice(self, index):
        time, index = divmod(range(len(self))[index], self.shape[self.axis])
        voxels = np.moveaxis(self._voxels, self.axis, 0)[index]
        return voxels[..., time : time + 1] if self.times > 1 else voxels

    def pictures(self, window=None, context=0):
        """The slices as a sequence of uint8 arrays (H, W, C).

        window: (center, width); default: each channel from its `limits`. context: how many slices
        on either side are channels too, the nearest first; at the ends the last one is repeated.
        """
        limits = [window_limits(window)] * self.n_channels if window else self.limits
        if self.header.inverted:
            limits = [one[::-1] for one in limits]
        return VolumePictures(self, limits, context)

    def turn(self, stored):
        """A view of an array in stored order, its first three axes turned as the volume is."""
        return _orientations().apply_orientation(stored, self._turn)

    @property
    def stored_spacing(self):
        """mm of a voxel along the three axes as they are stored; None where one of them has none.

        A header without a unit means mm, as the format's own transforms do.
        """
        spacing = [abs(float(one)) * self.header.unit for one in self.header.spacing]
        return tuple(spacing) if self.header.is_told and is_spacing(spacing) else None

    @property
    def slice_spacing(self):
        """mm from row to row and from column to column of a slice, or None."""
        if self.stored_spacing is None:
            return None
        turned = [self.stored_spacing[axis] for axis in self._axes]
        return tuple(mm for axis, mm in enumerate(turned) if axis != self.axis)

    def stored(self, slices, dtype=np.uint8):
        """Arrays (H, W), one for each slice -> array of three axes in stored order, four in time.

        Raises ValueError for more or fewer slices.
        """
        voxels = np.zeros((*self._stored_sides, self.times), dtype, order="F")
        across = np.moveaxis(self.turn(voxels), self.axis, 0)
        targets = (one[..., time] for time in range(self.times) for one in across)
        for target, values in zip(targets, slices, strict=True):
            target[...] = values
        return voxels if self.times > 1 else voxels[..., 0]

    def _scale(self, voxels):
        values = voxels.astype(np.float64)
        with np.errstate(all="ignore"):
            values *= self.header.slope
            values += self.header.intercept
        return values

    @cached_property
    def limits(self):
        """[(low, high)] of each channel, measured when first asked for; see the class."""
        size = math.prod(self.shape)
        step = -(-size * self.times // SAMPLE)
        while math.gcd(step, self.shape[0] * self.shape[1]) > 1:  # else it keeps to a few columns
            step += 1
        # Counted after turning, so that the sample is the same however the volume is stored.
        places = np.unravel_index(np.arange(0, size, step), self.shape, order="F")
        sample = self._scale(self._voxels[places]).reshape(-1, self.n_channels)
        return [*map(self._limits_of, sample.T)]

    @staticmethod
    def _limits_of(values):
        values = values[np.isfinite(values)]
        if not values.size:
            raise ValueError("none of its voxels is finite")
        low, high = np.percentile(values, PERCENTILES).tolist()
        return (low, high) if low < high else (float(values.min()), float(values.max()))

    def distance_to(self, other):
        """mm that the corners of two volumes lie apart, at most.

        Raises ValueError that names both where they differ in shape, or by a voxel or more.
        """
        if (self.shape, self.times) != (other.shape, other.times):
            shapes = [(*one.shape, one.times)[: 3 + (one.times > 1)] for one in (other, self)]
            sizes = [" x ".join(map(str, shape)) for shape in shapes]
            raise ValueError(f"{other.path}: {sizes[0]} voxels, but {self.path} has {sizes[1]}")
        sides = ([0, side - 1] for side in self.shape)
        corners = np.stack([*np.meshgrid(*sides), np.ones((2, 2, 2))]).reshape(4, -1)
        offsets = ((self.affine - other.affine)[:3] @ corners) * self.header.unit
        distance = float(np.linalg.norm(offsets, axis=0).max())
        if distance and not distance < (voxel := min(self.spacing) * self.header.unit):
            raise ValueError(
                f"{other.path}: lies elsewhere than {self.path}: their affines differ by "
                f"{distance:.3g} mm, and a voxel has {voxel:.3g} mm"
            )
        return distance


class VolumePictures(Sequence):
    """What `Volume.pictures` returns."""

    def __init__(self, volume, limits, context):
        self._volume, self._limits, self._context = volume, limits, context

    def __len__(self):
        return len(self._volume)

    def __getitem__(self, index):
        depth = len(self) // self._volume.times
        first = index // depth * depth  # of the same time
        places = np.add(context_offsets(self._context), index).clip(first, first + depth - 1)
        return np.concatenate([self._picture(place) for place in places.tolist()], axis=-1)

    def _picture(self, index):
        channels = zip(np.moveaxis(self._volume[index], -1, 0), self._limits, strict=True)
        return np.stack([window_to_uint8(own, *limits) for own, limits in channels], axis=-1)


class StackedVolume(Volume):
    """Several modalities of one case as one Volume, each a channel.

    volumes: [Volume], turned to one orientation. The place, and the masks written back, are those
    of the first. Raises ValueError where two differ in shape, or lie a voxel or more apart.
    """

    def __init__(self, volumes):
        self.__dict__ |= vars(volumes[0])
        self._volumes = volumes
        self.n_channels = sum(volume.n_channels for volume in volumes)
        self.limits = [limits for volume in volumes for limits in volume.limits]
        for volume in volumes[1:]:
            volumes[0].distance_to(volume)
            volume.axis = self.axis  # equal but for rounding

    def __getitem__(self, index):
        return np.concatenate([volume[index] for volume in self._volumes], axis=-1)


# ---- orientation -----------------------------------------------------------------------------


def _orientations():
    return import_reader("nibabel", "volumes").orientations


def _orientation_of(affine):
    """As `nibabel.aff2axcodes`, in one word; None where an axis leads nowhere."""
    with np.errstate(all="ignore"):
        codes = _orientations().aff2axcodes(affine)
    return None if None in codes else "".join(codes)


def _find_turn(stored, wanted):
    """nibabel's orientation array (3, 2) that turns `stored` to `wanted`; None is as stored."""
    if wanted is None:
        return _orientations().axcodes2ornt("RAS")  # axis 0 stays 0, 1 stays 1, 2 stays 2
    if stored is None:
        raise ValueError(
            f"its affine tells no orientation, so it cannot be turned to {wanted}, that of others: "
            "mend its header, or leave it out"
        )
    as_arrays = (_orientations().axcodes2ornt(codes) for codes in (stored, wanted))
    return _orientations().ornt_transform(*as_arrays)


# ---- masks -----------------------------------------------------------------------------------


def write_mask(path, volume, slices, dtype=np.uint8, slope=1):
    """Write the masks of all slices of a `Volume` as a file that is whole or absent.

    slices: iterable of integer arrays (H, W) of class numbers 0..255, in order. Shape, affine and
    header geometry are those of the volume's file, to whose stored order a volume that was turned
    is turned back. path ends with .nii, .nii.gz, .nrrd or .mha. dtype: of the voxels, which stand
    for their values times `slope`, in NIfTI.
    """
    path, mask = Path(path), volume.stored(slices, dtype)
    shape = volume.header.nifti.get_data_shape()
    mask = mask.reshape(shape if math.prod(shape) == mask.size else mask.shape, order="F")
    write = partial(write_nifti, mask, volume.header.nifti, slope)
    if path.name.lower().endswith(ITK_SUFFIXES):
        write = partial(write_itk, mask, volume.stored_affine, path.suffix)
    with atomic_write(path) as file:
        if not path.name.lower().endswith(".gz"):
            return write(file)
        with gzip.GzipFile("", "wb", 6, file, mtime=0) as compressed:
            write(compressed)
