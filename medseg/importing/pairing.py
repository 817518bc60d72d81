"""Which mask belongs to which image, found from their names."""

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain

from medseg.formats.medical import base_name
from medseg.importing.collect import same_form

COMMONEST = 12  # ends (or beginnings) of names that are tried, of images and of masks each
NUMBERED = re.compile(r"(.+?)[\W_]+\d+\)?")  # x_mask_1, x_mask-2, x_mask (3)
LAST_WORD = re.compile(r"(\d+|[^\W\d_]+)[\W_]*$")


@dataclass
class Pairing:
    """What `pair_files` found.

    rule: by which they were paired, in words. pairs: [(image, masks)], a tuple of one mask or of
    several to be united. missing: images without a mask. several: [(image, masks of which one may
    be meant)]. surplus: masks of no image.
    """

    rule: str
    pairs: list = field(default_factory=list)
    missing: list = field(default_factory=list)
    several: list = field(default_factory=list)
    surplus: list = field(default_factory=list)


def pair_files(images, masks, image_root, mask_root):
    """The Pairing of two lists of Paths, each below its root.

    Names are compared without case and suffix, in one Unicode form. The rules that are tried: the
    same path below the roots; the same name; names that share a beginning, where all images go on
    in one way and all masks in another (x and x_mask, 21_training and 21_manual1), or an end
    (img_1, mask_1). The rule that finds a mask for most images is taken, of equal ones the first.
    Where two rules of the last kind find different masks for as many images (x_reader1,
    x_reader2), both are candidates. An image's mask and the same name with a number (x_mask,
    x_mask_1, x_mask_2) are its masks together.
    Raises ValueError where no rule finds a mask for half the images.
    """
    shared = set(images) & set(masks)  # one folder holds both: only names tell them apart
    roots = image_root, mask_root
    numbered = _numbered(masks)
    plain = [mask for mask in masks if mask not in numbered]
    rule, candidates = _best_rule(images, plain, roots, shared)
    if numbered:  # the images may be numbered in the same way: a and a_1
        with_numbers = _best_rule(images, masks, roots, shared)
        if _count_images(with_numbers[1]) > _count_images(candidates):
            rule, candidates = with_numbers
    more = _more_masks(candidates, numbered)
    united = _all_masks(more)
    n_images, n_masks = len(images) - len(united & shared), len(masks) - len(united)
    enough = n_images / 4 if shared else min(n_images, n_masks) / 2
    if not candidates or len(candidates) < enough:
        used = _all_masks(candidates)
        mask = next((mask for mask in masks if mask not in used), masks[0])
        image = next(image for image in images if image not in candidates)
        raise ValueError(
            f"{mask_root}: no rule pairs its {len(masks)} masks, such as {mask.name}, with "
            f"the {len(images)} images, such as {image.name}: give a mask its image's name, "
            "or that name and an ending"
        )
    return _sort_out("name" if rule == "path" else rule, images, masks, candidates, more)


def _best_rule(images, masks, roots, shared):
    """(rule, {image: masks}) of the rule that finds a mask for most images."""
    rules = []
    if not shared:
        rules.append(("path", _by_key(images, masks, *roots)))
        rules.append(("name", _by_key(images, masks)))
    rules.append(("the part that their names share", _by_shared_part(images, masks, shared)))
    return max(rules, key=lambda named: len(named[1]))


def _all_masks(masks_of):
    """The set of the masks in {image: masks}."""
    return set(chain.from_iterable(masks_of.values()))


def _count_images(candidates):
    """How many images have a mask, without those that are masks themselves."""
    return len(candidates.keys() - _all_masks(candidates))


def _sort_out(rule, images, masks, candidates, more):
    """The Pairing of {image: masks that a rule found} and {image: masks to be united with it}."""
    pairing = Pairing(rule)
    users = Counter(chain.from_iterable(candidates.values()))
    used = users.keys() | _all_masks(more)
    for image in images:
        own, numbered = candidates.get(image, []), more.get(image, [])
        if len(own) == 1 and users[own[0]] == 1:
            pairing.pairs.append((image, (*own, *numbered)))
        elif own:
            pairing.several.append((image, [*own, *numbered]))
        elif image not in used:
            pairing.missing.append(image)
    used |= set(images)
    pairing.surplus = [mask for mask in masks if mask not in used]
    return pairing


def stem(path):
    """The name of a file without its suffix, as it is compared."""
    return _comparable(base_name(path))


def _comparable(name):
    """A name in lower case and one Unicode form."""
    return same_form(same_form(name).casefold())


def _by_key(images, masks, image_root=None, mask_root=None):
    """{image: masks} of equal stems; with roots, of equal paths below them too."""

    def key(path, root):
        folders = path.relative_to(root).parent.parts if root else ()
        return (*map(_comparable, folders), stem(path))

    table = {}
    for mask in masks:
        table.setdefault(key(mask, mask_root), []).append(mask)
    keyed = ((image, key(image, image_root)) for image in images)
    return {image: table[name] for image, name in keyed if name in table}


# ---------------------------------------------------------------- several masks of one image


def _numbered(masks):
    """{mask: the mask beside it that has its name without the number at the end}."""
    by_name = {(mask.parent, stem(mask)): mask for mask in masks}
    plain_of = {}
    for mask in masks:
        name = NUMBERED.fullmatch(stem(mask))
        if name and (mask.parent, name[1]) in by_name:
            plain_of[mask] = by_name[mask.parent, name[1]]
    return plain_of


def _more_masks(candidates, numbered):
    """{image: the numbered masks that belong to it beside the mask that a rule found}.

    Where a mask ends as its image does (a and a, img_1 and mask_1), one with a number more could
    be the mask of an image that is missing (a_1, img_1_1), and belongs to none.
    """
    owners = {mask: image for image, masks in candidates.items() for mask in masks}
    more = {}
    for mask, plain in numbered.items():
        image = owners.get(plain)
        if image is None or mask in owners:
            continue
        if _last_word(plain) != _last_word(image):
            more.setdefault(image, []).append(mask)
    return more


def _last_word(path):
    """The last word or number in the name of a file: 'mask' of 'benign (1)_mask.png'."""
    match = LAST_WORD.search(stem(path))
    return match and match[1]


# ---------------------------------------------------------------- the part that names share


def _by_shared_part(images, masks, shared):
    """{image: masks} of the pair of ends, or of beginnings, that pairs most images.

    Where several pair as many, the candidates of all.
    """
    most, best = 0, []
    for split_name in (_endings, _beginnings):
        image_cores, mask_cores = _cores(images, split_name), _cores(masks, split_name)
        for image_rest, images_of in image_cores.items():
            if shared and image_rest:
                continue  # else x_mask could be the image of x
            for mask_rest, masks_of in mask_cores.items():
                cores = images_of.keys() & masks_of.keys()
                if image_rest == mask_rest or not _is_credible(image_rest, cores, images):
                    continue
                paired = sum(len(images_of[core]) for core in cores)
                if paired > most:
                    most, best = paired, []
                if paired == most:
                    best.append((cores, images_of, masks_of))
    candidates = {}
    for cores, images_of, masks_of in best:
        for core in cores:
            for image in images_of[core]:
                candidates.setdefault(image, set()).update(masks_of[core])
    return {image: sorted(masks) for image, masks in candidates.items()}


def _is_credible(image_rest, cores, images):
    """Whether what ends the images' names may be cut off: a number only where most have it.

    Without this, scan_5 would be the image of scan_7_mask.
    """
    numbered = any(character.isdigit() for character in image_rest)
    return not numbered or (len(cores) > 1 and 2 * len(cores) >= len(images))


def _cores(paths, split_name):
    """{rest: {core: paths}} of the commonest rests of the paths' names."""
    names = {path: list(split_name(stem(path))) for path in paths}
    counts = Counter(rest for splits in names.values() for _, rest in splits)
    kept = {rest: {} for rest, _ in counts.most_common(COMMONEST)} | {"": {}}
    for path, splits in names.items():
        for core, rest in splits:
            if rest in kept:
                kept[rest].setdefault(core, []).append(path)
    return kept


def _endings(name):
    """('21', '_training') and every other (core, rest) of '21_training'; ('21_training', '')."""
    yield name, ""
    for place in range(1, len(name)):
        if not name[place].isalnum() or _digits_border(name, place):
            yield name[:place], name[place:]


def _beginnings(name):
    """('1', 'img_') and every other (core, rest) of 'img_1'; ('img_1', '')."""
    yield name, ""
    for place in range(1, len(name)):
        if not name[place - 1].isalnum() or _digits_border(name, place):
            yield name[place:], name[:place]


def _digits_border(name, place):
    """Whether a number begins or ends at this place, beside a letter."""
    before, after = name[place - 1], name[place]
    return before.isalnum() and after.isalnum() and before.isdigit() != after.isdigit()
