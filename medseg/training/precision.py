"""The precision of a run: found once, recorded, and kept by a run that goes on."""

from medseg.device import find_precision, pick_device


def settle_precision(args, device, model, loaders, *, begins):
    """(precision, a note on how it was found) of this run, which records it in `args`.

    begins: whether the run is a new one. Only then is anything timed: a run that goes on must not
    change its precision because the machine is busy this time.
    """
    images = 0
    if begins and not args.test_only:
        images = args.epochs * loaders["train"].images_per_epoch
    precision, note = find_precision(
        args.precision,
        device,
        model,
        images=images,
        size=args.crop or args.image_size,
        batch_size=args.batch_size,
        training=True,
    )
    if args.precision == "auto":
        args.precision, args.precision_chosen_for = precision, device.type
    return precision, note


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
