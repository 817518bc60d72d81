"""download.py FOLDER: layouts that are known, and those that are asked about."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ALL,
    box,
    coco_file,
    grey,
    labelme,
    labels,
    photo,
    polygon,
    refuse_download,
    run_download,
    save,
    shape,
    stored,
    tree,
    write_nifti,
)
from PIL import Image

from medseg.importing import layouts
from medseg.importing.layouts import find_layout
from medseg.importing.pairs import pair

NUMBERS = range(1, 5)


def write(path, seed, is_mask):
    """A picture or a volume of noise, or a mask of it, by the suffix."""
    path = Path("D", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        values = np.random.default_rng(seed).integers(0, 900, (8, 6, 5)).astype(np.int16)
        write_nifti(path, (values > 700).astype(np.int16) if is_mask else values)
    elif is_mask:
        label_map = labels(seed) * (labels(seed + 99) == 1)  # a fourth of the pixels
        save(grey([0, 255])(label_map), path)
    else:
        save(photo(seed), path)


def make(images, masks):
    """The files of NUMBERS images and their masks; returns {masks} by {images}, sorted tuples.

    images, masks: paths with {}, several of an image after a space.
    """
    pairs = {}
    for number in NUMBERS:
        sides = []
        for side, text in enumerate((images, masks)):
            paths = [own.replace("{}", f"{number:02}") for own in text.split("|")]
            for index, path in enumerate(paths):
                write(path, 10 * number + index, side == 1)
            sides.append(tuple(sorted(str(Path("D", path)) for path in paths)))
        pairs[sides[0]] = sides[1]
    return pairs


IDRID = "2. All Segmentation Groundtruths"
SURE = {  # paths of an image, of its masks
    "two folders": ("images/{}.jpg", "masks/{}.png"),
    "Kvasir": ("images/c{}.jpg", "masks/c{}.bmp"),
    "ISIC 2018": (
        "ISIC2018_Task1-2_Training_Input/I_{}.jpg",
        "ISIC2018_Truth/I_{}_segmentation.png",
    ),
    "BUSI as packed": ("benign/benign ({}).png", "benign/benign ({})_mask.png"),
    "BUSI, two masks": ("b/b ({}).png", "b/b ({})_mask.png|b/b ({})_mask_1.png"),
    "BUSI in folders": ("b/images/b{}.png", "b/mask/b{}_mask.png|b/mask/b{}_mask_1.png"),
    "CVC": ("PNG/Original/{}.png", "PNG/Ground Truth/{}.png"),
    "Montgomery": ("CXR_png/{}.png", "ManualMask/leftMask/{}.png|ManualMask/rightMask/{}.png"),
    "LGG": ("kaggle_3m/p{}/p{}_1.tif", "kaggle_3m/p{}/p{}_1_mask.tif"),
    "BraTS 2020": ("B_{}/B_{}_t1.nii|B_{}/B_{}_t2.nii", "B_{}/B_{}_seg.nii"),
    "BraTS 2023": ("B-{}/B-{}-t1.nii|B-{}/B-{}-t2.nii", "B-{}/B-{}-seg.nii"),
    "MSD": ("imagesTr/c_{}.nii.gz", "labelsTr/c_{}.nii.gz"),
    "nnU-Net": ("imagesTr/c_{}_0000.nii.gz|imagesTr/c_{}_0001.nii.gz", "labelsTr/c_{}.nii.gz"),
    "BIDS": ("sub-{}/a/sub-{}_T1w.nii.gz", "derivatives/b/sub-{}/a/sub-{}_T1w_label-x_mask.nii.gz"),
    "TotalSegmentator": ("s{}/ct.nii.gz", "s{}/segmentations/a.nii.gz|s{}/segmentations/b.nii.gz"),
    "ACDC": ("training/p{}/p{}_frame01.nii.gz", "training/p{}/p{}_frame01_gt.nii.gz"),
    "LiTS": ("a/volume-{}.nii", "a/segmentation-{}.nii"),
    "IDRiD": (
        "1. Original Images/a/I_{}.jpg",
        f"{IDRID}/1. MA/I_{{}}_MA.tif|{IDRID}/2. HE/I_{{}}_HE.tif",
    ),
    "STARE": ("images/im{}.ppm", "labels/im{}.ah.ppm"),
    "HRF": ("images/{}_dr.JPG", "manual1/{}_dr.tif"),
    "Cityscapes": ("leftImg8bit/a/a_{}_leftImg8bit.png", "gtFine/a/a_{}_gtFine_labelIds.png"),
    "PH2": ("x/I{}/I{}_Dermoscopic_Image/I{}.bmp", "x/I{}/I{}_lesion/I{}_lesion.bmp"),
    "DSB": ("s/{}/images/{}.png", "s/{}/masks/u{}.png|s/{}/masks/v{}.png"),
    "DRIVE": ("training/images/{}_training.tif", "training/1st_manual/{}_manual1.gif"),
    "splits": ("{}/images/0.png", "{}/masks/0.png"),
    "two suffixes": ("{}.bmp", "{}.png"),
    "beginnings": ("images/img_{}.png", "masks/mask_{}.png"),
    "no separator": ("image/image{}.png", "label/label{}.png"),
    "one of two readers": ("{}.jpg", "{}_1stHO.png"),
    "odd names": ("images/[a] {}é'.png", "masks/[a] {}é'.png"),
}


@pytest.mark.parametrize("case", SURE)
def test_a_known_layout_is_taken(here, case, capsys):
    wanted = make(*SURE[case])
    flags = find_layout("D")
    got = pair(*flags[1:])
    assert {
        tuple(sorted(map(str, one.images.values()))): tuple(
            sorted(str(path) for own in one.masks.values() for path in own)
        )
        for one in got
    } == wanted
    printed = capsys.readouterr().out.rstrip("\n").rpartition("the same as: ")[2]
    assert shlex.split(printed) == ["python", "download.py", *flags]


def drive():
    make("a/images/{}_a.tif", "a/1st_manual/{}_manual1.gif|a/mask/{}_a_mask.gif")


def lacking():
    make("images/{}.png", "masks/{}.png")
    Path("D/masks/01.png").unlink()


def twice():
    make("PNG/Original/{}.png", "PNG/Ground Truth/{}.png")
    for path in [*Path("D/PNG").rglob("*.png")]:
        save(Image.open(path), Path("D/TIF", path.parent.name, path.stem + ".tif"))


def equal():
    make("images/{}.png", "masks/{}.png")
    Path("D/images/01.png").write_bytes(Path("D/images/02.png").read_bytes())


def view():
    make("images/{}.png", "mask/{}_mask.png")
    for path in Path("D/mask").iterdir():
        save(Image.fromarray(np.pad(np.full((26, 36), 255, np.uint8), 2)), path)


ASKED = {  # what is written, a command that is offered or None
    "field of view beside": (drive, "'D/**/images/{id}_*.*' 'D/**/1st_manual/{id}_*.*'"),
    "a mask is missing": (lacking, "--skip-unpaired"),
    "each image twice": (twice, "'D/**/{n}/Original/{id}.*'"),
    "two equal images": (equal, "'D/**/images/{id:**}.*'"),
    "field of view alone": (view, "'D/**/mask/{id:**}_mask.*'"),
    "two readers": (lambda: make("{}.jpg", "{}_1stHO.png|{}_2ndHO.png"), "'D/{id:**}_1stHO.*'"),
    "two labels": (
        lambda: make("images/{}.jpg", "labels/{}.png|gt/{}.png"),
        "'D/**/gt/{id:**}.*'",
    ),
    "photographs alone": (lambda: make("images/{}.jpg|other/{}.jpg", "x/{}.txt.png"), None),
    "photographs twice": (lambda: make("images/{}.jpg|labels/{}.png", "labels/{}.png"), None),
    "no words": (lambda: make("im/{}.png", "ms/{}.png"), None),
    "classes without a word": (lambda: make("{}.png", "{}_a.png|{}_b.png"), None),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_is_not_sure_is_asked_about(here, case, capsys):
    write_files, offered = ASKED[case]
    write_files()
    if case == "photographs twice":  # also in what is called labels, mostly black
        for path in Path("D/labels").iterdir():
            pixels = np.asarray(photo(int(path.stem) + 50)).copy()
            pixels[:20] = 0
            save(Image.fromarray(pixels), path)
    with pytest.raises(ValueError, match="^D: "):
        find_layout("D")
    printed = capsys.readouterr().out
    assert "the same as" not in printed and (not offered or offered in printed)


def test_two_readings_that_use_every_picture_are_asked_about(here, monkeypatch):
    make("{}_a.png", "{}_b.png")
    rows = ["{id:**}_a.*  {id:**}_b.*", "{id:**}_b.*  {id:**}_a.*"]
    for table in (rows[:1], rows):
        monkeypatch.setattr(layouts, "TABLE", "\n" + "\n".join(table) + "\n")
        if table == rows:
            with pytest.raises(ValueError, match="D: "):
                find_layout("D")
        else:
            assert find_layout("D")


def test_a_folder_is_imported_as_its_explicit_command_does(here):
    make(*SURE["two folders"])
    before = tree(here)
    assert "--masks" in run_download("D", "--dry-run", *ALL)
    assert tree(here) == before
    out = run_download("D", "--data", "own", *ALL)
    command = out.partition("the same as: ")[2].splitlines()[0]
    run_download(*shlex.split(command)[2:], "--force", "--data", "other")
    np.testing.assert_equal(stored(root="own"), stored(root="other"))
    assert len(stored(root="own")) == len(NUMBERS)
    lacking()
    refuse_download("D", "--data", "own", "--force", *ALL, words=["D: "])
    refuse_download("own", words=["own: "])
    refuse_download("D", "--masks", "a", "b", words=["FOLDER"])
    refuse_download("--dry-run", words=["--dry-run", "FOLDER"])
    refuse_download("none", words=["none: no such folder"])


def test_files_of_arrays_and_of_yolo_are_told_by_their_names(here):
    for name, flag in (("A/x.npz", "--arrays"), ("Y/data.yaml", "--yolo")):
        Path(name).parent.mkdir()
        Path(name).touch()
        assert find_layout(name[0]) == (flag, name[0])


def test_files_of_outlines_are_told_by_what_they_hold(here):
    labelme("a", [shape("x", box(2, 3, 5))], "L")
    save(photo(1), "L/deep/b.png")
    run_download("L", *ALL)
    assert stored()["a"]["x"].sum() == 25
    Path("images").mkdir()
    coco_file([(0, 3, polygon(3, 4, 9))])
    Path("c.json").rename("images/c.json")
    run_download("images", *ALL, "--data", "own")
    assert stored(root="own")["a"]["k3"].any()
    Path("images/d.json").write_text(Path("images/c.json").read_text())
    refuse_download("images", *ALL, "--force", words=["images: "])
    Path("images/d.json").write_text(json.dumps({"name": "a note"}))
    run_download("images", *ALL, "--data", "own", "--force")
    make(*SURE["two folders"])
    Path("L/a.json").rename("D/images/01.json")
    refuse_download("D", *ALL, "--force", words=["D: "])
