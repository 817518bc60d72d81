"""The pattern language: trees of empty files, their patterns, and the pairs written by hand.

A pair is spelled 'image < mask', paths below the tree; several of a side are joined by ' + ', and
those of a channel or a class are named: 'flair=a.nii + t1=b.nii < tumour=c.nii'. A group is in [].
"""

import os
import unicodedata

import pytest

from medseg.importing.pairs import pair, patterns_of_folders
from medseg.patterns import has_placeholder, match, name_pattern

NFD = unicodedata.normalize("NFD", "Zähler")
LAYOUTS = {  # name: (files, pattern of images, pattern of masks, pairs)
    "one of two readers": (
        "x.jpg x_1stHO.png x_2ndHO.png", "{id}.jpg", "{id}_1stHO.png", "x.jpg < x_1stHO.png",
    ),
    "em": (
        "train/images/0.png train/masks/0.png val/images/0.png val/masks/0.png",
        "{n}/images/{id}.png", "{n}/masks/{id}.png",
        "train/images/0.png < train/masks/0.png", "val/images/0.png < val/masks/0.png",
    ),
    "alternatives": (
        "train/images/0.png train/masks/0.png val/images/1.png val/masks/1.png old/images/2.png",
        "{train,val}/images/{id}.{jpg,p*}", "{train/masks,val/masks}/{id}.png",
        "train/images/0.png < train/masks/0.png", "val/images/1.png < val/masks/1.png",
    ),
    "brats 2020": (
        "B_1/B_1_t1.nii B_1/B_1_t1ce.nii B_1/B_1_seg.nii B_355/B_355_t1.nii B_355/B_355_t1ce.nii "
        "B_355/W39_1998.09.19_Segm.nii",
        "{id}/{id}_{channel}.nii", "{id}/*_{seg,Segm}.nii",
        "t1=B_1/B_1_t1.nii + t1ce=B_1/B_1_t1ce.nii < B_1/B_1_seg.nii",
        "t1=B_355/B_355_t1.nii + t1ce=B_355/B_355_t1ce.nii < B_355/W39_1998.09.19_Segm.nii",
    ),
    "one folder, a class each": (
        "i_1.png i_1_axon.png i_1_axon_b.png i_2.png i_2_axon.png", "{id}.png", "{id}_{class}.png",
        "i_1.png < axon=i_1_axon.png + axon_b=i_1_axon_b.png", "i_2.png < axon=i_2_axon.png",
    ),
    "the longest identity": (
        "i/a.png i/a_1.png m/a_x.png m/a_1_x.png m/a_1_y_z.png", "i/{id}.png", "m/{id}_{class}.png",
        "i/a.png < x=m/a_x.png", "i/a_1.png < x=m/a_1_x.png + y_z=m/a_1_y_z.png",
    ),
    "identity in three": (
        "p07_left_3.png p07_left_3_mask.png p8_right_1.png p8_right_1_mask.png",
        "{group}_{id}_{n}.png", "{group}_{id}_{n}_mask.png",
        "[p07] p07_left_3.png < p07_left_3_mask.png", "[p8] p8_right_1.png < p8_right_1_mask.png",
    ),
    "a star takes little": ("x_1_2.png 1_2.tif", "*_{id}.png", "{id}.tif", "x_1_2.png < 1_2.tif"),
    "paths as identity": (
        "img/a/1.png img/2.jpg lab/a/1.png lab/2.png", "img/{id:**}.*", "lab/{id:**}.*",
        "img/2.jpg < lab/2.png", "img/a/1.png < lab/a/1.png",
    ),
    "twins of two suffixes": (
        "1.bmp 1.png 2.bmp 2.png", "{id}.*", "{id}.png", "1.bmp < 1.png", "2.bmp < 2.png",
    ),
    "case, and what is itself": (
        "Set [1]/S0.PNG|Set [1]/x#(?).png|M & m/s0.png|M & m/X#(?).png",
        "set [1]/{id}.png", "m & M/{id}.png",
        "Set [1]/S0.PNG < M & m/s0.png", "Set [1]/x#(?).png < M & m/X#(?).png",
    ),
    "unicode form": (
        f"图/Zähler.png|M/{NFD}.png", "图/{id}.png", "M/{id}.png", f"图/Zähler.png < M/{NFD}.png",
    ),
    "braces on the disk": (
        "a {x}/{y,z}/i/1.png|a {x}/{y,z}/m/1.png", "a {x}/{y,z}/i/{id}.png",
        "a {x}/{y,z}/m/{id}.png", "a {x}/{y,z}/i/1.png < a {x}/{y,z}/m/1.png",
    ),
    "hidden files": (
        "i/1.png i/._1.png i/.hidden/2.png i/Thumbs.db m/1.png m/._1.png", "i/{id:**}.*",
        "m/{id}.png", "i/1.png < m/1.png",
    ),
}  # fmt: skip
LUNGS = "i/a.png i/b.png m/a.png m/c.png"
SCANS = "a_t1.nii a_t2.nii a_seg.nii b_t1.nii b_t2.nii b_seg.nii c_t1.nii c_seg.nii"
MESSAGES = {
    "nothing matches": ("im/a.png m/a.png", "im/{id}.tif", "m/{id}.png", ["1 .png", "a.png"]),
    "nothing below": ("D/x/im/a.png m/a.png", "D/{id}/imgs/*.png", "m/{id}.png", ["D/x/", "im"]),
    "no folder": ("images/a.png m/a.png", "image/{id}.png", "m/{id}.png", ["image", "images"]),
    "unknown": ("i/a.png", "i/{ID}.png", "m/{id}.png", ["{ID}", "{channel}"]),
    "no id": ("i/a.png m/a.png", "i/*.png", "m/*.png", ["{id}"]),
    "class of images": ("i/a.png m/a.png", "{id}_{class}.png", "m/{id}.png", ["{class}", "masks"]),
    "channel of masks": ("a.png", "{id}.png", "{id}_{channel}.png", ["{channel}", "images"]),
    "no text between": ("i/a.png", "i/{id}{n}.png", "m/{id}.png", ["between"]),
    "n of masks alone": ("i/a.png m/1/a.png", "i/{id}.png", "m/{n}/{id}.png", ["{n}", "*"]),
    "no identity agrees": (
        "i/21_train.png m/21_manual.png", "i/{id}.png", "m/{id}.png", ["21_train", "21_manual"],
    ),
    "without a mask": (LUNGS, "i/{id}.png", "m/{id}.png", ["1 of 2 images", "i/b.png", "--skip-"]),
    "without an image": (LUNGS, "i/{id}.png", "m/{id}.png", ["1 of 2 masks", "m/c.png", "--skip-"]),
    "image twice": ("i/a.jpg i/a.png m/a.png", "i/{id}.*", "m/{id}.png", ["i/a.jpg", "suffix"]),
    "image in two folders": (
        "t/i/0.png v/i/0.png t/m/0.png v/m/0.png", "*/i/{id}.png", "*/m/{id}.png",
        ["t/i/0.png", "v/i/0.png", "{n}"],
    ),
    "two masks": (
        "x.jpg x_1stHO.png x_2ndHO.png", "{id}.jpg", "{id}_*.png",
        ["x_1stHO.png", "x_2ndHO.png", "{part}", "{class}"],
    ),
    "a second reader": ("x.png x_r1.png x_r2.png", "{id}.png", "{id}_r1.png", ["x_r2.png"]),
    "the same files": ("a.png a.bmp", "{id}.*", "{id}.*", ["{id}.*"]),
    "a channel is missing": (
        SCANS, "{id}_{channel}.nii", "{id}_seg.nii", ["1 of 3", "t2", "c_t2.nii", "--skip-"],
    ),
    "a mask that could be a channel": (
        "a_t1.nii a_seg.nii d_seg.nii", "{id}_{channel}.nii", "{id}_seg.nii", ["d_t1.nii"],
    ),
    "a channel more": (
        "a_0.nii a.nii b_0.nii b.nii c_0.nii c_1.nii c.nii", "{id}_{channel}.nii", "{id}.nii",
        ["c has 1", "--channels 0"],
    ),
}  # fmt: skip


def make_tree(root, text):
    for name in text.split("|" if "|" in text else " "):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def spell(root, case):
    def side(files):
        return " + ".join(
            f"{name}={path}" if name else path
            for name, paths in files.items()
            for path in (os.path.relpath(path, root) for path in paths)
        )

    group = f"[{case.group}] " if case.group else ""
    images = side({name: [path] for name, path in case.images.items()})
    return f"{group}{images} < {side(case.masks)}"


def pairs(root, images, masks, **options):
    return [spell(root, case) for case in pair(f"{root}/{images}", f"{root}/{masks}", **options)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_paired(tmp_path, name):
    files, images, masks, *expected = LAYOUTS[name]
    make_tree(tmp_path, files)
    assert sorted(pairs(tmp_path, images, masks)) == sorted(expected)


@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_wrong_is_told(tmp_path, name):
    files, images, masks, told = MESSAGES[name]
    make_tree(tmp_path, files)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        pair(f"{tmp_path}/{images}", f"{tmp_path}/{masks}")
    (message,) = str(error.value).splitlines()
    assert all(text in message for text in told), message


def test_unpaired_files_are_left_out(tmp_path, capsys):
    make_tree(tmp_path, LUNGS)
    assert pairs(tmp_path, "i/{id}.png", "m/{id}.png", skip_unpaired=True) == ["i/a.png < m/a.png"]
    assert capsys.readouterr().out.count("1 of 2") == 2
    make_tree(tmp_path, SCANS)
    found = pairs(tmp_path, "{id}_{channel}.nii", "{id}_seg.nii", skip_unpaired=True)
    assert found == [f"t1={n}_t1.nii + t2={n}_t2.nii < {n}_seg.nii" for n in "ab"]
    assert "c_t2.nii" in capsys.readouterr().out


def test_channels_are_chosen_and_ordered(tmp_path):
    make_tree(tmp_path, SCANS + " a_x_y.nii b_x_y.nii")
    patterns = "{id}_{channel}.nii", "{id}_seg.nii"
    assert pairs(tmp_path, *patterns, channels=["T1"]) == [
        f"t1={n}_t1.nii < {n}_seg.nii" for n in "abc"
    ]
    chosen = pairs(tmp_path, *patterns, channels=["x_y", "t1"], skip_unpaired=True)
    assert chosen == [f"x_y={n}_x_y.nii + t1={n}_t1.nii < {n}_seg.nii" for n in "ab"]
    with pytest.raises(ValueError, match="c_t2.nii"):
        pairs(tmp_path, *patterns, channels=["t2", "t1"])
    with pytest.raises(FileNotFoundError, match="flair.*t1"):
        pairs(tmp_path, *patterns, channels=["flair"])
    with pytest.raises(ValueError, match="--channels"):
        pairs(tmp_path, "{id}_t1.nii", "{id}_seg.nii", channels=["t1"])


def test_classes_are_chosen(tmp_path):
    make_tree(tmp_path, "i/a.png m/a_axon.png m/a_myelin.png")
    patterns = "i/{id}.png", "m/{id}_{class}.png"
    assert pairs(tmp_path, *patterns, classes=["Axon"]) == ["i/a.png < Axon=m/a_axon.png"]
    with pytest.raises(ValueError, match="nerve.*axon"):
        pairs(tmp_path, *patterns, classes=["nerve"])


def test_the_case_of_groups_and_classes_does_not_count(tmp_path):
    make_tree(tmp_path, "P1/a.png p1/b.png m/Axon/a.png m/axon/b.png")
    found = pair(f"{tmp_path}/{{group}}/{{id}}.png", f"{tmp_path}/m/{{class}}/{{id}}.png")
    assert len({case.group for case in found}) == 1
    assert len({name for case in found for name in case.masks}) == 1


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    make_tree(tmp_path, "far/sub/1.png m/1.png")
    (tmp_path / "i").mkdir()
    (tmp_path / "i/link").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "far/sub/up").symlink_to(tmp_path / "i", target_is_directory=True)
    (tmp_path / "far/itself").symlink_to(tmp_path / "far/itself")
    assert pairs(tmp_path, "i/**/{id}.png", "m/{id}.png") == ["i/link/sub/1.png < m/1.png"]


def test_one_side_is_matched_and_a_missing_channel_is_named(tmp_path):
    make_tree(tmp_path, "p_1_flair.nii p_1_t1.nii p_1_seg.nii p_2_flair.nii p_2_t1.nii")
    found = match(f"{tmp_path}/{{id}}_{{channel}}.nii", ["t1", "flair"])
    assert [spell(tmp_path, case) for case in found] == [
        f"t1=p_{n}_t1.nii + flair=p_{n}_flair.nii < " for n in "12"
    ]
    assert [case.parts for case in found] == [("p_1",), ("p_2",)]
    (tmp_path / "p_1_t1.nii").unlink()
    with pytest.raises(ValueError, match="p_1_t1.nii"):
        match(f"{tmp_path}/{{id}}_{{channel}}.nii", ["t1", "flair"])


def test_the_names_of_the_files_of_a_case():
    assert name_pattern("a/{id}/{id}_{channel}.nii") == "{id}_{channel}.nii"
    assert name_pattern("a/{channel}/{id}.nii") == "{channel}/{id}.nii"


def test_without_an_id_a_folder_is_one_image(tmp_path):
    make_tree(tmp_path, "flair.nii t1.nii")
    (case,) = match(f"{tmp_path}/{{channel}}.nii", need_id=False)
    assert spell(tmp_path, case) == "flair=flair.nii + t1=t1.nii < "


def test_a_slash_at_the_end_names_folders(tmp_path):
    make_tree(tmp_path, "1/dicom/IM0 1/seg.nii 2/dicom/IM0 2/seg.nii")
    expected = ["1/dicom < 1/seg.nii", "2/dicom < 2/seg.nii"]
    assert pairs(tmp_path, "{id}/dicom/", "{id}/seg.nii") == expected


@pytest.mark.parametrize(
    "images, masks, expected",
    [
        ("ISIC_1.jpg ISIC_2.jpg", "ISIC_1_Segmentation.png ISIC_2_Segmentation.png",
         ("{id}.jpg", "{id}_segmentation.png")),
        ("img_1.png img_2.png", "mask_1.png mask_2.png", ("img_{id}.png", "mask_{id}.png")),
        ("image001.png image012.png", "label001.png label012.png",
         ("image{id}.png", "label{id}.png")),
        ("21_training.tif 22_training.tif", "21_manual1.gif 22_manual1.gif",
         ("{id}_training.tif", "{id}_manual1.gif")),
        ("a.jpg b.png", "a.png b.png", ("{id}.*", "{id}.png")),
        ("s/im0001.ppm s/im0002.ppm", "s/im0001.ah.ppm s/im0002.ah.ppm",
         ("{id:**}.ppm", "{id:**}.ah.ppm")),
        ("1_h.jpg 2_h.jpg ._3_h.jpg", "1_h.tif 2_h.tif", ("{id}.jpg", "{id}.tif")),
    ],
)  # fmt: skip
def test_two_folders_write_two_patterns(tmp_path, images, masks, expected):
    make_tree(tmp_path / "A", images)
    make_tree(tmp_path / "B", masks)
    found = patterns_of_folders(f"{tmp_path}/A", f"{tmp_path}/B")
    assert found == (f"{tmp_path}/A/{expected[0]}", f"{tmp_path}/B/{expected[1]}")
    assert len(pair(*found)) == 2


def test_a_lone_name_keeps_its_digits(tmp_path):
    make_tree(tmp_path, "A/scan_5.png B/scan_7_mask.png")
    with pytest.raises(ValueError, match="scan_5.*scan_7_mask"):
        patterns_of_folders(f"{tmp_path}/A", f"{tmp_path}/B")


def test_what_is_there_is_no_pattern(tmp_path, monkeypatch):
    make_tree(tmp_path, "a {id}/1.png|2")
    monkeypatch.chdir(tmp_path)
    assert has_placeholder("b/{id}.png") and has_placeholder("b/{ID}.png")
    assert not has_placeholder("a {id}") and not has_placeholder("b/*.{png,jpg}")
