"""The files of a case, one for each channel that the weights were trained with."""

import re
from pathlib import Path

from medseg.modalities import Modalities
from medseg.patterns import KNOWN, has_placeholder, match


def find_cases(given, info):
    """[(name, Modalities)] that an input names by the pattern in the weights, [] by another way.

    Of a pattern without {channel}, Paths in the place of Modalities.

    given: a pattern, one of the files of a case, its folder, a folder of such files or of such
    folders, which may have another suffix (.nii.gz). info: a `net.ModelInfo`.
    Raises ValueError that names the file of a missing channel.
    """
    if has_placeholder(str(given)) and (info.channels or "{channel}" not in str(given)):
        return _match(str(given), info, name=Path(given).name)
    if not (info.channels and info.pattern):
        return []
    suffix = re.compile(f"({KNOWN})$", re.IGNORECASE)  # the longest one: it searches from the left
    patterns = info.pattern, suffix.sub(".*", info.pattern)
    return _find(Path(given), info, patterns[0]) or _find(Path(given), info, patterns[1])


def _find(path, info, pattern):
    """As `find_cases`, of a file or folder."""
    if path.is_dir():
        number = "{group}" if "{n}" in pattern else "{n}"
        return _match(f"{path}/{pattern}", info, name=path.resolve().name) or _match(
            f"{path}/{number}/{pattern}", info, below=1
        )
    folder = path.parents[pattern.count("/")] if path.is_file() else None
    return _match(f"{folder}/{pattern}", info, name=path.stem, only=path) if folder else []


def _match(pattern, info, name=None, below=0, only=None):
    """As `find_cases`. name: of a case without {id}; below: texts that do not name it."""
    try:
        channels = info.channels if "{channel}" in pattern else ()
        cases = match(pattern, channels, need_id=False, only=only)
    except FileNotFoundError:
        return []
    return [
        (
            "_".join(case.parts[below:] or case.parts).replace("/", "_") or name,
            Modalities(tuple(case.images), tuple(case.images.values()))
            if channels
            else case.images[None],
        )
        for case in cases
    ]
