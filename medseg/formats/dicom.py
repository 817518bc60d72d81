"""DICOM: the frames of a file as 8-bit pictures. pydicom is optional, and imported when used."""

import importlib
import math
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from medseg.formats.medical import (
    file_format,
    import_reader,
    is_spacing,
    name_file,
    window_to_uint8,
)
from medseg.images import pixel_limit, read_image, too_many_pixels
from medseg.settings import window_limits

MAX_INFLATED_BYTES = 512 << 20  # of a deflated file
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")


def read_any_image(path, window=None):
    """The one picture in an image or DICOM file as a PIL image of mode RGB, its size kept.

    Raises FileNotFoundError; ValueError, also for a volume and for a DICOM file of many frames.
    """
    found = file_format(path)
    if found is None:
        return read_image(path)
    if found == "nifti":
        raise ValueError(f"{path}: a volume, not one image: `python predict.py` takes it by itself")
    frames = read_dicom(path, window)
    if len(frames) > 1:
        raise ValueError(
            f"{path}: holds {len(frames)} frames, not one image: `python predict.py` takes it"
        )
    return Image.fromarray(frames[0]).convert("RGB")


def read_dicom(path, window=None):
    """The frames of a DICOM file: a sequence of uint8 arrays, (H, W), or (H, W, 3) for colour.

    Frames are decoded when they are asked for, so memory stays flat; iterating is fastest.
    window: (center, width) after slope and intercept (or the modality LUT); default: the file's
    own first window, else the range of all its values. Limits are center -+ width / 2. MONOCHROME1
    is inverted, so that more is brighter; YBR and palettes become RGB, which no window changes.
    Raises FileNotFoundError; ValueError for what is not DICOM, is damaged or needs a missing
    decoder, here or when the frame is decoded.
    """
    with name_file(path):
        return DicomFrames(path, window and window_limits(window))


class DicomFrames(Sequence):
    """What `read_dicom` returns."""

    def __init__(self, path, limits):
        self.path, self._limits = Path(path), limits
        self._header, self._source = _read_dicom_header(self.path)
        self._length = int(self._header.get("NumberOfFrames") or 1)
        self._photometric = str(self._header.get("PhotometricInterpretation"))
        self._packed = _packed_bits(self._header) if len(self) > 1 else 0
        if self._photometric not in GREY + COLOUR:
            raise ValueError(f"photometric interpretation {self._photometric} is not supported")

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return next(self._decode([index % len(self)], self._picture))

    def __iter__(self):
        return self._decode(None if len(self) > 1 else [0], self._picture)

    def spacing(self, index):
        """mm from row to row and from column to column of a frame, or None where it is not told.

        Of the patient (PixelSpacing), not of a detector behind him.
        """
        spacing = self._numbers("PixelMeasuresSequence", index, "PixelSpacing", 2)
        return spacing if spacing and is_spacing(spacing) else None

    def place(self, index):
        """(series, mm) of a frame: which series it is of, and where along the axis of its slices.

        None where the file does not tell. The axis is perpendicular to rows and columns.
        """
        position = self._numbers("PlanePositionSequence", index, "ImagePositionPatient", 3)
        axes = self._numbers("PlaneOrientationSequence", index, "ImageOrientationPatient", 6)
        series = self._header.get("SeriesInstanceUID")
        if not (position and axes and series):
            return None
        with np.errstate(all="ignore"):
            place = float(np.cross(axes[:3], axes[3:]) @ position)
        return (str(series), place) if math.isfinite(place) else None

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
            if self._packed:
                frames = self._unpack(indices)
            else:
                frames = iter_pixels(self._source, indices=indices)
            for index in range(len(self)) if indices is None else indices:
                frame = next(frames, None)
                if frame is None:
                    raise ValueError(f"is cut short: it has {index} of {len(self)} frames")
                yield function(frame, index)

    def _unpack(self, indices):
        """As iter_pixels, which refuses frames of 1-bit pixels that do not begin on a byte."""
        rows, columns = self._header.Rows, self._header.Columns
        for index in range(len(self)) if indices is None else indices:
            first, last = index * self._packed, (index + 1) * self._packed
            part = self._pixel_data[first // 8 : -(-last // 8)]
            bits = np.unpackbits(np.frombuffer(part, np.uint8), bitorder="little")
            yield bits[first % 8 :][: self._packed].reshape(rows, columns)

    @cached_property
    def _pixel_data(self):
        """The stored pixels of all frames, as bytes."""
        if self._source is self._header:
            return self._header.PixelData
        return importlib.import_module("pydicom").dcmread(self._source).PixelData

    def _picture(self, frame, index):
        if self._photometric in COLOUR:
            return self._rgb(frame)
        limits = self._limits or self._own_limits(index) or self._range
        picture = window_to_uint8(self._rescale(frame, index), *limits)
        return 255 - picture if self._photometric == "MONOCHROME1" else picture

    def _rgb(self, frame):
        if self._photometric == "PALETTE COLOR":
            from pydicom.pixels import apply_color_lut

            frame = apply_color_lut(frame, self._header)
            return (frame >> 8 * (frame.itemsize - 1)).astype(np.uint8)
        if frame.dtype.kind != "u" or frame.ndim != 3:
            raise ValueError("a colour image of other than three unsigned samples a pixel")
        return (frame >> max(self._header.BitsStored - 8, 0)).astype(np.uint8)

    def _rescale(self, frame, index):
        from pydicom.pixels import apply_modality_lut

        with np.errstate(all="ignore"):
            return apply_modality_lut(frame, self._macro("PixelValueTransformationSequence", index))

    def _own_limits(self, index):
        """(low, high) of the first window that the file gives for a frame, or None."""
        header = self._macro("FrameVOILUTSequence", index)
        window = []
        for keyword in ("WindowCenter", "WindowWidth"):
            value = header.get(keyword)
            if isinstance(value, Sequence) and not isinstance(value, str):
                value = value[0] if value else None
            window.append(value)
        if None in window:
            return None
        try:
            return window_limits(window)
        except ValueError:  # a width of 0, as some files have where there is no window
            return None

    def _macro(self, sequence, index):
        """Where the values for a frame are: its own or the shared group, or the header itself."""
        groups = list(self._header.get("PerFrameFunctionalGroupsSequence") or ())[index : index + 1]
        groups += self._header.get("SharedFunctionalGroupsSequence") or ()
        for group in groups:
            if group.get(sequence):
                return group[sequence][0]
        return self._header

    @cached_property
    def _range(self):
        """(lowest, highest) value in all frames."""

        def frame_range(frame, index):
            values = self._rescale(frame, index)
            values = values[np.isfinite(values)]
            return (values.min(), values.max()) if values.size else (math.inf, -math.inf)

        lows, highs = zip(*self._decode(None if len(self) > 1 else [0], frame_range), strict=True)
        return min(lows), max(highs)


def _read_dicom_header(path):
    """(header, what iter_pixels takes the pixels from: the path, or the header where it has them).

    Raises ValueError where the header cannot be true or there is no decoder for the pixels.
    """
    pydicom = import_reader("pydicom", "DICOM")
    from pydicom.filereader import read_dataset

    with open(path, "rb") as file:
        if file.read(132)[128:] != b"DICM":
            raise ValueError("not a DICOM file")
        meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag.group != 2)
        syntax = meta.get("TransferSyntaxUID")
        if not syntax:
            raise ValueError("its header names no transfer syntax")
        if syntax.is_deflated:  # pydicom inflates all of it in memory, whatever its size
            inflate = zlib.decompressobj(-zlib.MAX_WBITS).decompress
            if len(inflate(file.read(), MAX_INFLATED_BYTES + 1)) > MAX_INFLATED_BYTES:
                raise ValueError(f"inflates to more than {MAX_INFLATED_BYTES >> 20} MiB")
        file.seek(0)
        header = pydicom.dcmread(file, stop_before_pixels=not syntax.is_deflated)
        start = file.tell() + (8 if syntax.is_implicit_VR else 12)  # of the pixels
        _check_dicom_size(header, path.stat().st_size - start)
    _check_decoder(syntax, header)
    return header, (header if syntax.is_deflated else path)


def _packed_bits(header):
    """The bits of a frame where frames follow each other without a gap within a byte, else 0."""
    syntax, bits = header.file_meta.TransferSyntaxUID, header.Rows * header.Columns
    one_bit = header.get("BitsAllocated") == header.get("SamplesPerPixel", 1) == 1
    packed = one_bit and syntax.is_little_endian and not syntax.is_encapsulated
    return bits if packed and bits % 8 else 0


def _check_dicom_size(header, available):
    """ValueError where the header claims too many pixels, or more than the bytes `available`."""
    if "Rows" not in header or "Columns" not in header:
        raise ValueError("holds no image")
    rows, columns, frames = header.Rows, header.Columns, int(header.get("NumberOfFrames") or 1)
    samples, bits = header.get("SamplesPerPixel", 1), header.get("BitsAllocated", 0)
    if min(rows, columns, frames) < 1 or samples not in (1, 3) or not 1 <= bits <= 64:
        size = f"{frames} frames of {columns}x{rows} pixels, {samples} x {bits} bits each"
        raise ValueError(f"its header claims {size}")
    if rows * columns > pixel_limit():
        raise too_many_pixels(rows * columns, f"{columns}x{rows} pixels")
    syntax = header.file_meta.TransferSyntaxUID
    if syntax.is_deflated:
        return  # it is in memory already
    claimed = -(-frames * rows * columns * samples * bits // 8)
    if header.get("PhotometricInterpretation") == "YBR_FULL_422":
        claimed = claimed * 2 // 3
    if syntax.is_encapsulated:
        claimed = 8 * frames  # the least there is of each
    if claimed > available:
        raise ValueError(f"is cut short: {claimed - available} bytes of pixels are missing")


def _check_decoder(syntax, header):
    """ValueError that says what to install where the pixels cannot be decoded."""
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ValueError(f"its transfer syntax, {syntax.name}, is not supported") from None
    jpeg_12_bits = syntax == "1.2.840.10008.1.2.4.51" and header.get("BitsStored", 8) > 8
    if jpeg_12_bits and "pylibjpeg" not in decoder.available_plugins:
        raise ValueError(
            "JPEG of 12 bits has one decoder, under the GPLv3: convert the file with `dcmdjpeg`, "
            "or run `pip install pylibjpeg pylibjpeg-libjpeg`"
        )
    if decoder.is_available:
        return
    packages = "python-gdcm"
    if syntax.startswith("1.2.840.10008.1.2.4.8"):  # JPEG-LS
        packages = "pyjpegls"
    elif syntax.startswith("1.2.840.10008.1.2.4.20"):  # JPEG 2000, high throughput
        packages = "pylibjpeg pylibjpeg-openjpeg"
    raise ValueError(f"no decoder for {syntax.name}: run `pip install {packages}`")
