"""What prediction has to do as the import did: the window of grey values, the orientation."""

import math

import numpy as np

# What grey values are scaled from where no --window was given: a volume's percentiles, or the
# window in the file.
OF_VOLUME, OF_FILE = "percentiles", "file"
MAX_CHANNELS = 16  # of an image
OF_IMPORT = ("window", "orientation", "channels", "pattern", "context")


def window_limits(window):
    """(center, width) -> (low, high). ValueError for a width that is not above 0."""
    center, width = map(float, window)
    if not (math.isfinite(center) and 0 < width < math.inf):
        raise ValueError(f"--window: center {center:g} and width {width:g} show nothing")
    return center - width / 2, center + width / 2


def window_to_uint8(values, low, high):
    """Array of numbers -> uint8 array: low is 0, high 255, linear between, clipped beyond.

    Where low is above high the picture is inverted. NaN becomes 0. Where they are equal, everything
    above becomes 255.
    """
    scaled = np.array(values, np.float64)  # a copy, and no other: a slice may have 89 megapixels
    with np.errstate(all="ignore"):
        scaled -= low
        scaled *= 255
        scaled /= high - low
    np.nan_to_num(scaled, copy=False, posinf=255, neginf=0).clip(0, 255, out=scaled)
    return scaled.round(out=scaled).astype(np.uint8)


def is_spacing(numbers):
    """Whether these can be mm from pixel to pixel: areas of others would overflow, or be 0."""
    return all(1e-9 < number < 1e9 for number in numbers)


def read_settings(mapping):
    """What prediction has to do as the import did: a dict with these keys.

    mapping: anything's metadata, which may lack them and hold more. window: (center, width),
    OF_VOLUME (the percentiles of each), OF_FILE (DICOM's own window), or None of pictures.
    orientation: that all volumes were turned to, as "RAS", or None. channels: the names
    of those of an image, a tuple, empty of pictures that are grey or colour. pattern: what the
    files of channels are called, see `medseg.patterns`, or None. context: how many slices on
    either side of a slice are channels of it, 0 or more.
    Raises ValueError for other values.
    """
    settings = {name: mapping.get(name) for name in OF_IMPORT}
    if isinstance(settings["window"], (list, tuple)):
        settings["window"] = tuple(map(float, settings["window"]))
        window_limits(settings["window"])
    elif settings["window"] not in (None, OF_VOLUME, OF_FILE):
        raise ValueError(f"has the window {settings['window']!r:.60}")
    settings["channels"] = tuple(settings["channels"] or ())
    settings["context"] = settings["context"] or 0
    return settings


def context_offsets(context):
    """Where the slices lie that are channels of a slice, in their order: itself first."""
    return sorted(range(-context, context + 1), key=abs)


def channel_names(channels, context=0):
    """The names of all channels of an image, a tuple; () of what is grey or colour."""
    if not context:
        return tuple(channels)
    return tuple(
        f"{name} {offset:+}" if offset else name
        for offset in context_offsets(context)
        for name in channels or ("slice",)
    )


def spell_window(window):
    """The window of `read_settings` in words."""
    words = {
        None: "none",
        OF_VOLUME: "the percentiles of each volume",
        OF_FILE: "that of each file",
    }
    if window in words:
        return words[window]
    return " ".join(repr(float(value)).removesuffix(".0") for value in window)  # no digit is lost


def choose_window(given, trained):
    """(center, width) to predict with, or None for each file's own limits.

    given: --window, two numbers or None; it wins, and a line says where it differs. trained: the
    window of the weights. Raises ValueError for a window that shows nothing.
    """
    if given:
        given = tuple(given)
        window_limits(given)
        if trained not in (None, given):
            print(
                f"--window {spell_window(given)}: the weights were trained with another window, "
                f"{spell_window(trained)}"
            )
        return given
    return trained if isinstance(trained, tuple) else None


def check_window(present, window):
    """Compare the window of new images with those of the splits that stay.

    present: of `present_settings`. window: as of `read_settings`. Where they differ, a
    ValueError with the flag to give, if one of them is of numbers, else a warning.
    """
    for folder, settings in present:
        recorded = settings["window"]
        if recorded == window:
            continue
        differ = (
            f"{folder}: its window is {spell_window(recorded)}, that of the new images "
            f"{spell_window(window)}"
        )
        if None in (recorded, window) or tuple not in (type(recorded), type(window)):
            print(f"warning: {differ}")
        elif isinstance(recorded, tuple):
            raise ValueError(f"{differ}: give --window {spell_window(recorded)}")
        else:
            raise ValueError(f"{differ}: leave --window out")


def check_channels(present, info):
    """ValueError where the splits that stay have other channels than the new images.

    present: of `present_settings`; info: what is to be recorded of the new images.
    """
    for folder, settings in present:
        names = [channel_names(one["channels"], one["context"]) for one in (settings, info)]
        recorded, new = (", ".join(own) or "none" for own in names)
        if recorded != new:
            raise ValueError(
                f"{folder}: its images have the channels {recorded}, the new ones {new}: give the "
                "same by --channels and --context, or name another folder with --data"
            )
