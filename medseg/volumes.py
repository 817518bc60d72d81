"""Volumes: NIfTI by nibabel, NRRD and MetaImage by SimpleITK, DICOM series; masks written back.

The libraries are optional, and imported when used. nibabel turns volumes whatever their format.
"""

import contextlib
import gzip
import hashlib
import importlib
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medseg import dicom
from medseg.files import (
    ITK_SUFFIXES,
    NIFTI_SUFFIXES,
    atomic_write,
    import_reader,
    name_file,
    nifti_version,
)
from medseg.samples import pixel_limit, too_many_pixels
from medseg.settings import is_spacing, window_limits, window_to_uint8

MAX_VOLUME_BYTES = 4 << 30  # of voxels, as stored
MAX_CHANNELS = 16
UNITS = {1: 1e3, 2: 1.0, 3: 1e-3}  # mm of a metre, millimetre, micrometre, by their codes
SAMPLE = 1 << 20  # voxels, at most, that the percentiles of a channel are taken from
PERCENTILES = (0.5, 99.5)
SINGLE_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".mha")  # of the files that masks are written to
LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])  # between the axes of DICOM and ITK and those of NIfTI


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
        return _orientation_of(_read_header(Path(path)).affine)


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
        self.header = _read_header(self.path)
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
        if height * width > pixel_limit():
            raise too_many_pixels(height * width, f"slices of {width}x{height} pixels")
        self._voxels = self.turn(self.header.read().reshape((*sides, extra), order="F"))

    def _split_shape(self, time):
        """(x, y, z, number of volumes) of the file; ValueError where there are too many."""
        shape = self.header.shape
        extra, said = math.prod(shape[3:]), " x ".join(map(str, shape))
        if extra > 1 and time is None and not self.header.has_vectors:
            raise ValueError(
                f"holds more than one volume ({said}): --channels A,B names them as channels of "
                "each slice, --time takes them as volumes in time"
            )
        if extra > MAX_CHANNELS and not time:
            raise ValueError(f"has {extra} channels ({said}), and {MAX_CHANNELS} are the most")
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
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        time, index = divmod(index % len(self), self.shape[self.axis])
        voxels = np.moveaxis(self._voxels, self.axis, 0)[index]
        return voxels[..., time : time + 1] if self.times > 1 else voxels

    def pictures(self, window=None, context=0):
        """The slices as a sequence of uint8 arrays (H, W, C).

        window: (center, width); default: each channel from its `limits`. context: how many slices
        on either side are channels too, in their order; at the ends the last one is repeated.
        """
        limits = [window_limits(window)] * self.n_channels if window else self.limits
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

        Raises ValueError for a slice of another shape, and for more or fewer slices.
        """
        voxels = np.zeros((*self._stored_sides, self.times), dtype, order="F")
        across = np.moveaxis(self.turn(voxels), self.axis, 0)
        targets = (one[..., time] for time in range(self.times) for one in across)
        for target, values in zip(targets, slices, strict=True):
            if np.shape(values) != target.shape:
                raise ValueError(f"a slice of {np.shape(values)} in a mask of {target.shape}")
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
        return [self._limits_of(channel, values) for channel, values in enumerate(sample.T)]

    def _limits_of(self, channel, values):
        values = values[np.isfinite(values)]
        if not values.size:
            slices = (one[..., channel] for one in self)
            values = np.concatenate([one[np.isfinite(one)] for one in slices])
        if not values.size:
            raise ValueError("none of its voxels is finite")
        low, high = np.percentile(values, PERCENTILES).tolist()
        return (low, high) if low < high else (float(values.min()), float(values.max()))

    def distance_to(self, other):
        """mm that the corners of two volumes lie apart, at most.

        Raises ValueError that names both where they differ in shape, or by a voxel or more.
        """
        if (self.shape, self.times) != (other.shape, other.times):
            in_time = (self.times, other.times) != (1, 1)
            sizes = [(*one.shape, *[one.times] * in_time) for one in (other, self)]
            sizes = [" x ".join(map(str, size)) for size in sizes]
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

    def __init__(self, volume, limits, context=0):
        self._volume, self._limits, self._context = volume, limits, context

    def __len__(self):
        return len(self._volume)

    def __getitem__(self, index):
        if not self._context:
            return self._picture(index)
        depth = len(self) // self._volume.times
        first = index // depth * depth  # of the same time
        around = range(index - self._context, index + self._context + 1)
        places = [min(max(place, first), first + depth - 1) for place in around]
        return np.concatenate([self._picture(place) for place in places], axis=-1)

    def _picture(self, index):
        values, inverted = self._volume[index], self._volume.header.inverted
        channels = [
            window_to_uint8(values[..., channel : channel + 1], *limits, inverted=inverted)
            for channel, limits in enumerate(self._limits)
        ]
        return np.concatenate(channels, axis=-1) if len(channels) > 1 else channels[0]


class StackedVolume(Volume):
    """What `stack_volumes` returns."""

    def __init__(self, volumes, names):
        self.__dict__ |= vars(volumes[0])
        self._volumes, self.channels = volumes, tuple(names)
        self.n_channels = sum(volume.n_channels for volume in volumes)
        self.limits = [limits for volume in volumes for limits in volume.limits]
        for volume in volumes:
            volume.axis = self.axis  # equal but for rounding

    def __getitem__(self, index):
        return np.concatenate([volume[index] for volume in self._volumes], axis=-1)


def stack_volumes(volumes, names):
    """Several modalities of one case as one Volume, whose channels have these names.

    volumes: [Volume], turned to one orientation. The place, and the masks written back, are those
    of the first. Raises ValueError where two differ in shape, or lie a voxel or more apart.
    """
    for volume in volumes[1:]:
        volumes[0].distance_to(volume)
    return StackedVolume(volumes, names)


# ---- orientation -----------------------------------------------------------------------------


def _orientations():
    return import_reader("nibabel", "volumes").orientations


def _orientation_of(affine):
    """As `nibabel.aff2axcodes`, in one word; None where an axis leads nowhere."""
    if not np.isfinite(affine).all():
        raise ValueError("its affine is not finite")
    try:
        with np.errstate(all="ignore"):
            codes = _orientations().aff2axcodes(affine)
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


def _read_header(path):
    if path.is_dir():
        return _read_series(path)
    if path.name.lower().endswith(ITK_SUFFIXES):
        return _read_itk(path)
    return _read_nifti(path)


def _check_claim(shape, dtype):
    """The bytes of voxels of this shape and type; ValueError where there can be none."""
    said, size = " x ".join(map(str, shape)), math.prod(map(int, shape)) * dtype.itemsize
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"holds no volume: its shape is {said or 'missing'}")
    if dtype.kind not in "iuf":
        raise ValueError(f"its voxels are {dtype.name}: only real numbers can be shown as grey")
    if size > MAX_VOLUME_BYTES:
        raise ValueError(f"claims {size / 2**30:.0f} GiB ({said}): more than 4 GiB")
    return size


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
    offset = header.get_data_offset()
    size = offset + _check_claim(shape, dtype)

    def read():
        if compressed:
            with gzip.open(path) as file:
                content = file.read(size + 1)  # to its end, where the checksum is
        else:
            content = np.memmap(path, np.uint8, "r")
        if len(content) < size:
            raise ValueError(f"is cut short: {size - len(content)} bytes of voxels are missing")
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
    header.set_qform(affine, 1)
    header.set_sform(affine, 1)
    header.set_xyzt_units("mm")
    return header


def _read_series(folder):
    """The Header of a folder with a DICOM series."""
    slices, affine, spacing = dicom.open_series(folder)
    header = slices[0][0].header
    shape = header.Columns, header.Rows, len(slices)
    _check_claim(shape, np.dtype(np.float32))

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
    fields, data, start = _read_fields(path, ":" if is_nrrd else "=")
    needed = (
        {"type", "sizes"} if is_nrrd else {"ndims", "dimsize", "elementtype", "elementdatafile"}
    )
    if missing := needed - fields.keys():
        raise ValueError(f"not an NRRD or MetaImage file: its header has no {min(missing)}")
    reader = itk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if is_nrrd else "MetaImageIO")
    reader.SetFileName(str(path))
    with _no_itk_words():
        reader.ReadImageInformation()
    ndim, vectors = reader.GetDimension(), reader.GetNumberOfComponents()
    shape = (*reader.GetSize(), *((1,) * (3 - ndim)), *((vectors,) if vectors > 1 else ()))
    one_voxel = itk.Image([1] * ndim, reader.GetPixelID(), vectors)
    size = _check_claim(shape, itk.GetArrayViewFromImage(one_voxel).dtype)
    packed = fields.get("encoding", "raw") != "raw" or fields.get("binarydata", "true") != "true"
    missing = size - (data.stat().st_size - start)
    if missing > 0 and not packed and fields.get("compresseddata", "false") == "false":
        raise ValueError(f"is cut short: {missing} bytes of voxels are missing")
    affine, axes = np.eye(4), min(ndim, 3)
    spacing = [*reader.GetSpacing(), 1, 1][:3]
    direction = np.reshape(reader.GetDirection(), (ndim, ndim))[:axes, :axes]
    affine[:axes, :axes], affine[:axes, 3] = direction, reader.GetOrigin()[:axes]
    affine[:3, :3] *= spacing
    affine = LPS_TO_RAS @ affine

    def read():
        with _no_itk_words():
            voxels = itk.GetArrayFromImage(reader.Execute())
        return (voxels if vectors == 1 else np.moveaxis(voxels, -1, 0)).T.reshape(shape, order="F")

    sizes = {"space directions", "spacings", "elementspacing", "elementsize"}
    return Header(
        shape,
        affine,
        spacing,
        read,
        _make_nifti(reader.GetSize(), affine),
        is_told=bool(sizes & fields.keys()),
        has_vectors=vectors > 1,
        seal=fields.get("medseg", "").lstrip("=").encode(),
    )


@contextlib.contextmanager
def _no_itk_words():
    """Its errors name its own source files, in many lines."""
    try:
        yield
    except RuntimeError:
        raise ValueError("not an NRRD or MetaImage file, or a damaged one") from None


def _read_fields(path, sign):
    """(fields of the header of an NRRD or MetaImage file, in lower case, file of voxels, offset).

    Raises ValueError where the voxels lie in several files, or outside the folder of the header.
    """
    fields, name = {}, None
    with open(path, "rb") as file:
        while name is None and (line := file.readline(1 << 16).decode("latin-1").strip()):
            key, _, value = map(str.strip, line.partition(sign))
            fields[key.lower()] = value.lower()
            name = value if key.lower() == "elementdatafile" else None
            if key.lower() in ("data file", "datafile"):
                fields["data file"] = value
        start = file.tell()
    name = name or fields.get("data file", "local")
    if name.lower() == "local":
        return fields, path, start
    folder, data = os.path.realpath(path.parent), os.path.realpath(path.parent / name)
    if "%" in name or name.startswith("LIST"):
        raise ValueError(f"its voxels lie in several files ({name}): save it as one .nrrd or .mha")
    if os.path.commonpath([folder, data]) != folder or not os.path.isfile(data):
        raise ValueError(f"its voxels, {name}, are not in a file in its folder")
    return fields, Path(data), 0


def write_mask(path, volume, slices, dtype=np.uint8, slope=1):
    """Write the masks of all slices of a `Volume` as a file that is whole or absent.

    slices: iterable of integer arrays (H, W) of class numbers 0..255, in order. Shape, affine and
    header geometry are those of the volume's file, to whose stored order a volume that was turned
    is turned back. path ends with .nii, .nii.gz, .nrrd or .mha. dtype: of the voxels, which stand
    for their values times `slope`, in NIfTI.
    """
    path = Path(path)
    if not path.name.lower().endswith(SINGLE_SUFFIXES):
        raise ValueError(f"{path}: a mask volume is written as {', '.join(SINGLE_SUFFIXES)}")
    try:
        mask = volume.stored(slices, dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    shape = volume.header.nifti.get_data_shape()
    mask = mask.reshape(shape if math.prod(shape) == mask.size else mask.shape, order="F")
    write = partial(_write_nifti, mask, volume.header.nifti, slope)
    if path.name.lower().endswith(ITK_SUFFIXES):
        write = partial(_write_itk, mask, volume.stored_affine, path.suffix)
    with atomic_write(path) as file:
        if not path.name.lower().endswith(".gz"):
            return write(file)
        with gzip.GzipFile("", "wb", 6, file, mtime=0) as compressed:
            write(compressed)


def _write_nifti(mask, header, slope, file):
    nibabel, header = importlib.import_module("nibabel"), header.copy()
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


def _write_itk(mask, affine, suffix, file):
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
        header = _read_header(Path(path))
        return header.seal == _seal(header.read())
