"""The command line of data.py: look at a data set, plan a training on it, or split it anew."""

import shlex
from pathlib import Path

import data
from medseg.cli import ArgumentParser, add_pixel_limit, number, output_folder
from medseg.coco import SPLITS, load_coco, require_data_set
from medseg.own_files import check_outputs
from medseg.planning.audit import SHOWN, audit
from medseg.planning.contact_sheet import MOST
from medseg.planning.plan import planned_flags
from medseg.samples import set_pixel_limit
from medseg.splits import grouped_split, next_training


def main(argv=None):
    parser = ArgumentParser("data.py", data.__doc__)
    parser.add_argument("root", nargs="?", default="dataset", help="the data set")
    parser.add_argument("--out", default=".", metavar="FOLDER", help="folder for contact_sheet.jpg")
    parser.add_argument(
        "--show",
        type=number(1, MOST),
        default=SHOWN,
        metavar="N",
        help="images of each split in it: those with least and most foreground and evenly between",
    )
    parser.add_argument(
        "--grouped-split",
        metavar="FOLDER",
        help="write the images to FOLDER instead, split by blocks of neighbouring file numbers",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print the flags that `train.py --recipe auto` would choose, and why",
    )
    parser.add_argument(
        "--minutes", type=number(0.0, type=float), default=0.0, help="with --plan: for the training"
    )
    add_pixel_limit(parser.add_argument)
    args = parser.parse_args(argv)
    set_pixel_limit(args.max_megapixels)
    if args.plan:
        require_data_set(Path(args.root))
        given = {"data": args.root, "minutes": args.minutes}
        planned_flags(given)
        return
    if args.grouped_split:
        target = grouped_split(args.root, args.grouped_split)
        for split in SPLITS:
            print(f"{split}: {len(load_coco(target / split).imgs)} images")
        name = shlex.quote(str(target))
        print(f"next: python data.py {name}, python train.py --data {name}")
        return
    root, out = Path(args.root), output_folder(args.out)
    require_data_set(root)
    check_outputs([out / "contact_sheet.jpg"], "--out")
    problems = audit(root, out, args.show)
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise ValueError(
            f"{args.root}: {len(problems)} problem(s), listed above: "
            "mend or remove them before training"
        )
    if root != Path("dataset"):  # that is the tutorial's, whose recipe is the default
        print(f"next: {next_training(root)}")
