"""The command line of every script: one parser, number types, one exit handler."""

import argparse
import contextlib
import copy
import difflib
import errno
import math
import os
import sys
import tempfile
from pathlib import Path

MAX_MEGAPIXELS = 89  # of an image: Pillow's limit


class HelpFormatter(argparse.HelpFormatter):
    """Keeps the line breaks of the examples and shows the default of every flag that has one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=100)

    def _fill_text(self, text, width, indent):
        return text

    def _get_help_string(self, action):
        # Python 3.10 gives switches an ending of its own, which says False for off.
        text = action.help.removesuffix(" (default: %(default)s)")
        if action.default in (None, argparse.SUPPRESS):
            return text
        if isinstance(action.default, bool):
            return f"{text} (default: {'on' if action.default else 'off'})"
        if isinstance(action.default, (tuple, list)):
            return f"{text} (default: {' '.join(map(str, action.default))})"
        return f"{text} (default: %(default)s)"


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
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._suggestion(unknown)}")
        return namespace

    def parse_given(self, args, names=None):
        """{name: value} of those among the flags `names`, or all, that the command line gives.

        Other flags are passed over. --help and errors are answered as by `parse_args`.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.print_help, parser.error = self.print_help, self.error
        for action in self._actions:
            if names is None or action.dest in ("help", *names):
                action = copy.copy(action)
                action.default = argparse.SUPPRESS  # what is not given is left out
                parser._add_action(action)
        return vars(parser.parse_known_args(args)[0])

    def _suggestion(self, unknown):
        """', did you mean --batch-size?' for the first unknown flag that resembles a known one."""
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for flag in unknown:
            spelled = flag.partition("=")[0].replace("_", "-").lower()
            if spelled.startswith("--") and (close := difflib.get_close_matches(spelled, known, 1)):
                return f", did you mean {close[0]}?"
        return ""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see python {self.prog} --help)\n")

    def restore(self, saved):
        """Make the flags of an earlier run the defaults: what the command line gives again wins.

        saved: mapping of names to values; unknown names are ignored. Raises ValueError for a
        value that the flag could not have had.
        """
        for action in self._actions:
            if action.dest not in saved:
                continue
            value, default = saved[action.dest], action.default
            possible = type(value) is (str if default is None else type(default))
            if possible and action.choices:
                possible = value in action.choices
            if possible and action.type:
                try:
                    action.type(value)
                except (ValueError, TypeError, argparse.ArgumentTypeError):
                    possible = False
            if not possible and not (value is None and default is None):
                raise ValueError(f"{flag_name(action.dest)} cannot have been {value!r:.50}")
            self.set_defaults(**{action.dest: value})


def flag_name(name):
    """'batch_size' -> '--batch-size'."""
    return "--" + name.replace("_", "-")


def spell_flags(values):
    """{'weight_decay': 0.01, 'augment': True} -> '--weight-decay 0.01 --augment'."""
    flags = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(flag_name(name if value else f"no_{name}"))
        else:
            flags.append(f"{flag_name(name)} {value}")
    return " ".join(flags)


def add_device_flags(add):
    """Add --device and --precision with a parser's or a group's add_argument."""
    add("--device", default="auto", help="auto, cuda, mps, cpu, or the number of a GPU")
    add(
        "--precision",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="auto: bf16 on a GPU that has it, a CPU with AMX, and one of AMD with avx512_bf16; "
        "fp16 on other GPUs, else fp32",
    )


def add_pixel_limit(add):
    """Add --max-megapixels with a parser's or a group's add_argument."""
    add(
        "--max-megapixels",
        type=number(1),
        default=MAX_MEGAPIXELS,
        metavar="N",
        help="refuse larger images, which a small file may hold to fill the memory",
    )


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

    known: {name: (value where none is given, highest value)}; the lowest is 0. The first is None
    of a name that needs a value. Raises ValueError.
    """
    values = {}
    for part in text.split(",") if text != "none" else ():
        name, given, value = (piece.strip() for piece in part.partition("="))
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"unknown name {name!r}: {hint}")
        if name in values:
            raise ValueError(f"{name} is there twice")
        default, highest = known[name]
        if default is None and not value:
            raise ValueError(f"{name} needs a value, as in {name}=50")
        try:
            number = float(value) if given else default
        except ValueError:
            number = math.nan
        if not 0 <= number <= highest:
            raise ValueError(f"{name}={value}: it must be from 0 to {highest:g}")
        values[name] = float(number)
    return {name: values[name] for name in known if name in values}


def named_values(known, convert=None):
    """An argparse type: text that `parse_named_values` takes, or convert() of what it gives."""

    def check(text):
        try:
            values = parse_named_values(text, known)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return convert(values) if convert else text

    return check


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
    if isinstance(error, OSError) and error.strerror:
        line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            line += ": make room there, or write to another disk (--out, --output or --data)"
    if isinstance(error, MemoryError):
        return f"out of memory ({line}): end other programs, or give less or smaller images at once"
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
            with contextlib.suppress(OSError):  # a reader that has gone, as in `| head`
                stream.flush()
        os._exit(status)
    if status:
        sys.exit(status)
