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
    write_dicom,
    write_itk,
    write_nifti,
)
from PIL import Image

from medseg.importing import layouts
from medseg.importing.layouts import find_layout

NUMBERS = range(1, 5)
NFC, NFD = "Läsion", "La\u0308sion"
# A set, and whether download.py D takes it or asks, the classes of its masks : the files of an
# image > of its masks > of what is beside, each with | between several : the arguments of --masks.
SETS = """
two folders, taken : images/{}.jpg > masks/{}.png : D/images D/masks
Kvasir, taken : images/cju{}.jpg > masks/cju{}.jpg : D/images D/masks
ISIC 2018, taken : ISIC2018_Task1-2_Training_Input/ISIC_{}.jpg
  > ISIC2018_Task1_Training_GroundTruth/ISIC_{}_segmentation.png
  : D/ISIC2018_Task1-2_Training_Input D/ISIC2018_Task1_Training_GroundTruth
BUSI, taken : benign/benign ({}).png > benign/benign ({})_mask.png|benign/benign ({})_mask_1.png
  : D/*/{id}.png D/*/{id}_mask{part}.png
a kind is a class, taken, benign|benign : benign/b ({}).png
  > benign/b ({})_mask.png|benign/b ({})_mask_1.png : D/*/{id}.png D/{class}/{id}_mask{part}.png
CVC, taken : Original/{}.tif > Ground Truth/{}.tif : D/Original D/Ground?Truth
Montgomery, taken, leftMask|rightMask : CXR_png/M_{}_0.png
  > ManualMask/leftMask/M_{}_0.png|ManualMask/rightMask/M_{}_0.png
  : D/CXR_png/{id}.png D/ManualMask/{class}/{id}.png
Shenzhen, asks : CXR_png/CHNCXR_{}_0.png > mask/CHNCXR_{}_0_mask.png > CXR_png/CHNCXR_{}_1.png
  : D/CXR_png/{id}.png D/mask/{id}_mask.png --skip-unpaired
LGG, taken : TCGA_{}/TCGA_{}_1.tif > TCGA_{}/TCGA_{}_1_mask.tif
  : D/{group}/{id}.tif D/{group}/{id}_mask.tif
BraTS 2020, taken : B_{}/B_{}_t1.nii|B_{}/B_{}_t1ce.nii > B_{}/W{}_1998.09.19_Segm.nii
  : D/{id}/{id}_{channel}.nii D/{id}/*_{seg,Segm}.nii
BraTS 2021, taken : B_{}/B_{}_flair.nii.gz|B_{}/B_{}_t1.nii.gz > B_{}/B_{}_seg.nii.gz
  : D/{id}/{id}_{channel}.nii.gz D/{id}/{id}_seg.nii.gz --channels t1,flair
MSD, taken : imagesTr/lung_{}.nii.gz > labelsTr/lung_{}.nii.gz > imagesTr/._lung_{}.nii.gz
  : D/imagesTr D/labelsTr
nnU-Net, taken : imagesTr/c_{}_0000.nii.gz|imagesTr/c_{}_0001.nii.gz > labelsTr/c_{}.nii.gz
  : D/imagesTr/{id}_{channel}.nii.gz D/labelsTr/{id}.nii.gz
BIDS, asks : sub-{}/anat/sub-{}_T1w.nii.gz
  > derivatives/labels/sub-{}/anat/sub-{}_T1w_label-lesion_mask.nii.gz
  > sub-{}/anat/sub-{}_T2w.nii.gz
  : D/sub-*/**/{id}_T1w.nii.gz D/derivatives/**/{id}_T1w_*mask.nii.gz
TotalSegmentator, taken, liver|spleen : s{}/ct.nii.gz
  > s{}/segmentations/liver.nii.gz|s{}/segmentations/spleen.nii.gz
  : D/{id}/ct.nii.gz D/{id}/segmentations/{class}.nii.gz
ACDC, asks : t/p{}/p{}_frame01.nii.gz > t/p{}/p{}_frame01_gt.nii.gz > t/p{}/p{}_4d.nii.gz
  : D/t/{group}/{group}_frame{id}.nii.gz D/t/{group}/{group}_frame{id}_gt.nii.gz
PROMISE12, taken : Case{}.mhd > Case{}_segmentation.mhd : D/{id}.mhd D/{id}_segmentation.mhd
LiTS, taken : v/volume-{}.nii > v/segmentation-{}.nii : D/v/volume-{id}.nii D/v/s*-{id}.nii
CHAOS, asks : MR/{}/T2SPIR/DICOM_anon/IMG-0004-000{}.dcm > MR/{}/T2SPIR/Ground/IMG-0004-000{}.png
  : D/MR/{group}/T2SPIR/DICOM_anon/{id}.dcm D/MR/{group}/T2SPIR/Ground/{id}.png
IDRiD, taken, 1. MA|2. HE : 1. Original Images/a. Training Set/IDRiD_{}.jpg
  > 2. Groundtruths/1. MA/IDRiD_{}_MA.tif|2. Groundtruths/2. HE/IDRiD_{}_HE.tif
  : D/1.?Original?Images/**/{id}.jpg D/2.*/**/{class}/{id}_*.tif
STARE, taken : images/im{}.ppm > labels/im{}.ah.ppm : D/images D/labels
HRF, asks : images/{}_dr.JPG > manual1/{}_dr.tif > mask/{}_dr_mask.tif : D/images D/manual1
Cityscapes, taken : leftImg8bit/a/a_{}_leftImg8bit.png > gtFine/a/a_{}_gtFine_labelIds.png
  : D/leftImg8bit/**/{id}_leftImg8bit.png D/gtFine/**/{id}_gtFine_labelIds.png
PH2, asks : PH2/I{}/I{}_Dermoscopic_Image/I{}.bmp > PH2/I{}/I{}_lesion/I{}_lesion.bmp
  > PH2/I{}/I{}_roi/I{}_R1.bmp : D/PH2/**/{id}_Dermoscopic_Image/*.bmp D/PH2/**/{id}_lesion/*.bmp
DSB, taken : s/{}/images/{}.png > s/{}/masks/u{}.png|s/{}/masks/mask.png
  : D/s/{id}/images/*.png D/s/{id}/masks/{part}.png
DRIVE, asks : training/images/{}_training.tif > training/1st_manual/{}_manual1.gif
  > training/mask/{}_training_mask.gif : D/*/images/{id}_*.tif D/*/1st_manual/{id}_*.gif
splits, taken : {}/images/0.png > {}/masks/0.png : D/{n}/images/{id}.* D/{n}/masks/{id}.png
two suffixes, taken : {}.bmp > {}.png : d/{id}.{BMP,jpg} D/{id}.PNG
beginnings, taken : images/img_{}.png > masks/mask_{}.png : D/images D/masks
no separator, taken : image/image{}.png > label/label{}.png : D/image D/label
a reader, taken : {}.jpg > {}_1stHO.png : D/{id}.jpg D/{id}_1stHO.png
two readers, asks : {}.jpg > {}_1stHO.png > {}_2ndHO.png : D/{id}.jpg D/{id}_1stHO.png
"""
SETS = [" ".join(row.split("\n  ")) for row in re.findall(r"\S.*(?:\n  .*)*", SETS)]


def write(path, seed, is_mask):
    """A picture or a volume of noise, or a mask of it, by the suffix; returns the mask."""
    path = Path("D", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz", ".mhd")):
        values = np.random.default_rng(seed).integers(0, 900, (8, 6, 3)).astype(np.int16)
        write_volume = write_itk if path.suffix == ".mhd" else write_nifti
        voxels = (values > 700).astype(np.int16) if is_mask else values
        write_volume(path, voxels, np.diag([1, 1, 3, 1]))
        return values > 700
    if path.suffix == ".dcm":
        return write_dicom(path, np.asarray(photo(seed))[..., 0].astype(np.uint16))
    mask = labels(seed) * (labels(seed + 99) == 1)  # a fourth of the pixels
    options = {"quality": 100} if path.suffix == ".jpg" else {}
    save(grey([0, 255])(mask) if is_mask else photo(seed), path, **options)
    return mask == 1


def make(images, masks, beside="", classes=""):
    """The files of NUMBERS images; returns [(first file, {class: mask})] of images and slices."""
    wanted = []
    for number in NUMBERS:
        files, drawn = [], {}
        for index, text in enumerate([*images.split("|"), *filter(None, beside.split("|"))]):
            files.append(text.replace("{}", f"{number:02}"))
            write(files[-1], 10 * number + index, False)
        names = classes.split("|") if classes else ["foreground"] * len(masks.split("|"))
        for name, text in zip(names, masks.split("|"), strict=True):
            mask = write(text.replace("{}", f"{number:02}"), 10 * number + 5 + len(drawn), True)
            drawn[name] = mask | drawn.get(name, False)
        if mask.ndim == 3:
            slices = ({name: own[..., z] for name, own in drawn.items()} for z in range(3))
            wanted += [(files[0], own) for own in slices]
        else:
            wanted.append((files[0], drawn))
    return wanted


@pytest.mark.parametrize("case", SETS, ids=lambda case: case.partition(",")[0])
def test_a_data_set_as_it_is_laid_out(here, case, capsys):
    title, files, arguments = case.split(" : ")
    _, says, *classes = title.split(", ")
    images, masks, *beside = files.split(" > ")
    wanted = make(images, masks, *beside, classes="".join(classes))
    before = tree(here)
    command = ["--masks", *(own.replace("?", " ") for own in arguments.split(" "))]
    run_download(*command, *ALL)
    assert before.items() <= tree(here).items()
    compare(wanted)
    if says == "asks":
        with pytest.raises(ValueError, match="^D: "):
            find_layout("D")
        assert "the same as" not in capsys.readouterr().out
        return
    flags = find_layout("D")
    printed = capsys.readouterr().out.rstrip("\n").rpartition("the same as: ")[2]
    assert shlex.split(printed) == ["python", "download.py", *flags]
    run_download(*flags, *ALL, "--force")
    compare([(path, {"foreground": np.any([*own.values()], 0)}) for path, own in wanted], True)


def compare(wanted, united=False):
    """The data set holds these images, in this order, with these masks, bit for bit."""
    masks = stored()
    records = sorted(annotations("train")["images"], key=lambda record: record["file_name"])
    assert len(records) == len(wanted)
    for record, (path, drawn) in zip(records, wanted, strict=True):
        own = masks[Path(record["file_name"]).stem]
        own = {"foreground": np.any([*own.values()], 0)} if united else own
        assert own.keys() == drawn.keys()
        for name, mask in drawn.items():
            np.testing.assert_array_equal(own[name], mask, f"{path}, {name}")
        if mask.shape == PHOTO[::-1] and not path.endswith(".dcm"):
            pixels = read_rgb(Path("dataset/train", record["file_name"]))
            np.testing.assert_array_equal(pixels, read_rgb(Path("D", path)))


def lacking():
    make("images/{}.png", "masks/{}.png")
    Path("D/masks/01.png").unlink()


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
    """Also in what is called labels, mostly black."""
    make("images/{}.jpg|labels/{}.png", "labels/{}.png")
    pixels = np.asarray(photo(50)).copy()
    pixels[:20] = 0
    for path in Path("D/labels").iterdir():
        save(Image.fromarray(pixels), path)


ASKED = {  # what is written, a command that is offered or ""
    "field of view beside": (
        ("a/images/{}_a.tif", "a/1st_manual/{}_manual1.gif|a/mask/{}_a_mask.gif"),
        "'D/**/images/{id}_*.*' 'D/**/1st_manual/{id}_*.*'",
    ),
    "a mask is missing": (lacking, "--skip-unpaired"),
    "each image twice": (twice, "'D/**/{n}/Original/{id}.*'"),
    "two equal images": (equal, "'D/**/images/{id:**}.*'"),
    "field of view alone": (view, "'D/**/mask/{id:**}_mask.*'"),
    "two readers": (("{}.jpg", "{}_1stHO.png|{}_2ndHO.png"), "'D/{id:**}_1stHO.*'"),
    "two labels": (("images/{}.jpg", "labels/{}.png|gt/{}.png"), "'D/**/gt/{id:**}.*'"),
    "photographs alone": (("images/{}.jpg|other/{}.jpg", "x/{}.txt.png"), ""),
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


def test_a_large_folder_is_known_by_some_of_its_names(here, monkeypatch):
    """They are drawn at random: every second name is that of an image."""
    monkeypatch.setattr(layouts, "SAMPLED", len(NUMBERS))
    make("s/{}/images/{}.png", "s/{}/masks/a.png")
    assert "'D/**/{id}/masks/{part}.*'" in run_download("D", "--dry-run")


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
