"""How far to rely on a prediction: do members agree, is the image like the training?"""

import numpy as np

MAX_LISTED = 5  # images named on the screen
FAR = "unlike the training images"


def reliability_columns(slices):
    """What the table has of one image or a volume, from the `Prediction`s of its slices.

    The mean agreement and the median distance of those that have any.
    """
    columns = {}
    for name, average in (("agreement", np.mean), ("unlike", np.median)):
        known = [getattr(one, name) for one in slices if getattr(one, name) is not None]
        columns[name] = float(average(known)) if known else None
    return columns


def describe_unlike(assessed):
    """Lines on the images that are unlike the training; assessed: [(title, `Prediction`)]."""
    far = [(one.unlike, title) for title, one in assessed if (one.unlike or 0) > 1]
    far.sort(key=lambda entry: -entry[0])
    if len(far) <= MAX_LISTED:
        return [
            f"{title}: {FAR} (distance {ratio:.1f}, limit 1): do not rely on its mask"
            for ratio, title in far
        ]
    farthest = ", ".join(title for _, title in far[:MAX_LISTED])
    return [
        f"{len(far)} of {len(assessed)} images are {FAR}: do not rely on their masks; "
        f"the farthest: {farthest}"
    ]


def describe_assessments(assessed):
    """Lines on the images that are unlike the training and, of several, on which to check first."""
    lines = describe_unlike(assessed)
    known = [(one.agreement, title) for title, one in assessed if one.agreement is not None]
    if len(known) == 1:
        lines.append(f"agreement {known[0][0]:.2f}: the mean Dice between members")
    elif lowest := sorted(entry for entry in known if entry[0] < 1)[:MAX_LISTED]:
        listed = ", ".join(f"{title} {agreement:.2f}" for agreement, title in lowest)
        what = "to check first, for there the members agree least (mean Dice, docs/unlike.md)"
        lines.append(f"{what}: {listed}")
    return lines
