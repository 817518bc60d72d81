"""Which mask belongs to which image, found from their names."""

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from os.path import commonprefix

from medseg.files import base_name
from medseg.sources.collect import same_form

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


def pair_files(images, masks, place, *, one_class=False):
    """The Pairing of two {Path: key}, where a key is a tuple of text: see `FileSet`.

    Names are compared without case and suffix, in one Unicode form. The rules that are tried: the
    same key, which below two folders is the same path; the same name; names that share a beginning,
    where all images go on in one way and all masks in another (x and x_mask, 21_training and
    21_manual1), or an end (img_1, mask_1); at last, keys that share a beginning which no other
    image has, such as a folder. The rule that finds a mask for most images is taken, of equal ones
    the first. Where two rules of the third kind find different masks for as many images (x_reader1,
    x_reader2), both are candidates. An image's mask and the same name with a number (x_mask,
    x_mask_1, x_mask_2) are its masks together, and so are the masks of a folder, unless their names
    are those of other images' masks too (reader_a, reader_b).
    place: of the masks, for messages. one_class: all masks show one class, and those that a rule
    finds for an image are its masks together. Of rules for as many images, that of most masks is
    taken then.
    Raises ValueError where no rule finds a mask for half the images.
    """
    shared = set(images) & set(masks)  # the same files: only names tell them apart
    numbered = _numbered(masks, one_class)
    plain = {mask: key for mask, key in masks.items() if mask not in numbered}
    rule, candidates = _best_rule(images, plain, shared)
    if numbered:  # the images may be numbered in the same way: a and a_1
        with_numbers = _best_rule(images, masks, shared)
        if _count_images(with_numbers[1]) > _count_images(candidates):
            rule, candidates = with_numbers
    more = _more_masks(candidates, numbered)
    together = one_class
    enough = _is_enough(candidates, _all_masks(more), images, masks, shared)
    if not shared and (one_class or not enough):
        by_folder = _by_folder(images, masks)
        others = {mask for found in by_folder.values() for mask in found[1:]}
        better = _count_both(by_folder) > _count_both(candidates, more)
        if better and _is_enough(by_folder, others, images, masks, shared):
            rule, candidates, more, enough = "folder", by_folder, {}, True
            together = one_class or not _names_recur(by_folder)
    candidates = _to_nearest(candidates, images, masks)
    if not enough:
        raise ValueError(_describe_no_rule(images, masks, place, candidates, shared))
    return _sort_out(rule, images, masks, candidates, more, together)


def _is_enough(candidates, others, images, masks, shared):
    """Whether a rule found a mask for half the images, or for as many as there are masks for.

    others: masks that are united with one that a rule found.
    """
    n_images, n_masks = len(images) - len(others & shared), len(masks) - len(others)
    enough = n_images / 4 if shared else min(n_images, n_masks) / 2
    return bool(candidates) and len(candidates) >= enough


def _describe_no_rule(images, masks, place, candidates, shared):
    """The message where no rule found enough."""
    used = _all_masks(candidates)
    mask = next((mask for mask in masks if mask not in used), next(iter(masks)))
    image = next((image for image in images if image not in candidates), next(iter(images)))
    if len(shared) == len(images) == len(masks):
        return (
            f"{place}: no rule tells which of its {len(images)} files, such as {image.name}, are "
            "masks: name images and masks apart, as in --masks 'scans/*.jpg' 'scans/*_mask.png'"
        )
    return (
        f"{place}: no rule pairs its {len(masks)} masks, such as {mask.name}, with the "
        f"{len(images)} images, such as {image.name}: give a mask its image's name, or that name "
        "and an ending, or a folder for each image"
    )


def _best_rule(images, masks, shared):
    """(rule, {image: masks}) of the rule that finds a mask for most images."""
    rules = []
    if not shared:
        by_key = _by_key(images, masks)
        same_names = all(stem(image) == stem(found[0]) for image, found in by_key.items())
        rules.append(("name" if same_names else "what * matches", by_key))
        by_name = ({path: (stem(path),) for path in side} for side in (images, masks))
        rules.append(("name", _by_key(*by_name)))
    rules.append(("the part that their names share", _by_shared_part(images, masks, shared)))
    return max(rules, key=lambda named: len(named[1]))


def _all_masks(masks_of):
    """The set of the masks in {image: masks}."""
    return set(chain.from_iterable(masks_of.values()))


def _count_images(candidates):
    """How many images have a mask, without those that are masks themselves."""
    return len(candidates.keys() - _all_masks(candidates))


def _count_both(*found):
    """(images, masks) in dicts of {image: masks}."""
    return len(set().union(*found)), len(set().union(*map(_all_masks, found)))


def _to_nearest(candidates, image_keys, mask_keys):
    """{image: masks} in which a mask that was found for several images is the nearest one's.

    That is the one whose key begins as the mask's does (p/scan and p/scan_mask, beside q/scan), or
    whose folders do (train/images/0 and train/masks/0); all where several do equally.
    """

    keys = {path: tuple(map(_comparable, key)) for path, key in (image_keys | mask_keys).items()}

    def nearness(image, mask):
        folders = image.parent.parts, mask.parent.parts
        return len(commonprefix([keys[image], keys[mask]])), len(commonprefix(folders))

    images_of = {}
    for image, masks in candidates.items():
        for mask in masks:
            images_of.setdefault(mask, []).append(image)
    for mask, images in images_of.items():
        if len(images) > 1:
            found = {image: nearness(image, mask) for image in images}
            most = max(found.values())
            images_of[mask] = {image for image in images if found[image] == most}
    kept = {
        image: [m for m in masks if image in images_of[m]] for image, masks in candidates.items()
    }
    return {image: masks for image, masks in kept.items() if masks}


def _sort_out(rule, images, masks, candidates, more, together):
    """The Pairing of {image: masks that a rule found} and {image: masks to be united with it}.

    together: all masks that the rule found for an image are united.
    """
    pairing = Pairing(rule)
    users = Counter(chain.from_iterable(candidates.values()))
    used = users.keys() | _all_masks(more)
    for image in images:
        own, numbered = candidates.get(image, []), more.get(image, [])
        if own and (together or len(own) == 1) and all(users[mask] == 1 for mask in own):
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


def _by_key(images, masks):
    """{image: masks} of equal keys, of two {Path: key}."""
    table = {}
    for mask, key in masks.items():
        table.setdefault(tuple(map(_comparable, key)), []).append(mask)
    keyed = ((image, tuple(map(_comparable, key))) for image, key in images.items())
    return {image: table[key] for image, key in keyed if key in table}


# ---------------------------------------------------------------- several masks of one image


def _numbered(masks, one_class):
    """{mask: the mask beside it that has its name without the number at the end}.

    one_class: where there is none, as where masks are counted from x_0, the first of the number.
    """
    by_name = {(mask.parent, stem(mask)): mask for mask in masks}
    plain_of = {}
    for mask in masks:
        name = NUMBERED.fullmatch(stem(mask))
        if name and one_class:
            by_name.setdefault((mask.parent, name[1]), mask)
        if name and by_name.get((mask.parent, name[1]), mask) != mask:
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


# ---------------------------------------------------------------- a folder for each image


def _by_folder(images, masks):
    """{image: masks} of keys that begin alike, in a way that no other image's key begins."""
    best = {}
    for length in range(min(map(len, images.values())), 0, -1):
        image_keys, mask_keys = (
            {path: key[:length] for path, key in side.items() if len(key) >= length}
            for side in (images, masks)
        )
        owners = Counter(tuple(map(_comparable, key)) for key in image_keys.values())
        found = {
            image: own
            for image, own in _by_key(image_keys, mask_keys).items()
            if owners[tuple(map(_comparable, image_keys[image]))] == 1
        }
        best = max(best, found, key=len)
    return best


def _names_recur(candidates):
    """Whether names tell the masks of an image apart: classes, or readers, and no mere numbers.

    They do where a name, but for its digits, is there for two images beside another, and where
    all images have masks of the same names.
    """
    words = [{re.sub(r"\d", "", stem(mask)) for mask in own} for own in candidates.values()]
    counts = Counter(chain.from_iterable(words))
    for own in words:
        if len(own) > 1 and (len(words) == 1 or any(counts[word] > 1 for word in own)):
            return True
    names = {frozenset(map(stem, own)) for own in candidates.values()}
    first = next(iter(names))
    return len(names) == 1 and len(first) > 1 and not all(name.isdigit() for name in first)


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
