"""Data sets as their authors lay them out: what download.py FOLDER says, what a command imports."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ALL,
    PHOTO,
    annotations,
    box,
    coco_file,
    grey,
    labelme,
    labels,
    photo,
    polygon,
    read_rgb,
    refuse_download,
    run_download,
    save,
    shape,
    stored,
    tree,
    write_nifti,
)
from PIL import Image

from medseg.importing.layouts import find_layout

NUMBERS = range(1, 5)
# A set : the files of an image > of its masks > of what is beside, each with | between several :
# the arguments of --masks where download.py D asks.
SETS = """
two folders : images/{}.jpg > masks/{}.png
ISIC 2018 : ISIC2018_Task1-2_Training_Input/ISIC_{}.jpg
  > ISIC2018_Task1_Training_GroundTruth/ISIC_{}_segmentation.png
BUSI : benign/benign ({}).png > benign/benign ({})_mask.png|benign/benign ({})_mask_1.png
Montgomery : CXR_png/M_{}_0.png > ManualMask/leftMask/M_{}_0.png|ManualMask/rightMask/M_{}_0.png
Shenzhen : CXR_png/CHNCXR_{}_0.png > mask/CHNCXR_{}_0_mask.png > CXR_png/CHNCXR_{}_1.png
  : D/CXR_png/{id}.png D/mask/{id}_mask.png --skip-unpaired
LGG : TCGA_{}/TCGA_{}_1.tif > TCGA_{}/TCGA_{}_1_mask.tif
BraTS 2020 : B_{}/B_{}_t1.nii|B_{}/B_{}_t1ce.nii > B_{}/W{}_1998.09.19_Segm.nii
nnU-Net : imagesTr/c_{}_0000.nii.gz|imagesTr/c_{}_0001.nii.gz > labelsTr/c_{}.nii.gz
BIDS : sub-{}/anat/sub-{}_T1w.nii.gz
  > derivatives/labels/sub-{}/anat/sub-{}_T1w_label-lesion_mask.nii.gz
  > sub-{}/anat/sub-{}_T2w.nii.gz
  : D/sub-*/**/{id}_T1w.nii.gz D/derivatives/**/{id}_T1w_*mask.nii.gz
TotalSegmentator : s{}/ct.nii.gz > s{}/segmentations/liver.nii.gz|s{}/segmentations/spleen.nii.gz
ACDC : t/p{}/p{}_frame01.nii.gz > t/p{}/p{}_frame01_gt.nii.gz > t/p{}/p{}_4d.nii.gz
  : D/t/{group}/{group}_frame{id}.nii.gz D/t/{group}/{group}_frame{id}_gt.nii.gz
LiTS : v/volume-{}.nii > v/segmentation-{}.nii
Carvana : train/c_{}.jpg > train_masks/c_{}_mask.gif
arrays of NumPy : p{}/1.png > p{}/1_seg.npy
IDRiD : 1. Original Images/a. Training Set/IDRiD_{}.jpg
  > 2. Groundtruths/1. MA/IDRiD_{}_MA.tif|2. Groundtruths/2. HE/IDRiD_{}_HE.tif
STARE : images/im{}.ppm > labels/im{}.ah.ppm
Cityscapes : leftImg8bit/a/a_{}_leftImg8bit.png > gtFine/a/a_{}_gtFine_labelIds.png
PH2 : PH2/I{}/I{}_Dermoscopic_Image/I{}.bmp > PH2/I{}/I{}_lesion/I{}_lesion.bmp
  > PH2/I{}/I{}_roi/I{}_R1.bmp : D/PH2/**/{id}_Dermoscopic_Image/*.bmp D/PH2/**/{id}_lesion/*.bmp
DSB : s/{}/images/{}.png > s/{}/masks/u{}.png|s/{}/masks/mask.png
DRIVE : training/images/{}_training.tif > training/1st_manual/{}_manual1.gif
  > training/mask/{}_training_mask.gif : D/*/images/{id}_*.tif D/*/1st_manual/{id}_*.gif
splits : {}/images/0.png > {}/masks/0.png
two suffixes : {}.bmp > {}.png
beginnings : images/img_{}.png > masks/mask_{}.png
no separator : image/image{}.PNG > label/label{}.png
a reader : {}.jpg > {}_1stHO.png
"""
SETS = [" ".join(row.split("\n  ")) for row in re.findall(r"\S.*(?:\n  .*)*", SETS)]


def write(path, seed, is_mask):
    """A picture or a volume of noise, or a mask of it, by the suffix; returns the mask."""
    path = Path("D", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        values = np.random.default_rng(seed).integers(0, 900, (8, 6, 3)).astype(np.int16)
        voxels = (values > 700).astype(np.int16) if is_mask else values
        write_nifti(path, voxels, zooms=(1, 1, 3))
        return values > 700
    mask = labels(seed) * (labels(seed + 99) == 1)  # a fourth of the pixels
    if path.suffix == ".npy":
        np.save(path, mask == 1)
        return mask == 1
    options = {"quality": 100} if path.suffix == ".jpg" else {}
    save(grey([0, 255])(mask) if is_mask else photo(seed), path, **options)
    return mask == 1


def make(images, masks, beside=""):
    """The files of NUMBERS images; returns [(first file, mask)] of all images, or slices."""
    wanted = []
    for number in NUMBERS:
        files, drawn = [], []
        for index, text in enumerate([*images.split("|"), *filter(None, beside.split("|"))]):
            files.append(text.replace("{}", f"{number:02}"))
            write(files[-1], 10 * number + index, False)
        for index, text in enumerate(masks.split("|"), 5):
            drawn.append(write(text.replace("{}", f"{number:02}"), 10 * number + index, True))
        united = np.any(drawn, 0)
        slices = np.moveaxis(united, 2, 0) if united.ndim == 3 else [united]
        wanted += [(files[0], mask) for mask in slices]
    return wanted


@pytest.mark.parametrize("case", SETS, ids=lambda case: case.partition(" : ")[0])
def test_a_data_set_as_it_is_laid_out(here, case, capsys):
    _, files, *arguments = case.split(" : ")
    wanted = make(*files.split(" > "))
    if arguments:
        with pytest.raises(ValueError, match="^D: "):
            find_layout("D")
        assert "the same as" not in capsys.readouterr().out
        flags = ["--masks", *arguments[0].split(" ")]
    else:
        flags = find_layout("D")
        printed = capsys.readouterr().out.rstrip("\n").rpartition("the same as: ")[2]
        assert shlex.split(printed) == ["python", "download.py", *flags]
    run_download(*flags, *ALL)
    masks = stored()
    records = sorted(annotations("train")["images"], key=lambda record: record["file_name"])
    for record, (path, mask) in zip(records, wanted, strict=True):
        own = masks[Path(record["file_name"]).stem]
        np.testing.assert_array_equal(np.any([*own.values()], 0), mask, path)
        if mask.shape == PHOTO[::-1]:
            pixels = read_rgb(Path("dataset/train", record["file_name"]))
            np.testing.assert_array_equal(pixels, read_rgb(Path("D", path)))


def twice():
    make("PNG/Original/{}.png", "PNG/Ground Truth/{}.png")
    for path in Path("D/PNG").glob("*/*.png"):
        save(Image.open(path), Path("D/TIF", path.parent.name, path.stem + ".tif"))


def equal():
    make("images/{}.png", "masks/{}.png")
    Path("D/images/01.png").write_bytes(Path("D/images/02.png").read_bytes())


def view():
    make("images/{}.png", "mask/{}_mask.png")
    field = Image.fromarray(np.pad(np.full((26, 36), 255, np.uint8), 2))
    for path in Path("D/mask").iterdir():
        field.save(path)


def photographs():
    """Also in what is called labels."""
    make("images/{}.jpg", "labels/{}.png")
    for number, path in enumerate(Path("D/labels").iterdir(), 50):
        save(photo(number), path)


ASKED = {  # what is written, a command that is offered or ""
    "each image twice": (twice, "'D/**/{n}/Original/{id}.*'"),
    "two equal images": (equal, "'D/**/images/{id:**}.*'"),
    "field of view alone": (view, "'D/**/mask/{id:**}_mask.*'"),
    "two readers": (("{}.jpg", "{}_1stHO.png|{}_2ndHO.png"), "'D/{id:**}_1stHO.*'"),
    "two labels": (("images/{}.jpg", "labels/{}.png|gt/{}.png"), "'D/**/gt/{id:**}.*'"),
    "photographs twice": (photographs, ""),
    "no words": (("im/{}.png", "ms/{}.png"), ""),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_is_not_sure_is_asked_about(here, case, capsys):
    files, offered = ASKED[case]
    files() if callable(files) else make(*files)
    with pytest.raises(ValueError, match="^D: "):
        find_layout("D")
    printed = capsys.readouterr().out
    assert "the same as" not in printed and offered in printed


def test_a_folder_is_imported_as_its_explicit_command_does(here):
    make("images/{}.jpg", "masks/{}.png")
    before = tree(here)
    assert "--masks" in run_download("D", "--dry-run", *ALL)
    assert tree(here) == before
    printed = run_download("--data", "D", "--prefix", "x", "D", *ALL)  # into itself
    command = printed.partition("the same as: ")[2].splitlines()[0]
    run_download(*shlex.split(command)[2:], "--data", "other")
    np.testing.assert_equal(stored(root="D"), stored(root="other"))
    assert len(stored(root="D")) == len(NUMBERS)
    refuse_download("D", words=["D: "])
    refuse_download("none", words=["none: no such folder"])


def test_files_of_arrays_and_of_outlines_are_told(here):
    for name, flag in (("A/x.npz", "--arrays"), ("Y/data.yaml", "--yolo")):
        Path(name).parent.mkdir()
        Path(name).touch()
        assert find_layout(name[0]) == (flag, name[0])
    drawn = {"shape_attributes": {"name": "rect", "x": 2, "y": 3, "width": 5, "height": 5}}
    entry = {"filename": "a.png", "regions": [drawn | {"region_attributes": {"k": "x"}}]}
    labelme("a", [shape("x", box(2, 3, 5))], "L")
    for folder, content in (("V", {"a": entry}), ("W", {"_via_img_metadata": {"a": entry}})):
        save(photo(1), f"{folder}/a.png")
        Path(folder, "via.json").write_text(json.dumps(content))
    coco_file([(0, 3, polygon(2, 3, 5))])
    Path("c.json").rename("images/c.json")
    Path("images/d.json").write_text(json.dumps({"images": "of a note"}))
    for folder in ("V", "W", "L", "images"):
        run_download(folder, *ALL, "--data", f"of {folder}")
        ((mask,),) = (own.values() for own in stored(root=f"of {folder}").values())
        assert mask.sum() == 25
    Path("images/d.json").write_text(Path("images/c.json").read_text())
    refuse_download("images", *ALL, words=["images: "])
    make("images/{}.jpg", "masks/{}.png")
    Path("L/a.json").rename("D/images/01.json")
    refuse_download("D", *ALL, words=["D: "])
