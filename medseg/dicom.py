"""DICOM: frames as 8-bit pictures, a series as a volume. pydicom is optional."""

import math
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from medseg.files import import_reader, is_dicom, name_file
from medseg.samples import check_size
from medseg.settings import is_spacing, window_limits, window_to_uint8

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
DECODERS = "python-gdcm pyjpegls pylibjpeg pylibjpeg-openjpeg"  # for what pydicom cannot itself
# The slices of a series: closer than SAME_PLACE (mm) two are in one place; gaps between them may
# differ by UNEVEN of their mean, and the way from one to the next lean by TILT from their axis.
SAME_PLACE, UNEVEN, TILT = 1e-3, 0.01, 1e-3
WAY_OUT = "`pip install dcm2niix` and `dcm2niix -z y -o OUTPUT FOLDER` make NIfTI files of it"


class NoImageError(ValueError):
    """A DICOM file without pixels, such as a plan or a set of contours."""


def read_dicom(path, window=None):
    """The frames of a DICOM file: a sequence of uint8 arrays, (H, W), or (H, W, 3) for colour.

    Frames are decoded when they are asked for, so memory stays flat; iterating is fastest.
    window: (center, width) after slope and intercept (or the modality LUT); default: the file's
    own first window, else the range of all its values. Limits are center -+ width / 2. MONOCHROME1
    is inverted, so that more is brighter; padding does not count, and is 0; YBR and palettes
    become RGB, which no window changes.
    Raises FileNotFoundError; ValueError for what is not DICOM, is damaged or needs a missing
    decoder, here or when the frame is decoded.
    """
    with name_file(path):
        return DicomFrames(path, window and window_limits(window))


class DicomFrames(Sequence):
    """What `read_dicom` returns."""

    def __init__(self, path, limits=None):
        self.path, self._limits = Path(path), limits
        self.header = import_reader("pydicom", "DICOM").dcmread(self.path, stop_before_pixels=True)
        if "Rows" not in self.header or "Columns" not in self.header:
            raise NoImageError("holds no image")
        check_size(self.header.Columns, self.header.Rows)
        self._length = int(self.header.get("NumberOfFrames") or 1)
        self.photometric = str(self.header.get("PhotometricInterpretation"))
        if self.photometric not in GREY + COLOUR:
            raise ValueError(f"photometric interpretation {self.photometric} is not supported")

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return next(self._decode([range(len(self))[index]], self._picture))

    def __iter__(self):
        return self._decode(None if len(self) > 1 else [0], self._picture)

    def values(self, index):
        """The values (H, W) of a grey frame after slope and intercept; NaN is padding."""
        return next(self._decode([index], self._rescale))

    def spacing(self, index):
        """mm from row to row and from column to column of a frame, or None where it is not told.

        Of the patient (PixelSpacing), not of a detector behind him.
        """
        spacing = self._numbers("PixelMeasuresSequence", index, "PixelSpacing", 2)
        return spacing if spacing and is_spacing(spacing) else None

    def position(self, index):
        """(position of a frame in mm, (3,), directions of its rows and columns, (6,)), or None."""
        position = self._numbers("PlanePositionSequence", index, "ImagePositionPatient", 3)
        axes = self._numbers("PlaneOrientationSequence", index, "ImageOrientationPatient", 6)
        return (position, axes) if position and axes else None

    def place(self, index):
        """(series, mm) of a frame: which series it is of, and where along the axis of its slices.

        None where the file does not tell. The axis is perpendicular to rows and columns.
        """
        told, series = self.position(index), self.header.get("SeriesInstanceUID")
        if not (told and series):
            return None
        return str(series), float(np.cross(told[1][:3], told[1][3:]) @ told[0])

    def _numbers(self, sequence, index, keyword, count):
        """So many finite numbers that a frame has under a keyword, or None for anything else."""
        try:
            numbers = tuple(map(float, self._macro(sequence, index).get(keyword)))
        except Exception:  # pydicom raises many kinds on damaged values, of which none is needed
            return None
        return numbers if len(numbers) == count and np.isfinite(numbers).all() else None

    def _decode(self, indices, function):
        """Yield function(frame, its index) for the frames at `indices`, or for all."""
        from pydicom.pixels import iter_pixels

        with name_file(self.path):
            source = self.path
            if self.header.file_meta.TransferSyntaxUID.is_deflated:  # all of it, in memory
                source = import_reader("pydicom", "DICOM").dcmread(source)
            frames = iter_pixels(source, indices=indices)
            for index in range(len(self)) if indices is None else indices:
                try:
                    frame = next(frames, None)
                except ValueError as error:
                    raise ValueError(f"is damaged or cut short: {error}") from None
                except RuntimeError as error:  # it names the packages, after a line of its own
                    raise ValueError(f"{error}; `pip install {DECODERS}`, or `dcmdjpeg`") from None
                if frame is None:
                    raise ValueError(f"is cut short: it has {index} of {len(self)} frames")
                yield function(frame, index)

    def _picture(self, frame, index):
        if self.photometric == "PALETTE COLOR":
            from pydicom.pixels import apply_color_lut

            frame = apply_color_lut(frame, self.header)
            return (frame >> 8 * (frame.itemsize - 1)).astype(np.uint8)
        if self.photometric in COLOUR:
            return (frame >> max(self.header.BitsStored - 8, 0)).astype(np.uint8)
        limits = self._limits or self._own_limits(index) or self._range
        if self.photometric == "MONOCHROME1":
            limits = limits[::-1]
        return window_to_uint8(self._rescale(frame, index), *limits)

    def _rescale(self, frame, index):
        """A grey frame as stored -> its values, NaN where it is padding (PS3.3 C.7.5.1.1.2)."""
        from pydicom.pixels import apply_modality_lut

        macro = self._macro("PixelValueTransformationSequence", index)
        with np.errstate(all="ignore"):
            values = apply_modality_lut(frame, macro)
        ends = [self.header.get(f"PixelPadding{end}") for end in ("Value", "RangeLimit")]
        ends = [end for end in ends if type(end) is int]
        if not ends:
            return values
        # As they are stored: files give -2000 as 63536, and the other way around.
        ends = np.array(ends).astype(frame.dtype)
        return np.where((frame >= ends.min()) & (frame <= ends.max()), np.nan, values)

    def _own_limits(self, index):
        """(low, high) of the first window that the file gives for a frame, or None."""
        header = self._macro("FrameVOILUTSequence", index)
        values = (header.get(keyword) for keyword in ("WindowCenter", "WindowWidth"))
        with suppress(ValueError, TypeError, IndexError):  # missing, or a width of 0
            return window_limits([np.ravel(value)[0] for value in values])
        return None

    def _macro(self, sequence, index):
        """Where the values for a frame are: its own or the shared group, or the header itself."""
        groups = list(self.header.get("PerFrameFunctionalGroupsSequence") or ())[index : index + 1]
        groups += self.header.get("SharedFunctionalGroupsSequence") or ()
        for group in groups:
            if group.get(sequence):
                return group[sequence][0]
        return self.header

    @cached_property
    def _range(self):
        """(lowest, highest) value in all frames."""

        def frame_range(frame, index):
            values = self._rescale(frame, index)
            values = values[np.isfinite(values)]
            return (values.min(), values.max()) if values.size else (math.inf, -math.inf)

        lows, highs = zip(*self._decode(None if len(self) > 1 else [0], frame_range), strict=True)
        return min(lows), max(highs)


# ---- a series ----------------------------------------------------------------------------------


def open_series(folder):
    """(slices in their order, as [(DicomFrames, index)], affine, mm along x, y, z) of a folder.

    The affine (4, 4) leads from column, row and slice to mm in RAS, as NIfTI has it. Files without
    pixels are passed over. Raises ValueError where the folder holds other than one series of grey
    slices at even distances on a straight line.
    """
    slices = []
    for path in filter(is_dicom, sorted(Path(folder).iterdir())):
        with name_file(path), suppress(NoImageError):
            frames = DicomFrames(path)
            slices += [(frames, index) for index in range(len(frames))]
    if not slices:
        raise ValueError("a folder that holds no DICOM images")
    try:
        return _order_slices(slices)
    except ValueError as error:
        raise ValueError(f"{error}: {WAY_OUT}, or name its files as pictures") from None


def _order_slices(slices):
    """As `open_series`, of [(DicomFrames, index)]."""
    series = {str(frames.header.get("SeriesInstanceUID")) for frames, _ in slices}
    if len(series) != 1 or len(slices) < 2:
        raise ValueError(f"holds {len(series)} series with {len(slices)} slices, not one volume")
    told = [(frames.position(index), frames.spacing(index)) for frames, index in slices]
    if any(None in one for one in told):
        raise ValueError("some of its slices do not tell place, directions and PixelSpacing")
    positions, axes = (np.array([place[part] for place, _ in told]) for part in (0, 1))
    spacings = np.array([spacing for _, spacing in told])
    kinds = {(one.photometric, one.header.Rows, one.header.Columns) for one, _ in slices}
    apart = max(np.ptp(axes, 0).max(), np.ptp(spacings, 0).max())
    if len(kinds) > 1 or apart > TILT or slices[0][0].photometric in COLOUR:
        raise ValueError("its slices are in colour, or differ in size, direction or PixelSpacing")
    normal = np.cross(axes[0, :3], axes[0, 3:])
    order = np.argsort(positions @ normal)
    positions = positions[order] - positions[order[0]]
    heights = positions @ normal
    gaps = np.diff(heights)
    if gaps.min() < SAME_PLACE or np.abs(gaps - gaps.mean()).max() > UNEVEN * gaps.mean():
        raise ValueError(f"its slices lie {gaps.min():.4g} to {gaps.max():.4g} mm apart")
    aside = np.linalg.norm(positions - np.outer(heights, normal), axis=1)
    if (aside > UNEVEN * gaps.mean() + TILT * heights).any():
        raise ValueError("its slices do not lie above each other (a tilted gantry?)")
    affine, (row_mm, column_mm) = np.eye(4), spacings[0]
    affine[:3, 0], affine[:3, 1] = axes[0, :3] * column_mm, axes[0, 3:] * row_mm
    affine[:3, 2] = positions[-1] / len(gaps)
    affine[:3, 3] = told[order[0]][0][0]
    spacing = (column_mm, row_mm, float(np.linalg.norm(affine[:3, 2])))
    return [slices[place] for place in order], np.diag([-1, -1, 1, 1]) @ affine, spacing
