"""From what a data set looks like to the flags of train.py, each with its reason.

Read top to bottom: start, images, network, length, augmentation. A flag that the user gives wins,
and the rules after it go by it. Dice in the comments is of test images, with one seed and equal
computing time; docs/results.md says of which data sets.
"""

import math

from medseg.augment import SLIGHT
from medseg.cli import spell_flags

# Weights that come with the repository are a start where the training images are fewer than FEW and
# are marked by them with a Dice of KNOWN. dataset/tumor.pth: 0.80 on tumours, 0.62 on drawn ones,
# 0.18 on blood cells, 0.11 on ultrasound images, 0.05 on retinas, 0.04 on membranes.
FEW, KNOWN = 300, 0.4
KEPT = 0.97  # Dice that masks keep at the training size: what is lost there no network finds
# Pixels a side; images that need more are trained on crops of their own size. Retinas of 999x960:
# 0.783 so, 0.760 whole at 512x512. Membranes in crops: 0.812 with three levels, 0.809 with five.
WHOLE_LIMIT, CROP, CROP_DEPTH = 384, 128, 3
LARGEST = 6000  # side of an image that is predicted at its own size: it is decoded whole
BOTTOM = 4  # pixels a side of the deepest level; nnU-Net has 4 to 7
PIXELS = {"cpu": 8 * 128**2, "cuda": 16 * 256**2}  # of a batch
BATCHES = (4, 8)  # the smallest that batch normalisation takes well, and the largest
FILTERS = {"cpu": 16, "cuda": 32}
# Strengths of the changes that all training images undergo, nearly nnU-Net's. Weaker ones were as
# good: 0.43 and 0.42 with these on 24 brain slices, 0.836 and 0.838 on 72 ultrasound images.
CHANGES = {"scale": 0.3, "shift": 0.1, "contrast": 0.3, "brightness": 0.3, "gamma": 0.3}
# A network that sees an image a few times does not learn it by heart, and learns more slowly where
# images are turned and changed. Dice on valid with turns, flips and CHANGES, and with SLIGHT ones:
# 0.50 and 0.64 after two passes over 1,502 brain slices, 0.955 and 0.957 after 25 and 30 over 210
# images of blood cells, but 0.860 and 0.847 after 69 over 72 ultrasound images.
FEW_PASSES = 40
STEPS, PASSES = 3000, 20  # without --minutes: so many steps, or so many times all images
# Steps below which --minutes make the network smaller (`shrink`): PASSES over the images, but these
# at least and at most. Dice on valid of 1,502 brain slices, on one core: 0.696 at 128x128 with 16
# filters (1,040 steps in 20 minutes), 0.735 with 8 (2,490 in 15), 0.751 with 8 at 96x96 (in 17).
WANTED_STEPS, NO_STEPS = (400, 4000), 40  # fewer than the last teach nothing
# A run of fewer steps is told to be too short, and how long it takes to have ENOUGH of them; where
# it starts from weights, a third of both. White blood cells had a Dice of 0.91 after 100 steps.
FEW_STEPS, ENOUGH = 300, 400
# Sizes at which masks keep FAIR give way before the filters do. Dice on valid at 64x64 with 16
# filters and at 96x96 with 8: 0.860 and 0.853 on ultrasound, whose masks keep 0.968 at 64x64; 0.417
# and 0.557 on 80 brain slices, whose masks keep 0.951. None is taken at which they keep less than
# WORTH of the largest size's.
FAIR, WORTH = 0.96, 0.9
# Seconds that a run takes besides its steps, and how often valid and test are predicted at its end.
AROUND, TUNING = 15, 5
EVALUATIONS, EVALUATION_SHARE = 20, 0.08  # of valid: so many, in that part of the time at most


class Plan:
    """Flags of train.py and why they were chosen. given: those of the command line, which win."""

    def __init__(self, given):
        self.given, self.flags, self.lines = given, {}, []

    def choose(self, reason="", **flags):
        """Take values for flags that are not given, with one line on why; '' has no line."""
        self.flags |= {name: self.given.get(name, value) for name, value in flags.items()}
        own = {name: value for name, value in flags.items() if value and name not in self.given}
        if own and reason:
            self.lines.append(f"{spell_flags(own)}: {reason}")

    def __getattr__(self, name):
        """The flag of this name."""
        return self.__dict__["flags"][name]

    @property
    def side(self):
        """Pixels a side of the squares that the network is trained on."""
        return self.flags["crop"] or self.flags["image_size"]


def choose_start(plan, flags, dice):
    """The network of weights that mark the training images with this Dice; flags: that make it."""
    if dice >= KNOWN:
        plan.given = {**flags, **plan.given}
        plan.flags |= flags
        reason = f"marks the training images with a Dice of {dice:.2f} already"
        plan.lines.append(f"--init {flags['init']}: {reason}; its network and its size are kept")


def choose_images(plan, look):
    """Channels and classes; whole images, as small as the masks allow, or crops of them."""
    reasons = {1: f"the channels are equal in all {look.read} images read", 3: "there are colours"}
    reason = reasons.get(look.channels, f"an image has {look.channels} channels")
    plan.choose(reason, n_channels=look.channels)
    if look.n_classes < 2:
        plan.choose(classes="union")
    elif look.together:
        share = f"{look.together:.0%} of the images have several of the {look.n_classes} classes"
        plan.choose(share, classes="each")
    else:
        kinds = f"no image has two of the {look.n_classes} classes, so they are taken for kinds of "
        plan.choose(f"{kinds}one thing; --classes each keeps them apart", classes="union")
    side = min((side for side, dice in look.kept.items() if dice >= KEPT), default=max(look.kept))
    can_crop = look.largest <= LARGEST and "image_size" not in plan.given
    if plan.given.get("crop", side > WHOLE_LIMIT and can_crop):
        lost = f"at 256x256 the masks alone would lose {1 - look.kept[256]:.2f} Dice"
        plan.choose(f"the foreground is {look.thickness:.0f} pixels thick, and {lost}", crop=CROP)
    else:
        kept = f"resized to {side}x{side} and back, the masks keep a Dice of {look.kept[side]:.3f}"
        plan.choose(kept, crop=0, image_size=side)


def choose_network(plan, look, device_type):
    """Network and batches; AdamW with a high rate, which batch normalisation allows."""
    depth = min(max(round(math.log2(plan.side / BOTTOM)), 1), 5)
    deepest = round(plan.side / 2**depth)
    sizes = f"{plan.side}x{plan.side} to {deepest}x{deepest} pixels"
    reason = f"so many levels shrink the image from {sizes}"
    if plan.crop:
        depth, reason = CROP_DEPTH, "thin structures are seen from nearby, and the steps are quick"
    plan.choose(reason, depth=depth)
    plan.choose(f"what a {device_type.upper()} computes in time", n_filters=FILTERS[device_type])
    if "init" not in plan.given or plan.classes == "each":  # else its last layer is kept too
        # Lin et al.: "Focal Loss", ICCV 2017, section 4.1.
        share = sum(look.foreground) / (look.n_classes if plan.classes == "each" else 1)
        prior = min(max(round(share, 3), 0.001), 0.5)
        plan.choose("the share of foreground, with which the network begins", prior=prior)
    low, high = BATCHES
    batch = min(max(2 ** round(math.log2(PIXELS[device_type] / plan.side**2)), low), high)
    reason = f"many small steps, for there are {look.images['train']} training images"
    plan.choose(reason, batch_size=batch)
    norm, dropout = "batch" if plan.batch_size >= low else "group", "bottleneck"
    plan.choose(norm=norm, dropout="none" if plan.crop else dropout)
    reason, rate = "AdamW; the rate falls to 0 at the end of the run", 2e-3 if plan.crop else 1e-3
    plan.choose(reason, lr=rate, weight_decay=0.01, schedule="cosine")
    masks = "threshold, flips and largest piece as they suit valid"
    plan.choose(masks, tune_prediction=True)


def choose_length(plan, look, times, minutes, spent=0.0):
    """Steps, cut into epochs: by the time there is, else by the images.

    times: the `Times` of the network that the flags so far make; spent: seconds of the minutes that
    planning took. Returns (steps, the seconds of the run).
    """
    pool, evaluation, around = costs(plan, look, times)
    if minutes:
        seconds = max(60 * minutes - spent - around, 1.0)
        evaluations = min(max(int(EVALUATION_SHARE * seconds / evaluation), 3), EVALUATIONS)
        steps = (seconds - evaluations * evaluation) / times.step
        reason = f"as many as {minutes:g} minutes allow"
    else:
        evaluations, steps = EVALUATIONS, max(STEPS, PASSES * pool / plan.batch_size)
        reason = f"at least {STEPS} in all, and every image {PASSES} times"
    per_epoch = max(round(steps / evaluations), 1)
    plan.choose(repeat=max(float(f"{per_epoch * plan.batch_size / pool:.4g}"), 0.0001))
    per_epoch = math.ceil(max(round(plan.repeat * pool), 1) / plan.batch_size)
    plan.choose(f"of {per_epoch} steps, {reason}", epochs=max(round(steps / per_epoch), 1))
    steps = plan.epochs * per_epoch
    plan.choose(
        "warm-up and mean of the weights over a twentieth of the steps; no early stopping",
        warmup=min(steps // 20, 100),
        ema=round(max(1 - 20 / steps, 0), 4),
        patience=plan.epochs,
    )
    return steps, steps * times.step + plan.epochs * evaluation + around


def costs(plan, look, times):
    """(images that an epoch draws with --repeat 1, seconds to predict valid, seconds besides)."""
    tiles = max(round(look.width * look.height / plan.crop**2), 1) if plan.crop else 1
    evaluation, test = (times.image * look.images[split] * tiles for split in ("valid", "test"))
    return look.images["train"] * tiles, evaluation, AROUND + TUNING * (evaluation + test)


def few_steps(plan):
    """(steps below which a run is too short, steps that are enough): fewer with a start."""
    part = 3 if "init" in {*plan.flags, *plan.given} else 1
    return FEW_STEPS // part, math.ceil(ENOUGH / part)


def lengthen(plan, look, times, spent):
    """(a flag that makes a run of these flags long enough, its value).

    The reverse of `choose_length`, which has been called.
    """
    pool, evaluation, around = costs(plan, look, times)
    enough = few_steps(plan)[1]
    if "epochs" in plan.given:
        return "epochs", math.ceil(enough / math.ceil(plan.repeat * pool / plan.batch_size))
    seconds = enough * times.step
    seconds = max(seconds + 3 * evaluation, seconds / (1 - EVALUATION_SHARE))
    return "minutes", math.ceil((seconds + spent + around) / 60)


def choose_augmentation(plan, look, passes):
    """All turns and flips, but for images that have an above and a below, and masks that are boxes.

    Boxes are what some annotators draw around a lesion: turned by 40 degrees, none would. On 80
    brain slices: 0.589 with quarter turns, 0.579 with turns by any angle. Slight changes alone in
    a run of few passes over whole images. passes: how many there are.
    """
    if passes < FEW_PASSES and not plan.crop:
        seen = f"about {passes:.0f} times" if passes > 1.5 else "hardly once"
        plan.choose(f"slight, for each training image is seen {seen}", augment=SLIGHT)
        return
    boxes = look.boxes >= 0.5
    changes = {"rotate": 10 if boxes else 30, **CHANGES}
    if not (look.oriented["turn"] or look.oriented["flip"]):
        changes |= {"flip": 1, "turn": 1} if boxes else {"rotate": 180, "flip": 1}
        reason = "turned or mirrored, the images look as before"
    elif not look.oriented["mirror"]:
        changes["mirror"] = 1
        reason = "the images have an above and a below, but no left"
    else:
        reason = "the images have an above and a below, a left and a right"
    if boxes:
        reason += "; the masks are upright boxes"
    plan.choose(reason, augment=changes)


def shrink(plan, look, given, steps):
    """The next flag to make smaller where the time is short, as a dict; {} where there is none.

    The size as far as masks stay FAIR, which costs least, then the filters, then the size again;
    whole images in place of crops only where these are so large that predicting valid and test
    takes nearly all the time. Weights to start from keep their network and its size.
    given: flags that stay; steps: that the time holds so far.
    """
    wanted = 0 if plan.crop else PASSES * look.images["train"] / plan.batch_size
    if "init" in plan.flags or steps >= round(min(max(wanted, WANTED_STEPS[0]), WANTED_STEPS[1])):
        return {}
    fixed = plan.crop or "image_size" in given
    smaller = [] if fixed else [side for side in look.kept if side < plan.image_size]
    if fair := [side for side in smaller if look.kept[side] >= FAIR]:
        return {"image_size": max(fair)}
    if "n_filters" not in given and plan.n_filters > 8:
        return {"n_filters": plan.n_filters // 2}
    least = WORTH * max(look.kept.values()) if steps >= NO_STEPS else 0
    if worth := [side for side in smaller if look.kept[side] >= least]:
        return {"image_size": max(worth)}
    if plan.crop and "crop" not in given and steps < NO_STEPS:
        return {"crop": 0}
    return {}
