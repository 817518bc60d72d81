"""download.py --masks on folders as their authors lay them out: patterns, classes by file name."""

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
    tree,
    write_nifti,
)
from numpy.testing import assert_array_equal

NFC, NFD = "Läsion", "La\u0308sion"
VOXELS = (8, 6, 5)  # cut across the last axis


def image(path, seed=0):
    save(photo(seed), path)


def mask(path, seed, values=(0, 255)):
    """Write a mask of one class, or of a class for each value; returns its label map."""
    label_map = labels(seed, len(values) - 1)
    save(grey(values)(label_map), path)
    return label_map if values[2:] else label_map == 1


def volume(path, seed, values=2):
    """Write a volume of `values` numbers; returns it."""
    voxels = np.random.default_rng(seed).integers(0, values, VOXELS).astype(np.int16)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, voxels, zooms=(1, 1, 3))
    return voxels


def slices(name, **masks):
    """What a volume becomes: {stem: {class: mask}}, without empty masks."""
    return {
        f"{name}_z{index:03}": {
            key: voxels[..., index] > 0 for key, voxels in masks.items() if voxels[..., index].any()
        }
        for index in range(VOXELS[2])
    }


@pytest.mark.parametrize("ways", [("images", "masks"), ("images/**/*.png", "masks/**/*.png")])
def test_folders_that_are_links_are_followed(tmp_path, monkeypatch, ways):
    monkeypatch.chdir(tmp_path)
    maps = {}
    for number, patient in enumerate(("p0", "p1", "p2")):
        for side, write in (("images", image), ("masks", mask)):
            place = Path(side) if patient == "p0" else Path("store", side)
            maps[f"{patient}_a"] = write(place / patient / "a.png", number)
            if patient != "p0":
                Path(side, patient).symlink_to(Path("..", "store", side, patient))
    for side in ("images", "masks"):
        Path(side, "p0", "up").symlink_to("..")  # in a circle
        Path(side, "again").symlink_to("p0")  # the same once more
    run_download("--masks", *ways, *ALL)
    assert stored().keys() == maps.keys()
    for name, label_map in maps.items():
        assert_array_equal(stored()[name]["foreground"], label_map)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_pictures_that_are_made_of_the_images_lie_beside_them(here, suffix):
    """ISIC 2017: the message names the pattern that tells them apart, and it works."""
    maps = {}
    for number in range(3):
        image(f"data/S_{number}.jpg", number)
        image(f"data/S_{number}_superpixels{suffix}", number)
        maps[f"S_{number}"] = mask(f"truth/S_{number}_segmentation.png", number)
    line = refuse_download("--masks", "data", "truth", *ALL, words=["data/"])
    run_download("--masks", line.split("'")[-2], "truth", *ALL)
    assert stored().keys() == maps.keys()
    for name, label_map in maps.items():
        assert_array_equal(stored()[name]["foreground"], label_map)


def wbc():
    """The same names, and suffixes that tell images from masks."""
    maps = {}
    for number in (1, 2, 3):
        image(f"wbc/00{number}.bmp", number)
        maps[f"00{number}"] = mask(f"wbc/00{number}.png", number, (0, 128, 255))
    return {stem: {"128": one == 1, "255": one == 2} for stem, one in maps.items()}


def dsb():
    """A folder for each image, with a mask for each nucleus, of a random name."""
    wanted = {}
    for number, name in enumerate(("0a7e06", "0acd2c", "f4")):
        image(f"stage1_train/{name}/images/{name}.png", number)
        nuclei = [
            mask(f"stage1_train/{name}/masks/{hash((number, nucleus)):x}.png", 9 * number + nucleus)
            for nucleus in range(number + 1)
        ]
        wanted[name] = {"foreground": np.any(nuclei, axis=0)}
    return wanted


def bids():
    """Labels beside the subjects, and images of two contrasts."""
    wanted = {}
    for number in (1, 2):
        subject = f"sub-0{number}"
        for contrast in ("T1w", "T2w"):
            volume(f"bids/{subject}/anat/{subject}_{contrast}.nii.gz", number, 900)
        path = f"bids/derivatives/labels/{subject}/anat/{subject}_T1w_label-lesion_mask.nii.gz"
        wanted |= slices(f"{subject}_T1w", foreground=volume(path, number))
    return wanted


def ph2():
    """Nested folders, and other drawings beside the masks."""
    wanted = {}
    for name in ("IMD002", "IMD003"):
        place = f"PH2/{name}/{name}"
        image(f"{place}_Dermoscopic_Image/{name}.bmp")
        drawn = mask(f"{place}_lesion/{name}_lesion.bmp", len(wanted))
        mask(f"{place}_roi/{name}_R1_Label3.bmp", 5)
        wanted[name] = {"foreground": drawn}
    return wanted


def chase():
    """Two readers, in the folder of the images."""
    wanted = {}
    for number, name in enumerate(("Image_01L", "Image_01R")):
        image(f"chase/{name}.jpg")
        wanted[name] = {"foreground": mask(f"chase/{name}_1stHO.png", number)}
        mask(f"chase/{name}_2ndHO.png", number + 7)
    return wanted


def decomposed():
    """A letter and its accent are one character in the masks and two in the images."""
    wanted = {}
    for number in (1, 2):
        image(f"a/{NFD}/{number}/{NFD}.png", number)
        drawn = mask(f"b/{NFC}/{number}/{NFC}_m.png", number)
        wanted[f"{number}_{NFC}"] = {"foreground": drawn}
    return wanted


def splits():
    """Two splits whose names are the same, in formats that differ."""
    wanted = {}
    for number, place in enumerate(("train", "val")):
        image(f"em/{place}/images/0.{('png', 'tif')[number]}", number)
        drawn = mask(f"em/{place}/masks/0.png", number)
        wanted[f"{place}_images_0"] = {"foreground": drawn}
    mask("em/test/masks/0.png", 5)
    return wanted


def axons():
    """A file for each class, which may overlap, and of which an image may lack one."""
    wanted = {"1": {}, "2": {}}
    for number, (stem, name) in enumerate((("1", "axon"), ("1", "myelin"), ("2", "myelin"))):
        image(f"scans/{stem}.png")
        wanted[stem][name] = mask(f"classes/{stem}_{name}.png", number, (0, number + 1))
    assert (wanted["1"]["axon"] & wanted["1"]["myelin"]).any()
    return wanted


def lesions():
    """A folder for each class, with endings of its own."""
    wanted = {"IDRiD_1": {}, "IDRiD_2": {}}
    for number, (folder, end) in enumerate((("1. MA", "_MA"), ("2. HE", "_HE"), ("5. OD", "_OD"))):
        for stem in list(wanted)[number % 2 :]:
            image(f"fundus/{stem}.jpg")
            drawn = mask(f"truth/{folder}/{stem}{end}.tif", number)
            wanted[stem][folder] = drawn
    return wanted


def named_as_one(names="012"):
    """Parts of a class, three in one image and two in the other."""
    wanted = {}
    for number, stem in enumerate("xy"):
        image(f"cells/{stem}.png")
        parts = [
            mask(f"parts/{stem}_{name}.png", 5 * number + part)
            for part, name in enumerate(names[number:])
        ]
        wanted[stem] = {"cell": np.any(parts, axis=0)}
    return wanted


def scans(count=2, organs=("liver", "spleen")):
    """TotalSegmentator: a folder for each scan, with a volume for each of the organs."""
    wanted = {}
    for number in range(count):
        volume(f"S/s{number:04}/ct.nii.gz", number, 900)
        place = f"S/s{number:04}/segmentations"
        masks = {
            organ: volume(f"{place}/{organ}.nii.gz", 200 * number + seed, 1 if seed == 3 else 2)
            for seed, organ in enumerate(organs)
        }
        wanted |= slices("ct" if count == 1 else f"s{number:04}_ct", **masks)
    return wanted


def hundred():
    return scans(2, [f"organ_{number:03}" for number in range(100)])


def lobes():
    """Two files that are one class, and one that is another."""
    made = scans(1, ("liver", "lobe_left", "lobe_right"))
    for own in made.values():
        left, right = own.pop("lobe_left"), own.pop("lobe_right")
        own["lung"] = left | right
    return made


LAYOUTS = {  # what is written, the arguments of --masks
    "one folder": (wbc, "wbc wbc"),
    "two suffixes": (wbc, "wbc/*.bmp wbc/*.png"),
    "any case": (wbc, "wbc/00[1-3].{bmp,jpg} wbc/00?.*"),
    "DSB": (dsb, "stage1_train/*/images/*.png stage1_train/*/masks/*.png"),
    "DSB by folders": (dsb, "stage1_train/*/images stage1_train/*/masks"),
    "DSB anywhere": (dsb, "**/images/*.png **/masks/*.png"),
    "BIDS": (bids, "bids/sub-*/anat/*_T1w.nii.gz bids/derivatives/labels"),
    "BIDS anywhere": (bids, "bids/sub-*/**/*_T1w.nii.gz bids/derivatives/**/*_mask.nii.gz"),
    "PH2": (ph2, "PH2/**/*_Dermoscopic_Image/*.bmp PH2/**/*_lesion.bmp"),
    "PH2, the rest": (ph2, "PH2/*/*_Dermoscopic_Image PH2/*/*_lesion"),
    "a reader": (chase, "chase/*.jpg chase/*_1stHO.png"),
    "all but": (chase, "chase/*L.jpg,chase/*R.jpg chase/*_1stHO.png"),
    "NFD": (decomposed, f"a/{NFC}/*/{NFC}*.png b/{NFD}/*/{NFD}_*.png"),
    "NFD by name": (decomposed, f"a/{NFC} b/{NFC}/*/*_m.png"),
    "splits": (splits, "em/{train,val}/images em/{train,val}/masks"),
    "splits in a list": (splits, "em/train/images,em/val/images em/train/masks,em/val/masks"),
    "classes": (axons, "scans/*.png axon=classes/*_axon.png myelin=classes/*_myelin.png"),
    "classes of a folder": (axons, "scans axon=classes/*_axon.png *=classes/*_*.png"),
    "each class": (axons, "scans *=classes/*_*.png"),
    "each class, any suffix": (axons, "scans/* *=classes/*_*"),
    "IDRiD": (lesions, "fundus *=truth/*"),
    "one class": (named_as_one, "cells cell=parts"),
    "one class of a pattern": (lambda: named_as_one("qrs"), "cells/*.png cell=parts/*_*.png"),
    "a scan": (lambda: scans(1), "S/s0000/ct.nii.gz *=S/s0000/segmentations/*.nii.gz"),
    "scans": (
        scans,
        "S/*/ct.nii.gz liver=S/*/segmentations/liver.nii.gz spleen=S/*/segmentations/sp*.nii.gz",
    ),
    "100 organs": (hundred, "S/*/ct.nii.gz *=S/*/segmentations/*.nii.gz"),
    "lobes": (
        lobes,
        "S/*/ct.nii.gz lung=S/*/segmentations/lobe_*.nii.gz *=S/*/segmentations/*.nii.gz",
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_come_back_bit_for_bit(here, case):
    make, arguments = LAYOUTS[case]
    wanted = make()
    before = tree(here)
    run_download("--masks", *arguments.split(" "), *ALL)
    got = stored()
    assert set(got) == set(wanted)
    for stem, masks in wanted.items():
        assert set(got[stem]) == set(masks), stem
        for name, drawn in masks.items():
            assert_array_equal(got[stem][name], drawn, f"{stem}, {name}")
    assert before.items() <= tree(here).items()


def test_classes_are_those_of_the_file_names(here):
    lesions()
    run_download("--masks", "fundus", "*=truth/*", *ALL)
    assert class_names() == ["1. MA", "2. HE", "5. OD"]
    run_download("--masks", "fundus", "*=truth/*", *ALL, "--force", "--classes", "5. OD,1. MA")
    assert class_names() == ["5. OD", "1. MA"]
    named = ("b=truth/1*,truth/5*", "a=truth/2*")
    run_download("--masks", "fundus", *named, "--into", "valid", "--data", "own")
    assert class_names("valid", "own") == ["b", "a"]
    assert_array_equal(stored("valid", "own")["IDRiD_1"]["b"], (labels(0) | labels(2)) == 1)
    refuse_download(
        "--masks", "fundus", "*=truth/*", *ALL, "--force", "--classes", "OD", words=["'OD'"]
    )


def test_classes_are_numbered_by_name_whichever_file_comes_first(here):
    for number, name in enumerate(("disc", "cup", "artery")):
        image(f"fundus/{number}.png", number)
        mask(f"truth/{number}_{name}.png", number)
    run_download("--masks", "fundus", "*=truth/*_*.png", *ALL)
    assert class_names() == ["artery", "cup", "disc"]


def test_a_class_may_be_empty_in_all_of_its_files(here):
    scans(2, ("liver", "spleen", "colon", "aorta"))  # the last is
    run_download("--masks", "S/*/ct.nii.gz", "*=S/*/segmentations/*.nii.gz", *ALL)
    assert class_names() == ["aorta", "colon", "liver", "spleen"]
    assert not any("aorta" in masks for masks in stored().values())


def test_all_values_of_a_file_are_its_class(here):
    """Also three hundred numbers of objects, and what is background with --invert."""
    numbers = np.arange(300, dtype=np.uint16).repeat(4).reshape(PHOTO[::-1])
    image("scans/1.png")
    save(grey(range(300), np.uint16)(numbers), "masks/1_cells.png")
    drawn = mask("masks/1_wall.png", 1)
    sides = ("scans", "cell=masks/*_cells.png", "wall=masks/*_wall.png")
    run_download("--masks", *sides, *ALL)
    assert_array_equal(stored()["1"]["cell"], numbers > 0)
    run_download("--masks", "scans", sides[2], *ALL, "--force", "--invert")
    assert_array_equal(stored()["1"]["wall"], ~drawn)
    refuse_download("--masks", *sides, *ALL, "--force", "--classes", "1=cell", words=["--classes"])


def test_subjects_and_groups_of_patterns(here):
    bids()
    images = "bids/sub-*/anat/*_T1w.nii.gz"
    out = run_download("--masks", images, "bids/derivatives/**", "--split", 50, 50, 0)
    assert "2 subjects" in out
    for split in ("train", "valid"):
        assert len({record["group"] for record in annotations(split)["images"]}) == 1
    scans()
    grouped = ("--group", r"^(s\d+)/", "--force", "--split", 50, 50, 0)  # below S
    run_download("--masks", "S/*/ct.nii.gz", "seg=S/*/segmentations", *grouped)
    assert {record["group"] for record in annotations("train")["images"]} < {"s0000", "s0001"}


def test_what_both_sides_match_are_masks_where_these_are_fewer(here):
    chase()
    Path("chase/Image_01L_2ndHO.png").unlink()
    Path("chase/Image_01R_2ndHO.png").unlink()
    for arguments in (("chase/*", "./chase/*HO.png"), ("chase/*.jpg", "chase"), ("chase", "chase")):
        run_download("--masks", *arguments, *ALL, "--force")
        assert set(stored()) == {"Image_01L", "Image_01R"}


def readers():
    """A folder for each image, with the masks of two readers."""
    for number in (1, 2, 3):
        image(f"r/{number}/scan.png")
        for reader in ("ann", "bob"):
            mask(f"r/{number}/{reader}.png", number)


def twins():
    for stem in "ab":
        mask(f"one/{stem}.png", 1)
        mask(f"one/{stem}.bmp", 2)


def healthy():
    axons()
    image("scans/3.png")


def alone():
    image("scans/1.png")
    mask("classes/2.png", 2)
    mask("classes/3.png", 2)


def crowded():
    """Two images in a folder, of which one cannot tell whose the masks are."""
    for place, stems in (("1", "ab"), ("2", "c")):
        for stem in stems:
            image(f"t/{place}/images/{stem}.png")
            mask(f"t/{place}/masks/{ord(stem):x}f.png", 1)


REFUSED = {  # what is written, the arguments of --masks, what the message names
    "one side": (wbc, "wbc", ["wbc alone"]),
    "nothing": (wbc, "wbc/*.gif wbc/*.png", ["wbc/*.gif", "3 .png, 3 .bmp"]),
    "no such folder": (wbc, "wbc/*.bmp wcb/*.png", ["wcb/*.png", "no such"]),
    "no images": (wbc, "tests wbc", ["tests: no such"]),
    "everything": (wbc, "wbc/*.png wbc/*.png", ["wbc/*.png", "3 files"]),
    "everything, by class": (wbc, "wbc/*.png a=wbc/*.png", ["wbc/*.png", "same files"]),
    "partly": (wbc, "wbc/*1.*,wbc/*2.* wbc/*2.*,wbc/*3.*", ["wbc/002.bmp", "1 more"]),
    "unclear values": (twins, "one one", ["2 names", ".bmp and .png", "'one/*.bmp' 'one/*.png'"]),
    "expanded": (
        wbc,
        "wbc/001.bmp wbc/002.bmp wbc/001.png wbc/002.png",
        ["'wbc/*.bmp' 'wbc/*.png'"],
    ),
    "expanded images": (wbc, "wbc/001.bmp wbc/002.bmp wbc", ["3 names", "'wbc/*.bmp' wbc"]),
    "expanded, and a class": (axons, "scans/1.png scans/2.png a=classes", ["2 names", "quote"]),
    "three folders": (axons, "scans classes scans", ["3 names", "classes,scans"]),
    "two readers": (
        chase,
        "chase/*.jpg chase/*.png",
        ["2 of 2", "chase/*1stHO.png", "A='chase/*.png'"],
    ),
    "readers by folder": (readers, "r/*/scan.png r/*/???.png", ["3 of 3", "'r/*/ann.png'"]),
    "two images in a folder": (crowded, "t/*/images t/*/masks", ["no rule", "3 images"]),
    "organs": (scans, "S/*/ct.nii.gz S/*/segmentations", ["A='S/*/segmentations/liver.nii.gz'"]),
    "a class twice": (axons, "scans a=classes/*_axon.png a=classes/*_myelin.png", ["'a'", "twice"]),
    "twice, by *": (axons, "scans axon=scans/1.png *=classes/*_*.png", ["'axon'", "twice"]),
    "a file of two": (axons, "scans a=classes/*_axon.png b=classes", ["1_axon.png", "a and of b"]),
    "a class of none": (axons, "scans a=classes/*_axn.png", ["classes/*_axn.png", "3 .png"]),
    "no pair": (alone, "scans a=classes", ["classes", "2.png"]),
    "mixed": (axons, "scans a=classes/*_axon.png classes/*_myelin.png", ["has no class", "a="]),
    "classes first": (axons, "a=classes/*_axon.png b=classes/*_myelin.png", ["first"]),
    "no * for the class": (scans, "S/*/ct.nii.gz *=S/*/segmentations", ["segmentations/*'"]),
    "an image of no class": (
        healthy,
        "scans *=classes/*_*.png",
        ["1 of 3", "of any class (3.png)"],
    ),
    "volumes and pictures": (lambda: (scans(), wbc()), "S/*/ct.nii.gz wbc/*.png", ["is a volume"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_one_line_and_writes_nothing(here, case):
    make, arguments, words = REFUSED[case]
    make()
    line = refuse_download("--masks", *arguments.split(" "), *ALL, words=words)
    # What would leave nothing is not offered.
    assert ("--skip-unpaired" in line) == (case == "an image of no class")


def test_more_classes_than_are_told_apart(here):
    image("scans/1.png")
    for number in range(256):
        mask(f"classes/1_{number}.png", number)
    refuse_download("--masks", "scans", "*=classes/*_*.png", *ALL, words=["256", "255"])
