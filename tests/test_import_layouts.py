"""download.py --masks on folders as their authors lay them out, and what is wrong with others."""

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


@pytest.mark.parametrize(
    "ways", [("images", "masks"), ("images/{n}/{id}.png", "masks/{n}/{id}.png")]
)
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
    run_download("--masks", *ways, *ALL)
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
        wanted |= slices(subject, foreground=volume(path, number))
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
        wanted[f"{number}"] = {"foreground": drawn}
    return wanted


def splits():
    """Two splits, in formats that differ, and a third that has masks alone."""
    wanted = {}
    for number, place in enumerate(("train", "val")):
        image(f"em/{place}/images/{number}.{('png', 'tif')[number]}", number)
        drawn = mask(f"em/{place}/masks/{number}.png", number)
        wanted[f"{number}"] = {"foreground": drawn}
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


def kinds():
    """A folder for each kind, each of which is a class."""
    wanted = {}
    for number, kind in enumerate(("benign", "malignant")):
        name = f"{kind} (1)"
        image(f"B/{kind}/{name}.png", number)
        parts = [
            mask(f"B/{kind}/{name}_mask{end}.png", 5 * number + len(end)) for end in ("", "_1")
        ]
        wanted[name] = {kind: np.any(parts, axis=0)}
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
        wanted |= slices(f"s{number:04}", **masks)
    return wanted


def hundred():
    return scans(2, [f"organ_{number:03}" for number in range(100)])


LAYOUTS = {  # what is written, the arguments of --masks
    "two suffixes": (wbc, "wbc/{id}.bmp wbc/{id}.png"),
    "any case": (wbc, "WBC/{id}.{BMP,jpg} Wbc/{id}.PNG"),
    "DSB": (dsb, "stage1_train/{id}/images/*.png stage1_train/{id}/masks/{part}.png"),
    "DSB anywhere": (dsb, "**/{id}/images/*.png **/{id}/masks/{part}.png"),
    "BIDS": (bids, "bids/sub-*/**/{id}_T1w.nii.gz bids/derivatives/**/{id}_T1w_*_mask.nii.gz"),
    "PH2": (ph2, "PH2/**/{id}_Dermoscopic_Image/*.bmp PH2/**/{id}_lesion/*.bmp"),
    "a reader": (chase, "chase/{id}.jpg chase/{id}_1stHO.png"),
    "NFD": (decomposed, f"a/{NFC}/{{id}}/{NFC}.png b/{NFD}/{{id}}/{NFD}_*.png"),
    "splits": (splits, "em/{train,val}/images/{id}.* em/{train,val}/masks/{id}.png"),
    "classes": (axons, "scans/{id}.png classes/{id}_{class}.png"),
    "a kind is a class": (kinds, "B/*/{id}.png B/{class}/{id}_mask{part}.png"),
    "IDRiD": (lesions, "fundus/{id}.jpg truth/{class}/{id}_*.tif"),
    "a scan": (lambda: scans(1), "S/{id}/ct.nii.gz S/{id}/segmentations/{class}.nii.gz"),
    "100 organs": (hundred, "S/{id}/ct.nii.gz S/{id}/segmentations/{class}.nii.gz"),
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
    sides = ("--masks", "fundus/{id}.jpg", "truth/{class}/{id}_*.tif", *ALL)
    run_download(*sides)
    assert class_names() == ["1. MA", "2. HE", "5. OD"]
    run_download(*sides, "--force", "--classes", "5. OD,1. MA", "--skip-unpaired")
    assert class_names() == ["5. OD", "1. MA"]
    refuse_download(*sides, "--force", "--classes", "OD", words=["OD"])


def test_a_class_may_be_empty_in_all_of_its_files(here):
    scans(2, ("liver", "spleen", "colon", "aorta"))  # the last is
    run_download("--masks", "S/{id}/ct.nii.gz", "S/{id}/segmentations/{class}.nii.gz", *ALL)
    assert class_names() == ["aorta", "colon", "liver", "spleen"]
    assert not any("aorta" in masks for masks in stored().values())


def test_all_values_of_a_file_are_its_class(here):
    """Also three hundred numbers of objects, and what is background with --invert."""
    numbers = np.arange(300, dtype=np.uint16).repeat(4).reshape(PHOTO[::-1])
    image("scans/1.png")
    save(grey(range(300), np.uint16)(numbers), "masks/1_cells.png")
    drawn = mask("masks/1_wall.png", 1)
    sides = ("--masks", "scans/{id}.png", "masks/{id}_{class}.png", *ALL)
    run_download(*sides)
    assert_array_equal(stored()["1"]["cells"], numbers > 0)
    run_download(*sides, "--classes", "wall", "--force", "--invert")
    assert_array_equal(stored()["1"]["wall"], ~drawn)
    refuse_download(*sides, "--force", "--classes", "1=cell", words=["--classes"])


def test_subjects_of_patterns(here):
    bids()
    sides = LAYOUTS["BIDS"][1].split(" ")
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


def healthy():
    axons()
    image("scans/3.png")


REFUSED = {  # what is written, the arguments of --masks, what the message names
    "one side": (wbc, "wbc", ["wbc", "two"]),
    "nothing": (wbc, "wbc/{id}.gif wbc/{id}.png", ["wbc/{id}.gif", "3 .png"]),
    "no such folder": (wbc, "wbc/{id}.bmp wcb/{id}.png", ["wcb/{id}.png", "wbc?"]),
    "no such file": (wbc, "wbc wbc/001.tif", ["wbc/001.tif: no such"]),
    "a file and a folder": (wbc, "wbc wbc/001.png", ["wbc/001.png is a file"]),
    "one folder": (wbc, "wbc wbc", ["wbc", "same files"]),
    "everything": (wbc, "wbc/{id}.png wbc/{id}.png", ["wbc/{id}.png", "same files"]),
    "without {id}": (wbc, "wbc/*.bmp wbc/*.png", ["wbc/*.bmp", "{id}"]),
    "expanded": (wbc, "wbc/001.bmp wbc/002.bmp wbc/001.png", ["3 names", "quote"]),
    "two readers": (chase, "chase/{id}.jpg chase/{id}_*.png", ["_1stHO.png", "_2ndHO.png"]),
    "an image of no class": (
        healthy,
        "scans/{id}.png classes/{id}_{class}.png",
        ["1 of 3", "scans/3.png", "--skip-unpaired"],
    ),
    "volumes and pictures": (
        lambda: (volume("S/001/ct.nii.gz", 1), wbc()),
        "S/{id}/ct.nii.gz wbc/{id}.png --skip-unpaired",
        ["wbc/001.png"],
    ),
}


def test_images_without_a_mask_are_empty_where_a_flag_says_so(here):
    healthy()
    sides = ("--masks", "scans/{id}.png", "classes/{id}_{class}.png", *ALL, "--empty-unmasked")
    assert "empty: 1 of 3" in run_download(*sides)
    assert stored()["3"] == {} and stored()["1"] and class_names() == ["axon", "myelin"]
    scans()
    Path("S/s0001/segmentations/liver.nii.gz").unlink()
    Path("S/s0001/segmentations/spleen.nii.gz").unlink()
    organs = ("--masks", "S/{id}/ct.nii.gz", "S/{id}/segmentations/{class}.nii.gz", *sides[3:])
    run_download(*organs, "--force")
    assert len(stored()) == 2 * VOXELS[2]
    assert not any(masks for name, masks in stored().items() if name.startswith("s0001"))
    refuse_download("--labelme", "x", "--empty-unmasked", words=["--empty-unmasked"])


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_one_line_and_writes_nothing(here, case):
    make, arguments, words = REFUSED[case]
    make()
    refuse_download("--masks", *arguments.split(" "), *ALL, words=words)
