"""What download.py --masks and download.py FOLDER import, of files as authors lay them out."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
from helpers import (
    ALL,
    MASKS,
    PHOTO,
    STORED_TURNED,
    annotations,
    box,
    class_names,
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
    save_pair,
    save_turned,
    shape,
    stored,
    tree,
    write_nifti,
)
from numpy.testing import assert_array_equal
from PIL import Image, ImageOps

from medseg.images import read_image
from medseg.importing.layouts import find_layout

VOXELS = (8, 6, 5)  # cut across the last axis
BRATS = ("--masks", "B/{id}/{id}_{channel}.nii", "B/{id}/*_{seg,Segm}.nii")


def image(path, seed=0):
    save(photo(seed), path)


def mask(path, seed=0):
    """Write a mask of one class; returns it."""
    drawn = labels(seed)
    save(grey((0, 255))(drawn), path)
    return drawn == 1


def volume(path, seed=0, values=2):
    """Write a volume of numbers below `values`; returns it."""
    voxels = np.random.default_rng(seed).integers(0, values, VOXELS).astype(np.int16)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, voxels, zooms=(1, 1, 3))
    return voxels


def groups(split):
    return {record["group"] for record in annotations(split)["images"]}


def compare(wanted):
    """The data set holds these images, {stem: {class: mask}}."""
    found = stored()
    assert {stem: set(own) for stem, own in found.items()} == {k: set(v) for k, v in wanted.items()}
    for stem, masks in wanted.items():
        for name, drawn in masks.items():
            assert_array_equal(found[stem][name], drawn, f"{stem}, {name}")


def assert_pixels(channels, name):
    """An image holds these slices, each from the 0.5 to 99.5 percentiles of its volume."""
    z, shown = int(name[-3:]), []
    for voxels in channels:
        low, high = np.percentile(voxels, (0.5, 99.5))
        shown.append(((voxels[..., z].clip(low, high) - low) / (high - low) * 255).round())
    assert_array_equal(tifffile.imread(f"dataset/train/{name}.tif"), np.stack(shown, -1))


def test_modalities_become_channels_and_wrong_ones_are_named(here):
    made, names = {}, {1: "core", 2: "oedema", 4: "enhancing"}
    segs = {"B_1": "B_1_seg", "B_2": "B_2_seg", "B_355": "W39_Segm"}  # as its authors named them
    for number, (case, seg) in enumerate(segs.items()):
        own = made[case] = {}
        for seed, name in enumerate(("flair", "t1", "t1ce", "t2"), 10 * number):
            own[name] = volume(f"B/{case}/{case}_{name}.nii", seed, 900)
        own["seg"] = np.array([0, 1, 2, 4], np.int16)[volume("x.nii", number, 4)]
        write_nifti(f"B/{case}/{seg}.nii", own["seg"], zooms=(1, 1, 3))
    run_download(*BRATS, *ALL, "--classes", "1=core,2=oedema,4=enhancing")
    assert groups("train") == set(made)
    info = annotations("train")["info"]
    assert info["channels"] == ["flair", "t1", "t1ce", "t2"]
    assert info["pattern"] == "{id}_{channel}.nii"
    wanted = {}
    for case, own in made.items():
        for z in range(VOXELS[2]):
            wanted[f"{case}_z{z:03}"] = {n: own["seg"][..., z] == v for v, n in names.items()}
            assert_pixels([own[channel] for channel in info["channels"]], f"{case}_z{z:03}")
    compare(wanted)
    again = (*BRATS, *ALL, "--force")
    refuse_download(*again, "--context", 7, "--channels", "t1,t1ce", words=["--context 7"])
    Path("B/B_2/B_2_t1ce.nii").unlink()
    refuse_download(*again, words=["B/B_2/B_2_t1ce.nii", "--skip-unpaired"])
    run_download(*again, "--skip-unpaired")
    assert groups("train") == {"B_1", "B_355"}
    shifted = np.diag([1.0, 1, 3, 1])
    shifted[0, 3] = 7.5
    write_nifti("B/B_1/B_1_t1ce.nii", made["B_1"]["t1ce"], shifted)
    refuse_download(*again, "--skip-unpaired", words=["B_1_t1ce.nii", "7.5 mm"])
    run_download(*again, "--channels", "t2,flair")  # two that all cases have
    assert annotations("train")["info"]["channels"] == ["t2", "flair"]
    assert_pixels([made["B_1"][name] for name in ("t2", "flair")], "B_1_z002")
    into = (*BRATS, "--into", "valid", "--skip-unpaired")
    refuse_download(*into, words=["t2, flair", "--channels"])
    run_download(*into, "--channels", "t2,flair")


def test_pictures_are_channels_too(here):
    stains = np.random.default_rng(0).integers(0, 256, (2, 30, 40), np.uint8)
    for name, one in zip(("dapi", "gfp"), stains, strict=True):
        save(Image.fromarray(one), f"i/a_{name}.png")
    drawn, patterns = mask("m/a.png"), ("i/{id}_{channel}.png", "m/{id}.png", *ALL, "--force")
    run_download("--masks", *patterns)
    assert_array_equal(tifffile.imread("dataset/train/a.tif"), np.moveaxis(stains, 0, -1))
    compare({"a": {"foreground": drawn}})
    for gfp, words in ((photo(), "colours"), (Image.fromarray(stains[1, 1:]), "40x29")):
        save(gfp, "i/a_gfp.png")
        refuse_download("--masks", *patterns, words=["i/a_gfp.png", words])


@pytest.mark.parametrize("n_channels, names", [(5, "1,2,3,4,5"), (3, "pre,flair,post")])
def test_the_channels_of_one_picture_are_named(here, n_channels, names):
    values = np.random.default_rng(0).integers(0, 256, (30, 40, n_channels), np.uint8)
    mask("m/a.png")
    Path("i").mkdir()
    layout = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite("i/a.tif", values, **layout)
    flags = ("--channels", names) if n_channels == 3 else ()
    run_download("--masks", "i", "m", *ALL, *flags)
    assert annotations("train")["info"]["channels"] == names.split(",")
    (written,) = Path("dataset/train").glob("a.*")
    assert_array_equal(read_image(written).pixels, values)
    mask("m/b.png")
    tifffile.imwrite("i/b.tif", values[..., :2], **layout)
    words = ["i/b.tif", "2 channels"]
    refuse_download("--masks", "i", "m", *ALL, *flags, "--force", words=words)


def test_groups_stay_together_and_images_have_the_names_of_their_ids(here):
    for seed, (patient, number) in enumerate((p, n) for p in "pqr" for n in "12"):
        image(f"k/{patient}/{number}.tif", seed)
        mask(f"k/{patient}/{number}_mask.tif", seed)
    patterns = ("--masks", "k/{group}/{id}.tif", "k/{group}/{id}_mask.tif")
    assert "groups: 3" in run_download(*patterns, "--split", 34, 33, 33)
    splits = ("train", "valid", "test")
    assert sorted(map(groups, splits), key=min) == [{"p"}, {"q"}, {"r"}]
    names = {name for split in splits for name in stored(split)}
    assert names == {f"{patient}_{number}" for patient in "pqr" for number in "12"}
    refuse_download(*patterns, *ALL, "--force", "--groups", "p", words=["--groups"])


@pytest.mark.parametrize("pattern", ["{group}/{id}", "{group}_{id}"])
def test_slices_that_may_be_of_patients_are_told(here, pattern):
    for number in range(18):
        name = pattern.format(group=f"p{number % 6}", id=f"{number:02}")
        image(f"i/{name}.png", number)
        mask(f"m/{name}.png", number)
    (line,) = (line for line in run_download("--masks", "i", "m").splitlines() if "note: " in line)
    assert "18 images are of 6" in line and f" {pattern} " in line
    out = run_download("--masks", f"i/{pattern}.png", f"m/{pattern}.png", "--force")
    assert "groups: 6" in out and "note: " not in out


def test_classes_are_those_of_the_names(here):
    """Of three, two and none of them, which --empty-unmasked takes for a healthy case."""
    wanted = {"I_1": {}, "I_2": {}, "I_3": {}}
    for number, name in enumerate(("1. MA", "2. HE", "5. OD")):
        for stem in ("I_1", "I_2")[: 1 + number]:
            wanted[stem][name] = mask(f"truth/{name}/{stem}_{name[3:]}.tif", number)
    for stem in wanted:
        image(f"fundus/{stem}.jpg")
    lesions = ("--masks", "fundus/{id}.jpg", "truth/{class}/{id}_*.tif", *ALL)
    refuse_download(*lesions, words=["1 of 3", "fundus/I_3.jpg", "--skip-unpaired"])
    assert "empty: 1 of 3" in run_download(*lesions, "--empty-unmasked")
    assert class_names() == ["1. MA", "2. HE", "5. OD"]
    compare(wanted)
    run_download(*lesions, "--force", "--classes", "5. OD,1. MA", "--skip-unpaired")
    assert class_names() == ["5. OD", "1. MA"]
    refuse_download(*lesions, "--force", "--classes", "OD", words=["OD"])


def test_all_values_of_a_file_are_its_class(here):
    """Also three hundred numbers of objects, and what is background with --invert."""
    numbers = np.arange(300, dtype=np.uint16).repeat(4).reshape(PHOTO[::-1])
    image("scans/1.png")
    save(grey(range(300), np.uint16)(numbers), "classes/1_cells.png")
    drawn = mask("classes/1_wall.png", 1)
    arguments = ("--masks", "scans/{id}.png", "classes/{id}_{class}.png", *ALL, "--force")
    run_download(*arguments)
    compare({"1": {"cells": numbers > 0, "wall": drawn}})
    run_download(*arguments, "--classes", "wall", "--invert")
    compare({"1": {"wall": ~drawn}})
    refuse_download(*arguments, "--classes", "1=cell", words=["--classes"])


def test_wrong_arguments_are_one_line_and_write_nothing(here):
    image("i/1.bmp")
    mask("i/1.png")
    volume("S/1/ct.nii.gz", 1)
    for arguments, words in (
        ("i/1.bmp i/2.bmp i/1.png", ["3 names", "quotes"]),
        ("i i/001.tif", ["i/001.tif: no such"]),
        ("i i/1.png", ["i: ", "a folder"]),
        ("i/1.bmp i/1.png --channels a,b", ["i/1.bmp", "3 channels", "a, b"]),
        ("S/{id}/ct.nii.gz i/{id}.png --skip-unpaired", ["i/1.png"]),
        ("i/{id}.bmp S/1/{id}.nii.gz --skip-unpaired --empty-unmasked", ["S/1/ct.nii.gz"]),
    ):
        refuse_download("--masks", *arguments.split(" "), *ALL, words=words)


def test_one_wrong_image_or_mask_or_none_with_a_pixel_leaves_nothing(here):
    save_pair("a", grey([0, 0])(labels(0)))
    for flags in ((), ("--classes", "1=x"), ("--invert",)):
        refuse_download(*MASKS, *flags, words=["masks"])
    save_pair("b")
    save(Image.new("L", (30, 40), 1), "masks/b.png")
    refuse_download(*MASKS, words=["masks/b.png", "30x40", "images/b.png", "40x30"])
    Path("images/b.png").write_bytes(Path("images/b.png").read_bytes()[:500])
    refuse_download(*MASKS, words=["b.png"])


@pytest.mark.parametrize("images, masks", [("data", "data/masks"), ("data/images", "data")])
def test_nested_folders_one_inside_the_other(here, images, masks):
    wanted = {}
    for seed, (folder, stem) in enumerate({"p\udcff": "p__1", "q": "q_1"}.items()):
        image(f"{images}/{folder}/1_img.png")
        wanted[stem] = {"foreground": mask(f"{masks}/{folder}/1_m.png", seed)}
    image(f"{images}/.hidden/2.jpg")
    assert "/p\\udcff/1_img.png with " in run_download("--masks", images, masks, *ALL)
    compare(wanted)


def test_what_predict_draws_is_no_mask_unless_it_stands_alone(here):
    image("i/x.png")
    drawn = mask("m/x_mask.png")
    for name in ("x_overlay", "x_2_probability", "report"):
        image(f"m/{name}.png")
    run_download("--masks", "i", "m", *ALL)
    compare({"x": {"foreground": drawn}})
    Path("m/x_mask.png").rename("m/x_montage.png")
    run_download("--masks", "i/{id}.png", "m/{id}_montage.png", *ALL, "--force")
    compare({"x": {"foreground": drawn}})


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_images_are_stored_upright(here, suffix):
    Path("images").mkdir()
    save_turned(photo(), f"images/a{suffix}", 6)
    image = Image.open(f"images/a{suffix}")
    if suffix != ".tif":
        image = ImageOps.exif_transpose(image)
    shown = np.asarray(image.convert("RGB"))
    label_map = labels(1, size=shown.shape[1::-1])  # drawn on the picture as it is shown
    save(grey([0, 1])(label_map), "masks/a.png")
    run_download(*MASKS)
    (file,) = (path for path in Path("dataset/train").iterdir() if path.suffix != ".json")
    assert_array_equal(read_rgb(file), shown)
    assert (file.read_bytes() == Path(f"images/a{suffix}").read_bytes()) == (suffix == ".tif")
    compare({"a": {"foreground": label_map == 1}})
    # A mask that says its own orientation, and one of the size before turning, are turned along.
    save_turned(label_map.astype(np.uint8), "masks/a.png", 6)
    run_download(*MASKS, "--force")
    compare({"a": {"foreground": label_map == 1}})
    save(Image.fromarray(STORED_TURNED[6](label_map.astype(np.uint8))), "masks/a.png")
    run_download(*MASKS, "--force")
    compare({"a": {"foreground": label_map == 1}})


# ---------------------------------------------------------------- a folder without patterns


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
    save(grey([0, 255])(mask) if is_mask else photo(seed), path)
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
        assert_array_equal(np.any([*own.values()], 0), mask, path)
        if mask.shape == PHOTO[::-1]:
            pixels = read_rgb(Path("dataset/train", record["file_name"]))
            assert_array_equal(pixels, read_rgb(Path("D", path)))


def test_what_is_not_sure_is_asked_about(here, capsys):
    def asked(folder):
        with pytest.raises(ValueError, match=f"^{folder}: "):
            find_layout(folder)
        printed = capsys.readouterr().out
        assert "the same as" not in printed
        return printed

    make("none/im/{}.png", "none/ms/{}.png")
    assert asked("D/none") == ""
    make("two/{}.jpg", "two/{}_1stHO.png|two/{}_2ndHO.png")
    assert "'D/two/{id:**}_1stHO.*'" in asked("D/two")
    make("one/PNG/images/{}.png", "one/PNG/mask/{}.png")
    path = Path("D/one/PNG/images/01.png")
    first = path.read_bytes()
    path.write_bytes(path.with_name("02.png").read_bytes())
    printed = asked("D/one")
    assert "'D/one/**/mask/{id:**}.*'" in printed and "there twice" in printed
    path.write_bytes(first)
    for folder in ("images", "mask"):  # the same pixels in another format
        save(Image.open(f"D/one/PNG/{folder}/01.png"), f"D/one/TIF/{folder}/01.tif")
    printed = asked("D/one")
    assert "'D/one/**/{n}/mask/{id}.*'" in printed and "there twice" in printed
    masks = [*Path("D/one").glob("*/mask/*")]
    for path in masks:
        Image.fromarray(np.pad(np.full((26, 36), 255, np.uint8), 2)).save(path)
    assert "is foreground" in asked("D/one")  # a field of view
    for number, path in enumerate(masks, 50):
        photo(number).save(path)
    assert "which are masks" in asked("D/one")


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
