"""download.py --masks: links, classes by the names of files, patients, and what is refused."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ALL,
    PHOTO,
    annotations,
    class_names,
    grey,
    labels,
    photo,
    refuse_download,
    run_download,
    save,
    stored,
    write_nifti,
)
from numpy.testing import assert_array_equal

VOXELS = (8, 6, 5)  # cut across the last axis
SCANS = ("--masks", "S/{id}/ct.nii.gz", "S/{id}/segmentations/{class}.nii.gz", *ALL)
LESIONS = ("--masks", "fundus/{id}.jpg", "truth/{class}/{id}_*.tif", *ALL)
CLASSES = ("--masks", "scans/{id}.png", "classes/{id}_{class}.png", *ALL)


def image(path, seed=0):
    save(photo(seed), path)


def mask(path, seed):
    """Write a mask; returns it."""
    label_map = labels(seed)
    save(grey([0, 255])(label_map), path)
    return label_map == 1


def volume(path, seed, values=2):
    """Write a volume of `values` numbers; returns it."""
    voxels = np.random.default_rng(seed).integers(0, values, VOXELS).astype(np.int16)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, voxels, zooms=(1, 1, 3))
    return voxels


def compare(wanted):
    """The data set holds these images, {stem: {class: mask}}."""
    found = stored()
    assert {stem: set(own) for stem, own in found.items()} == {k: set(v) for k, v in wanted.items()}
    for stem, masks in wanted.items():
        for name, drawn in masks.items():
            assert_array_equal(found[stem][name], drawn, f"{stem}, {name}")


def lesions():
    """A folder for each class, with endings of its own, of which an image may lack one."""
    wanted = {"IDRiD_1": {}, "IDRiD_2": {}}
    for number, (folder, end) in enumerate((("1. MA", "_MA"), ("2. HE", "_HE"), ("5. OD", "_OD"))):
        for stem in list(wanted)[number % 2 :]:
            image(f"fundus/{stem}.jpg")
            wanted[stem][folder] = mask(f"truth/{folder}/{stem}{end}.tif", number)
    return wanted


def axons(more=()):
    """A file for each class, which may overlap; `more` images have none."""
    wanted = {"1": {}, "2": {}} | {stem: {} for stem in more}
    for number, (stem, name) in enumerate((("1", "axon"), ("1", "myelin"), ("2", "myelin"))):
        wanted[stem][name] = mask(f"classes/{stem}_{name}.png", number)
    for stem in wanted:
        image(f"scans/{stem}.png")
    assert (wanted["1"]["axon"] & wanted["1"]["myelin"]).any()
    return wanted


def scans(organs):
    """TotalSegmentator: a folder for each scan, with a volume for each of the organs."""
    wanted = {}
    for number in range(2):
        volume(f"S/s{number}/ct.nii.gz", number, 900)
        masks = {
            organ: volume(f"S/s{number}/segmentations/{organ}.nii.gz", 200 * number + seed)
            for seed, organ in enumerate(organs)
        }
        for z in range(VOXELS[2]):
            own = {organ: voxels[..., z] > 0 for organ, voxels in masks.items()}
            wanted[f"s{number}_z{z:03}"] = {organ: one for organ, one in own.items() if one.any()}
    return wanted


def test_folders_that_are_links_are_followed(here):
    wanted = {}
    for number, patient in enumerate(("p0", "p1", "p2")):
        for side, write in (("images", image), ("masks", mask)):
            place = Path(side) if patient == "p0" else Path("store", side)
            wanted[f"{patient}_a"] = {"foreground": write(place / patient / "a.png", number)}
            if patient != "p0":
                Path(side, patient).symlink_to(Path("..", "store", side, patient))
    for side in ("images", "masks"):
        Path(side, "p0", "up").symlink_to("..")  # in a circle
    for ways in (("images", "masks"), ("images/{n}/{id}.png", "masks/{n}/{id}.png")):
        run_download("--masks", *ways, *ALL, "--force")
        compare(wanted)


def test_classes_are_those_of_the_file_names(here):
    wanted = lesions()
    run_download(*LESIONS)
    assert class_names() == ["1. MA", "2. HE", "5. OD"]
    compare(wanted)
    run_download(*LESIONS, "--force", "--classes", "5. OD,1. MA", "--skip-unpaired")
    assert class_names() == ["5. OD", "1. MA"]
    refuse_download(*LESIONS, "--force", "--classes", "OD", words=["OD"])
    wanted = axons()
    run_download(*CLASSES, "--force")
    compare(wanted)


def test_a_class_may_be_empty_in_all_of_its_files(here):
    wanted = scans([f"organ_{number:03}" for number in range(99)])
    for number in range(2):
        volume(f"S/s{number}/segmentations/aorta.nii.gz", 1, 1)
    run_download(*SCANS)
    assert class_names()[:2] == ["aorta", "organ_000"] and len(class_names()) == 100
    compare(wanted)


def test_all_values_of_a_file_are_its_class(here):
    """Also three hundred numbers of objects, and what is background with --invert."""
    numbers = np.arange(300, dtype=np.uint16).repeat(4).reshape(PHOTO[::-1])
    image("scans/1.png")
    save(grey(range(300), np.uint16)(numbers), "classes/1_cells.png")
    drawn = mask("classes/1_wall.png", 1)
    run_download(*CLASSES)
    assert_array_equal(stored()["1"]["cells"], numbers > 0)
    run_download(*CLASSES, "--classes", "wall", "--force", "--invert")
    assert_array_equal(stored()["1"]["wall"], ~drawn)
    refuse_download(*CLASSES, "--force", "--classes", "1=cell", words=["--classes"])


def test_subjects_of_bids_stay_together(here):
    for number in (1, 2):
        subject = f"sub-0{number}"
        volume(f"bids/{subject}/anat/{subject}_T1w.nii.gz", number, 900)
        volume(f"bids/derivatives/{subject}/anat/{subject}_T1w_mask.nii.gz", number)
    sides = "bids/sub-*/**/{id}_T1w.nii.gz", "bids/derivatives/**/{id}_T1w_*mask.nii.gz"
    assert "2 subjects" in run_download("--masks", *sides, "--split", 50, 50, 0)
    for split in ("train", "valid"):
        assert len({record["group"] for record in annotations(split)["images"]}) == 1


@pytest.mark.parametrize(
    "image_path, mask_path, sides, advice",
    [
        ("k/{}/{}.png", "k/{}/{}_m.png", "k/*/{id}.png k/*/{id}_m.png", "k/{group}/{id}.png"),
        ("i/{}/{}.png", "m/{}/{}.png", "i m", "i/{group}/{id}.png"),
        ("i/{}/{}.png", "m/all/{1}.png", "i/*/{id}.png m/*/{id}.png", "i/{group}/{id}.png"),
        ("i/{}/{}.png", "m/{}/{}.png", "i/{n}/{id}.png m/{n}/{id}.png", "i/{group}/{id}.png"),
        ("i/{}_{}.png", "m/{}_{}.png", "i m", "i/{group}_{id}.png"),
    ],
)
def test_images_that_look_like_slices_of_patients_are_told(
    here, image_path, mask_path, sides, advice
):
    """The line names a pattern that keeps them together, and it does."""
    for number in range(18):
        names = f"p{number % 6}", f"{number:02}"
        image(image_path.format(*names), number)
        mask(mask_path.format(*names), number)
    out = run_download("--masks", *sides.split(" "))
    (line,) = (line for line in out.splitlines() if line.startswith("note: "))
    assert "18 images are of 6" in line and f"'{advice}'" in line
    words = shlex.split(line.partition(" in one by ")[2])
    out = run_download(*words, "--force")
    assert "groups: 6" in out and "note: " not in out
    assert annotations("train")["images"][0]["group"][0] == "p"


def test_images_without_a_mask_are_empty_where_a_flag_says_so(here):
    wanted = axons(["3"])
    refuse_download(*CLASSES, words=["1 of 3", "scans/3.png", "--skip-unpaired"])
    assert "empty: 1 of 3" in run_download(*CLASSES, "--empty-unmasked")
    compare(wanted)
    wanted = scans(["liver", "spleen"])
    for organ in ("liver", "spleen"):
        Path(f"S/s1/segmentations/{organ}.nii.gz").unlink()
    run_download(*SCANS, "--empty-unmasked", "--force")
    compare({name: own if name[:2] == "s0" else {} for name, own in wanted.items()})
    refuse_download("--labelme", "x", "--empty-unmasked", words=["--empty-unmasked"])


REFUSED = {  # the arguments of --masks, what the message names
    "wbc": ["wbc", "two"],
    "wbc/001.bmp wbc/002.bmp wbc/001.png": ["3 names", "quotes"],
    "wbc/{id}.gif wbc/{id}.png": ["wbc/{id}.gif", "3 .png"],
    "wbc/{id}.bmp wcb/{id}.png": ["wcb/{id}.png", "such as S"],
    "wbc wbc/001.tif": ["wbc/001.tif: no such"],
    "wbc wbc/001.png": ["wbc and wbc/001.png"],
    "wbc wbc": ["wbc", "same files"],
    "wbc/{id}.png wbc/{id}.png": ["wbc/{id}.png", "same files"],
    "wbc/*.bmp wbc/*.png": ["wbc/*.bmp", "{id}"],
    "wbc/{id}.bmp wbc/{id}{part}.png": ["two placeholders"],
    "chase/{id}.jpg chase/{id}_*.png": ["_1stHO.png", "_2ndHO.png"],
    "S/00{id}/ct.nii.gz wbc/00{id}.png --skip-unpaired": ["wbc/001.png"],
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_wrong_input_is_one_line_and_writes_nothing(here, arguments):
    for number in (1, 2, 3):
        image(f"wbc/00{number}.bmp", number)
        mask(f"wbc/00{number}.png", number)
    image("chase/x.jpg")
    mask("chase/x_1stHO.png", 1)
    mask("chase/x_2ndHO.png", 2)
    volume("S/001/ct.nii.gz", 1)
    refuse_download("--masks", *arguments.split(" "), *ALL, words=REFUSED[arguments])
