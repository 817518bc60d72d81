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


def make_parser():
    parser = ArgumentParser("data.py", data.__doc__)
    add, real = parser.add_argument, number(0.0, type=float)
    add("root", nargs="?", default="dataset", help="the data set")
    add("--out", default=".", metavar="FOLDER", help="folder for contact_sheet.jpg")
    shown = "images of each split in it: those with least and most foreground and evenly between"
    add("--show", type=number(1, MOST), default=SHOWN, metavar="N", help=shown)
    anew = "write the images to FOLDER instead, split by blocks of neighbouring file numbers"
    add("--grouped-split", metavar="FOLDER", help=anew)
    plan = "print the flags that `train.py --recipe auto` would choose, and why"
    add("--plan", action="store_true", help=plan)
    add("--minutes", type=real, default=0.0, help="with --plan: for the training")
    add_pixel_limit(add)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    set_pixel_limit(args.max_megapixels)
    root = Path(args.root)
    if args.grouped_split:
        target = grouped_split(root, args.grouped_split)
        for split in SPLITS:
            print(f"{split}: {len(load_coco(target / split).imgs)} images")
        name = shlex.quote(str(target))
        print(f"next: python data.py {name}, python train.py --data {name}")
        return
    require_data_set(root)
    if args.plan:
        planned_flags({"data": args.root, "minutes": args.minutes})
        return
    sheet = output_folder(args.out) / "contact_sheet.jpg"
    check_outputs([sheet], "--out")
    problems = audit(root, sheet.parent, args.show)
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        count = f"{len(problems)} problem(s), listed above"
        raise ValueError(f"{args.root}: {count}: mend or remove them before training")
    if root != Path("dataset"):  # that is the tutorial's, whose recipe is the default
        print(f"next: {next_training(root)}")
