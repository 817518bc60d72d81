"""The command line of every script: one parser, number types, one exit handler."""

import argparse
import contextlib
import errno
import math
import os
import shlex
import sys
import tempfile
from difflib import get_close_matches as close_matches
from pathlib import Path

MAX_MEGAPIXELS = 89  # of an image: Pillow's limit


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples and shows the default of every flag that has one."""

    def _get_help_string(self, action):
        # Python 3.10 gives switches an ending of its own, which says False for off.
        text = action.help.removesuffix(" (default: %(default)s)")
        if action.default in (None, argparse.SUPPRESS):
            return text
        return f"{text} (default: {spell_value(action.default)})"


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors of one line, no abbreviated flags, and examples after the help.

    prog: name of the script. doc: its docstring; the first line is the description, the rest
    follows the list of flags.
    """

    def __init__(self, prog, doc):
        description, _, examples = doc.partition("\n")
        super().__init__(
            prog=prog,
            description=description,
            epilog=examples.strip("\n"),
            formatter_class=lambda prog: HelpFormatter(prog, max_help_position=30, width=100),
            allow_abbrev=False,
        )

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
            spelled = [flag.partition("=")[0].replace("_", "-").lower() for flag in unknown]
            close = [match for flag in spelled for match in close_matches(flag, known, 1)]
            hint = f", did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace

    def parse_given(self, args):
        """{name: value} of the flags that the command line gives."""
        absent = object()
        namespace = argparse.Namespace(**{action.dest: absent for action in self._actions})
        values = vars(self.parse_args(args, namespace))
        return {name: value for name, value in values.items() if value is not absent}

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see python {self.prog} --help)\n")


def flag_name(name):
    """'batch_size' -> '--batch-size'."""
    return "--" + name.replace("_", "-")


def spell_value(value):
    """A flag's value as the command line has it: {'flip': 1.0, 'rotate': 30.0} -> 'flip=1,...'."""
    if isinstance(value, dict):
        return ",".join(f"{name}={number:g}" for name, number in value.items()) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return str(value or 0)


def spell_flags(values):
    """{'lr': 0.01, 'compile': False} -> '--lr 0.01 --no-compile', quoted for a shell."""
    words = []
    for name, value in values.items():
        switch = isinstance(value, bool)
        words.append(flag_name(f"no_{name}" if value is False else name))
        words += [] if switch else [spell_value(value)]
    return shlex.join(words)


def add_device_flags(add, **of_device):
    """Add --device and --precision with a parser's or a group's add_argument."""
    add(
        "--device", default="auto", help="auto, cuda, mps, cpu, or the number of a GPU", **of_device
    )
    kinds = ("auto", "bf16", "fp16", "fp32")
    which = "auto: bf16 on a GPU that has it, a CPU with AMX, and one of AMD with avx512_bf16"
    text = f"what the network computes in; {which}; fp16 on other GPUs, else fp32"
    add("--precision", choices=kinds, default="auto", help=text)


def add_pixel_limit(add, **more):
    """Add --max-megapixels with a parser's or a group's add_argument."""
    more |= {"help": "refuse larger images, which a small file may hold to fill the memory"}
    add("--max-megapixels", type=number(1), default=MAX_MEGAPIXELS, metavar="N", **more)


def number(low, high=math.inf, type=int):
    """An argparse type: a finite number of `type` (int or float) from `low` to `high`."""

    def parse(text):
        value = type(text)
        if not (low <= value <= high and value < math.inf):
            most = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be at least {low}{most}, not {text}")
        return value

    parse.__name__ = type.__name__  # argparse names it: "invalid int value"
    return parse


def parse_named_values(text, known):
    """'flip,rotate=30' -> {'flip': 1.0, 'rotate': 30.0}, in the order of `known`; 'none' -> {}.

    known: {name: (value where none is given, or None, highest value)}; the lowest is 0. Raises
    ValueError.
    """
    values = {}
    for part in text.split(",") if text != "none" else ():
        name, given, value = (piece.strip() for piece in part.partition("="))
        if name not in known:
            close = close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"unknown name {name!r}: {hint}")
        default, highest = known[name]
        try:
            values[name] = float(value if given or default is None else default)
        except ValueError:
            values[name] = math.nan
        if not 0 <= values[name] <= highest:
            raise ValueError(f"{part.strip()}: {name}= takes a number from 0 to {highest:g}")
    return {name: values[name] for name in known if name in values}


def named_values(known, convert=dict):
    """An argparse type: convert() of what `parse_named_values` makes of the text."""

    def parse(text):
        try:
            return convert(parse_named_values(text, known))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def output_folder(path, flag="--out"):
    """`path` as a folder that can be written to, made if need be. ValueError names `flag`."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(
            f"{path}: cannot write to this folder ({error.strerror}); choose another with {flag}"
        ) from None


def one_line(error):
    """The message of an exception without line breaks, and what helps where a disk is full."""
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        return f"out of memory ({line}): end other programs, or give less or smaller images at once"
    if isinstance(error, OSError) and error.strerror:
        line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        line += ": make room there, or write to another disk (--out, --output or --data)"
    return line


def run_main(main, *, exit_at_once=False):
    """Call main(). What the user can mend is one line on stderr and status 2; Ctrl-C is 130.

    exit_at_once: leave without waiting for threads and Python's own shutdown, which with PyTorch
    loaded takes most of a second.
    """
    name, status = Path(sys.argv[0]).name, 0
    if hasattr(sys.stdout, "reconfigure"):  # file names may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # a reader that has gone, as in `| head`
        status, exit_at_once = 141, True
    except SystemExit as leaving:
        status = leaving.code or 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        status = 130
    except (OSError, ValueError, MemoryError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        status = 2
    if exit_at_once:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a reader that has gone
                stream.flush()
        os._exit(status)
    if status:
        sys.exit(status)
