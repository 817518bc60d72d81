"""The flags of predict.py."""

import argparse
from pathlib import Path

from medseg.cli import ArgumentParser, add_device_flags, add_pixel_limit, named_values, number
from medseg.inference import PLAIN, flips_to_average
from medseg.pieces import CLEANINGS, read_clean
from medseg.results.folder import DEFAULT, WRITTEN
from medseg.samples import KINDS
from medseg.settings import is_spacing

MODEL_SUFFIXES = (".pth", ".pt")


def parse_arguments(argv, doc):
    """The command line; `model` is a list of files, or None.

    The first file after --model is a model, and so are those after it that are called as one. The
    others are images, as in `--model best_model.pth scan.png`.
    """
    args = make_parser(doc).parse_args(argv)
    if args.model:
        first, *others = args.model
        models = [name for name in others if Path(name).suffix.lower() in MODEL_SUFFIXES]
        args.inputs = [*args.inputs, *(name for name in others if name not in models)]
        args.model = [first, *models]
    return args


def make_parser(doc):
    """The parser of predict.py, whose docstring is `doc`."""
    parser, kinds = ArgumentParser("predict.py", doc), f"{KINDS}; without one, the example"
    parser.add_argument("inputs", nargs="*", metavar="IMAGE|FOLDER", help=kinds)
    _add_model_flags(parser)
    add = parser.add_argument_group("files").add_argument
    add("--output", metavar="FOLDER|FILE", help="default: here for one image, else predictions/")
    add(
        "--window",
        type=float,
        nargs=2,
        metavar=("CENTER", "WIDTH"),
        help="in DICOM files and volumes, show values from CENTER - WIDTH/2 to CENTER + WIDTH/2 as "
        "black to white; default: the window of the weights, or the file's own, or 0.5 to 99.5 %% "
        "of a volume's values",
    )
    add(
        "--write",
        type=named_values(dict.fromkeys(WRITTEN, (1.0, 1.0)), tuple),
        default=DEFAULT,
        metavar="NAME,...",
        help="what to write of each image: mask; overlay; classes, a mask of each class; objects, "
        "connected pieces by their numbers, 16 bits; probability, 16 bits, of each class; labelme, "
        "outlines to be corrected in LabelMe; coco, one file of all; none: the table alone",
    )
    add(
        "--simplify",
        type=number(0.0, type=float),
        default=0.0,
        metavar="PIXELS",
        help="fewer points for --write labelme, at most so many pixels beside the true outline",
    )
    add(
        "--pixel-size",
        type=pixel_size,
        metavar="MM",
        help="width and height of a pixel, 0.5 or 0.5x0.7, for areas in mm2 where files do not say",
    )
    add_pixel_limit(add)
    add = parser.add_argument_group("page").add_argument
    add("--page", action="store_true", help="open a page in the browser; needs gradio")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="where the page listens")
    add("--port", type=number(1, 65535), metavar="N", help="default: 7860 or the next free one")
    add(
        "--auth",
        type=user_and_password,
        metavar="USER:PASSWORD",
        help="a name and password that the page asks for: wherever others can reach it",
    )
    return parser


def user_and_password(text):
    """'USER:PASSWORD' -> ('USER', 'PASSWORD')."""
    user, _, password = text.partition(":")
    if not user or not password:
        raise argparse.ArgumentTypeError("must be a name and a password, USER:PASSWORD")
    return user, password


def pixel_size(text):
    """'0.5' or '0.5x0.7', width and height in mm -> (height, width)."""
    sizes = [float(part) for part in text.lower().split("x")]
    if len(sizes) > 2 or not is_spacing(sizes):
        raise argparse.ArgumentTypeError(f"must be mm above 0, such as 0.5 or 0.5x0.7, not {text}")
    return sizes[-1], sizes[0]


def _add_model_flags(parser):
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        nargs="+",
        metavar="FILE",
        help="weights, or several, whose probabilities are averaged; default: best_model.pth, else "
        "dataset/tumor.pth, which comes with the repository",
    )
    add(
        "--threshold",
        type=number(0.0, 1.0, float),
        help="foreground is above this probability; default: that of the weights, else 0.5",
    )
    add(
        "--tta",
        action=argparse.BooleanOptionalAction,
        help="average over flips of the image too, and over quarter turns if the training had "
        "them; default: as chosen on valid for the weights, else off",
    )
    add(
        "--clean",
        type=named_values(CLEANINGS, read_clean),
        metavar="NAME,...",
        help="clean up the mask of each class, in this order. min-area=50: remove pieces of fewer "
        "pixels; min-mm2=5: of fewer mm2; largest: keep the largest piece; fill: fill holes; "
        "split: take objects that touch apart; none; default: as chosen on valid for the weights, "
        "else none",
    )
    add_device_flags(add)
    add(
        "--export",
        metavar="FILE",
        help="write --model for other programs: .onnx, or .torchscript (torch.jit, which PyTorch "
        "has deprecated); or its weights in half precision (float16) to FILE.pth",
    )


def choose_inference(args, recorded, trained_flips=()):
    """(the `medseg.inference.Inference` to predict with, lines on it or '').

    recorded: that in the weights, or None; a flag that is given wins over it. trained_flips: those
    that --tta takes where none were chosen.
    """
    inference, given = recorded or PLAIN, []
    if args.threshold is not None:
        inference, given = inference._replace(threshold=args.threshold), ["--threshold"]
    if args.tta is not None:
        flips = flips_to_average(recorded, trained_flips) if args.tta else ()
        inference = inference._replace(flips=flips)
        given.append("--tta" if args.tta else "--no-tta")
    if args.clean is not None:
        inference = inference._replace(clean=args.clean)
        given.append("--clean")
    lines = []
    if recorded is not None:
        but = f", but for {' and '.join(given)}" if given else ""
        files = args.model[0] if len(args.model) == 1 else f"{len(args.model)} files"
        chosen = "chosen" if inference == recorded else f"{recorded} was chosen"
        lines.append(f"{inference}: {chosen} on valid (recorded in {files}){but}")
    if args.tta and not (trained_flips or (recorded and recorded.flips)):
        lines.append(
            "WARNING: --tta averages over flips, and the weights record none that their training "
            "showed (--augment flip): masks may become worse"
        )
    return inference, "\n".join(lines)
