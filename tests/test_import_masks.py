"""download.py --masks: channels, groups and classes by the names of files; pictures as shown."""

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
    class_names,
    grey,
    labels,
    photo,
    read_rgb,
    refuse_download,
    run_download,
    save,
    save_pair,
    save_turned,
    script,
    stored,
    write_nifti,
)
from numpy.testing import assert_array_equal
from PIL import Image, ImageOps

from medseg.images import read_image

VOXELS = (8, 6, 5)  # cut across the last axis
BRATS = ("--masks", "B/{id}/{id}_{channel}.nii", "B/{id}/*_{seg,Segm}.nii")
SCANS = ("--masks", "S/{id}/ct.nii.gz", "S/{id}/segmentations/{class}.nii.gz", *ALL)
LESIONS = ("--masks", "fundus/{id}.jpg", "truth/{class}/{id}_*.tif", *ALL)
CLASSES = ("--masks", "scans/{id}.png", "classes/{id}_{class}.png", *ALL)


def image(path, seed=0):
    save(photo(seed), path)


def mask(path, seed=0):
    """Write a mask of one class; returns it."""
    drawn = labels(seed)
    save(grey((0, 255))(drawn), path)
    return drawn == 1


def volume(path, seed=0, values=2, zooms=(1, 1, 3)):
    """Write a volume of numbers below `values`; returns it."""
    voxels = np.random.default_rng(seed).integers(0, values, VOXELS).astype(np.int16)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, voxels, zooms=zooms)
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


# ---------------------------------------------------------------- {channel}


def brats(*cases, modalities=("flair", "t1", "t1ce", "t2")):
    """Cases with a mask of 0, 1, 2 and 4, the last of another name: {case: {modality: voxels}}."""
    made = {}
    for number, case in enumerate(cases):
        paths = {name: f"B/{case}/{case}_{name}.nii" for name in modalities}
        own = made[case] = {n: volume(path, 10 * number + len(n), 900) for n, path in paths.items()}
        own["seg"] = np.array([0, 1, 2, 4], np.int16)[volume("x.nii", number, 4)]
        seg = f"B/{case}/{case}_seg" if case != cases[-1] else f"B/{case}/W39_Segm"
        write_nifti(f"{seg}.nii", own["seg"], zooms=(1, 1, 3))
    return made


def assert_pixels(channels, name):
    """An image holds these slices, each from the 0.5 to 99.5 percentiles of its volume."""
    z, shown = int(name[-3:]), []
    for voxels in channels:
        low, high = np.percentile(voxels, (0.5, 99.5))
        shown.append(((voxels[..., z].clip(low, high) - low) / (high - low) * 255).round())
    assert_array_equal(tifffile.imread(f"dataset/train/{name}.tif"), np.stack(shown, -1))


def test_modalities_become_the_channels_of_each_slice(here):
    made, names = brats("B_1", "B_2", "B_355"), {1: "core", 2: "oedema", 4: "enhancing"}
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
    run_download(*BRATS, *ALL, "--channels", "t2,flair", "--force")
    assert annotations("train")["info"]["channels"] == ["t2", "flair"]
    assert_pixels([made["B_1"][name] for name in ("t2", "flair")], "B_1_z002")
    refuse_download(*BRATS, "--into", "valid", words=["t2, flair", "--channels"])
    run_download(*BRATS, "--into", "valid", "--channels", "t2,flair")


def test_wrong_modalities_are_named(here):
    made = brats("B_1", "B_2", modalities=("t1", "t1ce", "t2"))
    Path("B/B_2/B_2_t1ce.nii").unlink()
    refuse_download(*BRATS, *ALL, words=["B/B_2/B_2_t1ce.nii", "--skip-unpaired"])
    run_download(*BRATS, *ALL, "--skip-unpaired")
    assert groups("train") == {"B_1"}
    shifted = np.diag([1.0, 1, 3, 1])
    shifted[0, 3] = 7.5
    write_nifti("B/B_1/B_1_t2.nii", made["B_1"]["t2"], shifted)
    both = (*BRATS, *ALL, "--skip-unpaired", "--force")
    refuse_download(*both, words=["B_1_t2.nii", "7.5 mm"])
    refuse_download(*both, "--context", 7, "--channels", "t1,t1ce", words=["--context 7"])


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


# ---------------------------------------------------------------- {group}


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
    """The line says how a pattern keeps them together, and that one does."""
    for number in range(18):
        name = pattern.format(group=f"p{number % 6}", id=f"{number:02}")
        image(f"i/{name}.png", number)
        mask(f"m/{name}.png", number)
    (line,) = (line for line in run_download("--masks", "i", "m").splitlines() if "note: " in line)
    assert "18 images are of 6" in line and f" {pattern} " in line
    out = run_download("--masks", f"i/{pattern}.png", f"m/{pattern}.png", "--force")
    assert "groups: 6" in out and "note: " not in out


# ---------------------------------------------------------------- {class}


def test_classes_are_those_of_the_names(here):
    """Of three, two and none of them, which --empty-unmasked takes for a healthy case."""
    wanted = {"I_1": {}, "I_2": {}, "I_3": {}}
    for number, name in enumerate(("1. MA", "2. HE", "5. OD")):
        for stem in ("I_1", "I_2")[: 1 + number]:
            wanted[stem][name] = mask(f"truth/{name}/{stem}_{name[3:]}.tif", number)
    for stem in wanted:
        image(f"fundus/{stem}.jpg")
    refuse_download(*LESIONS, words=["1 of 3", "fundus/I_3.jpg", "--skip-unpaired"])
    assert "empty: 1 of 3" in run_download(*LESIONS, "--empty-unmasked")
    assert class_names() == ["1. MA", "2. HE", "5. OD"]
    compare(wanted)
    run_download(*LESIONS, "--force", "--classes", "5. OD,1. MA", "--skip-unpaired")
    assert class_names() == ["5. OD", "1. MA"]
    refuse_download(*LESIONS, "--force", "--classes", "OD", words=["OD"])


def test_all_values_of_a_file_are_its_class(here):
    """Also three hundred numbers of objects, and what is background with --invert."""
    numbers = np.arange(300, dtype=np.uint16).repeat(4).reshape(PHOTO[::-1])
    image("scans/1.png")
    save(grey(range(300), np.uint16)(numbers), "classes/1_cells.png")
    drawn = mask("classes/1_wall.png", 1)
    run_download(*CLASSES)
    compare({"1": {"cells": numbers > 0, "wall": drawn}})
    run_download(*CLASSES, "--classes", "wall", "--force", "--invert")
    compare({"1": {"wall": ~drawn}})
    refuse_download(*CLASSES, "--force", "--classes", "1=cell", words=["--classes"])


def test_a_volume_for_each_organ(here):
    """A class may be empty in all of its files, and a scan without any."""
    for seed, name in enumerate(("s0", "s1")):
        volume(f"S/{name}/ct.nii.gz", seed, 900)
    path, wanted = "S/s0/segmentations/{}.nii.gz", {}
    masks = {organ: volume(path.format(organ), len(organ)) == 1 for organ in ("liver", "spleen")}
    volume(path.format("aorta"), 0, 1)
    run_download(*SCANS, "--empty-unmasked")
    assert class_names() == ["aorta", "liver", "spleen"]
    for z in range(VOXELS[2]):
        wanted[f"s0_z{z:03}"] = {organ: own[..., z] for organ, own in masks.items()}
        wanted[f"s1_z{z:03}"] = {}
    compare(wanted)


REFUSED = {  # the arguments of --masks, what the message names
    "i": ["i", "two"],
    "i/1.bmp i/2.bmp i/1.png": ["3 names", "quotes"],
    "i i/001.tif": ["i/001.tif: no such"],
    "i i/1.png": ["i: ", "a folder"],
    "i/1.bmp i/1.png --channels a,b": ["i/1.bmp", "3 channels", "a, b"],
    "S/{id}/ct.nii.gz i/{id}.png --skip-unpaired": ["i/1.png"],
    "i/{id}.bmp S/1/{id}.nii.gz --skip-unpaired --empty-unmasked": ["S/1/ct.nii.gz"],
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_wrong_arguments_are_one_line_and_write_nothing(here, arguments):
    for number in (1, 2, 3):
        image(f"i/{number}.bmp", number)
        mask(f"i/{number}.png", number)
    volume("S/1/ct.nii.gz", 1)
    refuse_download("--masks", *arguments.split(" "), *ALL, words=REFUSED[arguments])


# ---------------------------------------------------------------- files


def test_one_wrong_image_or_mask_or_an_empty_folder_leaves_nothing(here):
    save_pair("a")
    save_pair("b")
    save(Image.new("L", (30, 40), 1), "masks/b.png")
    refuse_download(*MASKS, words=["masks/b.png", "30x40", "images/b.png", "40x30"])
    Path("images/b.png").write_bytes(Path("images/b.png").read_bytes()[:500])
    refuse_download(*MASKS, words=["b.png"])
    Path("nothing").mkdir()
    refuse_download("--masks", "images", "nothing", *ALL, words=["nothing"])


def test_masks_that_are_all_empty(here):
    save_pair("a", grey([0, 0])(labels(0)))
    refuse_download("--masks", "images/{id}.png", "masks/{id}.{class}", *ALL, words=["no pixel"])
    for flags in ((), ("--classes", "1=x"), ("--classes", "*=x"), ("--invert",)):
        refuse_download(*MASKS, *flags, words=["masks"])


def test_names_that_cannot_be_printed(here):
    save_pair("a\udcff")
    save_pair("b\nc")
    result = script("download.py", *MASKS, cwd=here)
    assert (result.returncode, result.stderr) == (0, "")
    assert "such as images/a\\udcff.png with masks/a\\udcff.png\n" in result.stdout
    assert set(stored()) == {"a_", "b_c"}


@pytest.mark.parametrize("folders", ["data data/masks", "data/images data", "data/i data/m"])
def test_nested_folders_and_one_inside_the_other(here, folders):
    """The patterns that they stand for are printed, and do the same."""
    images, masks = folders.split()
    for seed, folder in enumerate("pq"):
        image(f"{images}/{folder}/1_img.png")
        mask(f"{masks}/{folder}/1_m.png", seed)
    image(f"{images}/.hidden/2.jpg")
    command, pairs, *_ = run_download("--masks", images, masks, *ALL).splitlines()
    before = stored()
    assert "pairs: 2 " in pairs and set(before) == {"p_1", "q_1"}
    run_download(*shlex.split(command.removeprefix("the same as: ")), *ALL, "--force")
    compare(before)


def test_what_predict_draws_is_no_mask_unless_it_stands_alone(here):
    image("i/x.png")
    drawn, pictures = mask("m/x_mask.png"), ("x_overlay", "x_2_probability", "report")
    for name in pictures:
        image(f"m/{name}.png")
    run_download("--masks", "i", "m", *ALL)
    compare({"x": {"foreground": drawn}})
    Path("m/x_mask.png").rename("m/x_montage.png")
    run_download("--masks", "i/{id}.png", "m/{id}_montage.png", *ALL, "--force")
    compare({"x": {"foreground": drawn}})


@pytest.mark.parametrize("suffix, orientation", [(".jpg", 6), (".png", 4), (".tif", 6)])
def test_images_are_stored_upright(here, suffix, orientation):
    Path("images").mkdir()
    save_turned(photo(), f"images/a{suffix}", orientation)
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
    if orientation >= 5:
        save(Image.fromarray(STORED_TURNED[orientation](label_map.astype(np.uint8))), "masks/a.png")
        run_download(*MASKS, "--force")
        compare({"a": {"foreground": label_map == 1}})
