"""Names in pictures: a font that has their characters, and lines that fit.

The fonts that come with Pillow and matplotlib have no Chinese characters, for which they draw empty
boxes. What no font of this machine has is written as an escape, such as \\u4e2d.
"""

import functools
from pathlib import Path

from PIL import ImageFont

from medseg.files import escape

# Parts of the file names of fonts for Chinese, which are tried before those in alphabetical order.
CHINESE = (
    *("notosanscjk", "sourcehansans", "notosanssc", "pingfang", "hiragino", "msyh", "simhei"),
    *("wqy", "droidsansfallback", "arialunicode", "simsun"),
)
USELESS = ("emoji", "lastresort")  # pictures, which Pillow cannot size; a box for each character


def drawable(*texts):
    """(list of texts as they can be drawn, each in one line; path of the font to draw them with).

    The path is None for the font that Pillow and matplotlib take by themselves. Where no font has
    all characters, the one with most of them is taken, and the others become escapes.
    """
    path, lacking = _best_font(frozenset(filter(str.isprintable, "".join(texts))))
    return [escape(text, lambda c: c.isprintable() and c not in lacking) for text in texts], path


@functools.lru_cache(maxsize=256)
def _best_font(characters):
    """(path of the font that lacks fewest of the characters, the frozenset of these).

    The path is None where no font has more than the ASCII characters.
    """
    best = None, frozenset(c for c in characters if not c.isascii())
    for path in _font_files() if best[1] else ():
        lacking = _lacking(path, characters)
        if len(lacking) < len(best[1]):
            best = path, lacking
        if not lacking:
            break
    return best


@functools.cache
def _font_files():
    """The font files of this machine, in the order in which they are tried."""
    from matplotlib.font_manager import findSystemFonts

    def rank(path):
        name = Path(path).name.lower()
        places = [place for place, part in enumerate(CHINESE) if part in name]
        return min(places, default=len(CHINESE)), "bold" in name, name

    paths = findSystemFonts()
    useful = (path for path in paths if not any(part in path.lower() for part in USELESS))
    return [dejavu(), *sorted(useful, key=rank)]


@functools.cache
def dejavu():
    """The path of the font that matplotlib takes by itself and brings with it."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


def _lacking(path, characters):
    """Which of the characters a font has not: all, where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
        ImageFont.truetype(path, 12)
    except (OSError, RuntimeError, ValueError):
        return characters
    return frozenset(c for c in characters if not font.get_char_index(ord(c)))


def pillow_font(path, size):
    """The Pillow font of a path that `drawable` gives, in pixels of height."""
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


def fit_lines(text, font, width, most):
    """Text in at most `most` lines of `width` pixels of a Pillow font, a list.

    It is broken anywhere, into lines of about one length. A longer one is cut in the middle.
    """
    widths = {character: font.getlength(character) for character in {*text, "."}}

    def wrap(shown, width):
        lines, room = [""], width
        for character in shown:
            room -= widths[character]
            if room < 0 and lines[-1]:
                lines.append("")
                room = width - widths[character]
            lines[-1] += character
        return lines

    shown, kept = text, len(text)
    lines = wrap(shown, width)
    while len(lines) > most and kept > 2:
        kept = min(kept - 1, sum(map(len, lines[:most])))
        shown = f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"
        lines = wrap(shown, width)
    even = sum(map(widths.get, shown)) / len(lines) + max(widths.values())
    return wrap(shown, min(even, width))
