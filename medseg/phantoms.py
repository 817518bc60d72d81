"""Phantoms: drawn slices that look like brain MRI, with the outlines of their lesions.

They stand in for the real data in tests and first runs. The task is not solved by a threshold:
vessels, scalp and ventricles share the lesions' brightness.
"""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from medseg.coco import ANNOTATIONS, SPLITS
from medseg.dataset_folder import install
from medseg.splits import present_splits, read_splits

PHANTOM = "phantoms made by download.py"  # in info.description of every phantom split
COUNTS = (400, 100, 100)  # images in train, valid and test
DARK_SHARE = 0.12  # of the lesions, of one class

# In what follows, (u, v) are head coordinates: (size, size) float32 arrays in which the head is
# about the unit circle; rho is the distance from its centre, made slightly irregular. Every scalar
# is a Python float: a numpy one would turn the float32 arrays into float64. The order of the
# random draws is part of the result: a seed keeps giving the same images only if it stays.


def is_phantom(splits):
    """Whether any of {split: annotations} was drawn by `make_phantoms`."""
    return any(PHANTOM in str(coco.get("info")) for coco in splits.values())


def make_phantoms(root, counts=COUNTS, size=256, seed=0, *, force=False, two_classes=False):
    """Write phantoms as root/{train,valid,test}, JPEGs with COCO polygons, and return `root`.

    counts: images in each split; size: pixels a side. two_classes: "bright" and "dark" lesions in
    equal numbers, instead of one class "tumour". The n-th image of a split depends on `seed`,
    `size` and `two_classes` alone. Phantoms of the same counts, size, seed and classes are kept as
    they are. Raises ValueError if `root` holds other splits, unless `force` says to replace them.
    """
    root = Path(root)
    classes = ", two classes" if two_classes else ""
    wanted = f"{' + '.join(map(str, counts))} {PHANTOM}, size {size}, seed {seed}{classes}"
    info = {"description": wanted}
    if present_splits(root) and not force:
        with contextlib.suppress(ValueError):  # an incomplete split is something else
            if all(coco.get("info") == info for coco in read_splits(root, damaged=[]).values()):
                return root
        raise ValueError(f"{root} holds something else than the {wanted}")

    def write_splits(folder):
        for number, (split, count) in enumerate(zip(SPLITS, counts, strict=True)):
            lists = write_images(folder / split, number, count, size, seed, two_classes)
            (folder / split / ANNOTATIONS).write_text(json.dumps({"info": info, **lists}))

    install(root, write_splits)
    return root


def write_images(folder, split_number, count, size, seed, two_classes):
    """Write `count` phantoms as JPEGs into the new `folder`; return their COCO lists as a dict."""
    folder.mkdir()
    images, annotations = [], []
    for index in tqdm(range(count), f"phantoms, {folder.name}", unit="image", disable=None):
        rng = np.random.default_rng((seed, split_number, index))
        pixels, lesions = draw_phantom(rng, size, dark_share=0.5 if two_classes else DARK_SHARE)
        name = f"{10_000 * split_number + index}_phantom.jpg"  # a slice number, as in the real data
        Image.fromarray(pixels).convert("RGB").save(folder / name, quality=92)
        images.append({"id": index, "file_name": name, "width": size, "height": size})
        for outline, dark in lesions:
            ids = {"id": len(annotations) + 1, "image_id": index}
            ids["category_id"] = 2 if two_classes and dark else 1
            annotations.append(to_coco(outline, **ids))
    names = ("bright", "dark") if two_classes else ("tumour",)
    more = {"supercategory": "none"}
    categories = [{"id": number, "name": name, **more} for number, name in enumerate(names, 1)]
    return {"categories": categories, "images": images, "annotations": annotations}


def to_coco(outline, **ids):
    """The COCO annotation of one outline, an array (K, 2) of x and y in pixels."""
    x, y = outline.round(2).T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2  # the shoelace formula
    box = [round(float(side), 2) for side in (x.min(), y.min(), np.ptp(x), np.ptp(y))]
    polygon = [np.stack([x, y], axis=1).ravel().tolist()]
    return {
        **ids,
        "segmentation": polygon,
        "bbox": box,
        "area": round(float(area), 2),
        "iscrowd": 0,
    }


# ---------------------------------------------------------------- drawing


def draw_phantom(rng, size, dark_share=DARK_SHARE):
    """One slice: a uint8 array (size, size), and its lesions as (outline, whether it is dark).

    rng: a numpy Generator. Outlines are arrays (K, 2) of x and y in pixels.
    """
    head_to_image, u, v, rho = head_coordinates(rng, size)
    image, base = draw_tissue(rng, u, v, rho)
    draw_ventricles(rng, image, u, v)
    lesions = []
    for outline in draw_outlines(rng, size, head_to_image):
        dark = draw_lesion(rng, image, outline, base, dark_share)
        lesions.append((outline, dark))
    draw_vessels(rng, image, u, v)
    draw_skull(rng, image, rho)
    return scan(rng, image), lesions


def smooth_noise(rng, cells, size):
    """(size, size) float32 noise of about unit deviation with `cells` bumps a side."""
    grid = Image.fromarray(rng.standard_normal((cells + 3, cells + 3), dtype=np.float32))
    box = (1.5, 1.5, cells + 1.5, cells + 1.5)  # without the border, which bicubic would repeat
    return 1.4 * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC, box=box))


def ramp(x, width):
    """0 where x is below -width/2, 1 above +width/2, linear between."""
    return np.clip(x / width + 0.5, 0, 1)


def head_coordinates(rng, size):
    """(head_to_image, u, v, rho) of a head that is turned and stretched at random.

    head_to_image: (2, 2) array that maps (u, v) to image coordinates, [-1, 1] on either axis.
    """
    angle = rng.normal(0, 0.15)  # radians
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    head_to_image = rotation * rng.uniform([0.68, 0.82], [0.84, 0.94])  # half-width, half-height
    axis = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    inverse = np.linalg.inv(head_to_image).astype(np.float32)
    u = inverse[0, 0] * axis + inverse[0, 1] * axis[:, None]
    v = inverse[1, 0] * axis + inverse[1, 1] * axis[:, None]
    rho = np.hypot(u, v) * (1 + 0.02 * smooth_noise(rng, 3, size))
    return head_to_image, u, v, rho


def draw_tissue(rng, u, v, rho):
    """A new image of brain tissue, float32 (size, size), and the brightness of its grey matter.

    White matter is inside, grey matter towards the edge; the folds and the gap between the two
    hemispheres are dark.
    """
    size = len(u)
    folds = np.abs(smooth_noise(rng, 14, size))
    white = ramp(0.62 - rho + 0.12 * smooth_noise(rng, 9, size), 0.15)
    base, contrast = rng.uniform(0.36, 0.5), rng.uniform(-0.1, 0.12)
    image = base + contrast * white + 0.02 * smooth_noise(rng, 40, size)
    image -= 0.24 * ramp(0.16 - folds, 0.2) * ramp(rho - rng.uniform(0.4, 0.6), 0.25)
    gap = ramp(0.018 - np.abs(u + 0.01 * smooth_noise(rng, 4, size)), 0.02)
    image -= 0.2 * gap * ramp(np.abs(v) - 0.35, 0.1)
    return image, base


def draw_ventricles(rng, image, u, v):
    """Draw two mirrored crescents into `image`, as dark or as bright as a lesion."""
    fluid = (0.1 if rng.random() < 0.65 else 0.78) + rng.normal(0, 0.04)
    distance, width = rng.uniform(0.08, 0.14), rng.uniform(0.035, 0.075)
    length = rng.uniform(0.2, 0.34)
    bend = distance + 0.25 * (v / length) ** 2 * distance
    ventricles = ramp(1 - np.hypot((np.abs(u) - bend) / width, (v + 0.02) / length), 0.3)
    image += (fluid - image) * ventricles


def draw_outlines(rng, size, head_to_image):
    """Outlines of 0 to 3 irregular, disjoint lesions inside the brain, arrays (32, 2) in pixels."""
    outlines, circles = [], []
    for _ in range(rng.choice(4, p=[0.15, 0.67, 0.13, 0.05])):
        for _ in range(20):  # attempts to find a place
            radius = rng.uniform(0.15, 0.33) * (0.75 if circles else 1)  # 1 is half the image
            distance = rng.uniform(0.2, 0.88 - radius / 0.75)
            angle = rng.uniform(0, 2 * np.pi)
            centre = head_to_image @ [distance * np.cos(angle), distance * np.sin(angle)]
            if all(np.hypot(*(centre - c)) > 1.4 * (radius + r) for c, r in circles):
                break
        else:
            break
        circles.append((centre, radius))
        angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        wave = 0
        for k in range(2, 6):
            amplitude = rng.normal(0, 0.22 / k)
            wave = wave + amplitude * np.cos(k * angles + rng.uniform(0, 2 * np.pi))
        shape = radius * np.clip(1 + wave, 0.6, 1.4) * np.array([np.cos(angles), np.sin(angles)])
        outlines.append((centre[:, None] + shape).T * size / 2 + size / 2)
    return outlines


def draw_lesion(rng, image, outline, base, dark_share):
    """Draw one lesion into `image`: bright, or dark with a bright rim. Returns whether it is dark.

    It has a soft edge, a texture of its own and a faint halo of swollen tissue.
    """
    size = len(image)
    mask = Image.new("L", (size, size))
    # In PIL the centres of the pixels have whole coordinates.
    ImageDraw.Draw(mask).polygon([tuple(point) for point in outline - 0.5], fill=255)
    edge, halo = (
        np.asarray(mask.filter(ImageFilter.BoxBlur(size * radius)), np.float32) / 255
        for radius in (0.007, 0.05)
    )
    dark = rng.random() < dark_share
    change = (-1 if dark else 1) * rng.uniform(0.26, 0.38)
    inside = base + change + 0.07 * smooth_noise(rng, 22, size)
    rim = 0.7 if dark else rng.uniform(-0.2, 0.2)  # dark cores have rims, as under contrast agent
    inside += rim * ramp(0.8 - halo, 0.3)
    image += 0.15 * change * halo
    image += (inside - image) * edge
    return dark


def draw_vessels(rng, image, u, v):
    """Draw small bright spots into `image`."""
    squared_distance = np.float32(1)  # to the nearest vessel
    for _ in range(rng.integers(2, 7)):
        distance, angle = rng.uniform(0.15, 0.8), rng.uniform(0, 2 * np.pi)
        x, y = distance * math.cos(angle), distance * math.sin(angle)
        squared_distance = np.minimum(squared_distance, (u - x) ** 2 + (v - y) ** 2)
    brightness = rng.uniform(0.65, 0.9)
    spots = ramp(rng.uniform(0.02, 0.035) - np.sqrt(squared_distance), 0.03)
    image += (brightness - image) * spots


def draw_skull(rng, image, rho):
    """Draw what surrounds the brain into `image`: dark bone, bright scalp, then air."""
    scalp = rng.uniform(0.6, 0.95)
    image *= ramp(rng.uniform(0.84, 0.88) - rho, 0.03)
    texture = 0.08 * smooth_noise(rng, 20, len(image))
    image += (scalp + texture) * ramp(rho - rng.uniform(0.91, 0.94), 0.03)
    image *= ramp(1 - rho, 0.02)


def scan(rng, image):
    """What the scanner records, as uint8: a bias field, and Rician noise.

    The noise is on the two channels of the signal, whose magnitude is shown.
    """
    size = len(image)
    image *= rng.uniform(0.85, 1.1) * (1 + 0.08 * smooth_noise(rng, 2, size))
    noise = rng.uniform(0.012, 0.035) * rng.standard_normal((2, size, size), dtype=np.float32)
    real, imaginary = noise
    image = np.hypot(image + real, imaginary)
    return (255 * np.clip(image, 0, 1)).astype(np.uint8)
