"""The precision of a run: chosen once, recorded, and kept by a run that goes on."""

from medseg.device import choose_precision, pick_device
from medseg.dist import all_reduce_max, is_first


def settle_precision(args, device):
    """The precision of this run, which records it in `args`; of several processes, the first's."""
    known = ("fp32", "fp16", "bf16")
    number = known.index(choose_precision(args.precision, device)) if is_first() else 0
    precision = known[int(all_reduce_max(number)[0])]
    if args.precision == "auto":
        args.precision, args.precision_chosen_for = precision, device.type
    return precision


def keep_precision(args, parser, flags):
    """Give a run that goes on the precision that 'auto' chose for it, in `args`.

    flags: of its checkpoint, which are the parser's defaults. Where the run moves to another kind
    of device, from a GPU to a CPU, say, that choice is forgotten.
    """
    recorded, kind = flags.get("precision"), flags.get("precision_chosen_for")
    if kind is None:  # it was given
        return
    if pick_device(args.device).type == kind:
        args.precision_chosen_for = kind
        if args.precision == "auto":
            args.precision = recorded
    else:
        kind = None
        if args.precision == recorded:
            args.precision = "auto"
        parser.set_defaults(precision=args.precision)
    parser.set_defaults(precision_chosen_for=kind)
