"""The pattern language: patterns, the pairs that they stand for, and what is wrong with others.

A pair is spelled 'image < mask'; several files of a side are joined by ' + ', and those of a
channel or a class are named: 'flair=a.nii + t1=b.nii < tumour=c.nii'. A group is in [].
"""

import re
from pathlib import Path

import pytest
from helpers import ROOT

from medseg.importing.pairs import pair, patterns_of_folders

pytestmark = pytest.mark.usefixtures("here")

DOCUMENTED = re.findall(
    r"'([^' ]*\{[^' ]*)' '([^' ]*\{[^' ]*)'", (ROOT / "docs" / "own-data.md").read_text("utf-8")
)
# Two patterns, the pairs of files that they stand for, and what else lies there: a line each. Of
# two readings of a name the longest {id} is meant.
RULES = """
{train,val}/i/{id}.{jpg,p*} */m/{id}.png
    train/i/0.png < train/m/0.png
    val/i/1.jpg < val/m/1.png
    also old/i/2.png
{id}.png {id}_{class}.png
    i_1.png < axon=i_1_axon.png + axon_b=i_1_axon_b.png
    i_2.png < axon=i_2_axon.png
{group}_{id}_{n}.png {group}_{id}_{n}_mask.png
    [p07] p07_left_3.png < p07_left_3_mask.png
D/**/a*_{id}.png D/{id}.tif
    D/sub/a1_7.png < D/7.tif
    also D/a1/b_7.png
{group}/{id}.png m/{class}/{id}.png
    [P1] P1/a.png < Axon=m/Axon/a.png
    [P1] p1/b.png < Axon=m/axon/b.png
*_{id}.png {id}.tif
    x_1_2.png < 1_2.tif
{id}.jpg {id}_*.png
    a.jpg < a_y_m.png
    a_1.jpg < a_1_x_m.png
i/{id:**}.* m/{id:**}.*
    i/2.jpg < m/2.png
    i/a/1.png < m/a/1.png
    also i/._1.png, i/.hidden/2.png, i/Thumbs.db, m/._1.png
set#(?)[1]/{id}.png m&M/{id}.png
    Set#(?)[1]/S0.PNG < M&m/s0.png
图/Zähler_{id}.png M/Z*_{id}.png
    图/Za\u0308hler_1.png < M/Zähler_1.png
{x}/{y,z}/i/{id}.png {x}/{y,z}/m/{id}.png
    {x}/{y,z}/i/1.png < {x}/{y,z}/m/1.png
"""  # of the language
SCANS = "a_t1.nii a_t2.nii a_seg.nii b_t1.nii b_t2.nii b_seg.nii c_t1.nii c_seg.nii".split()
CHANNELS = "{id}_{channel}.nii", "{id}_seg.nii"
WRONG = [  # files, the patterns, what the message has
    ("im/a.png m/a.png", "im/{id}.tif m/{id}.png", ["1 .png", "a.png"]),
    ("D/x/im/a.png m/a.png", "D/{id}/imgs/*.png m/{id}.png", ["D/x/", "im"]),
    ("images/a.png m/a.png", "image/{id}.png m/{id}.png", ["image", "images"]),
    ("i/a.png", "i/{ID}.png m/{id}.png", ["{ID}", "{channel}"]),
    ("i/a.png m/a.png", "i/*.png m/*.png", ["{id}"]),
    ("i/a.png m/a.png", "{id}_{class}.png m/{id}.png", ["{class}", "masks"]),
    ("i/a.png", "i/{id}{n}.png m/{id}.png", ["between"]),
    ("i/a.png m/1/a.png", "i/{id}.png m/{n}/{id}.png", ["{n}", "*"]),
    ("i/a.png i/b.png m/a.png m/c.png", "i/{id}.png m/{id}.png", ["i/b.png", "1 of 2", "m/c.png"]),
    ("t/i/0.png v/i/0.png t/m/0.png", "*/i/{id}.png t/m/{id}.png", ["t/i/0.png", "v/i/0.png"]),
    ("x.jpg x_1.png x_2.png", "{id}.jpg {id}_*.png", ["x_1.png", "x_2.png", "{part}", "{class}"]),
    ("a.png a.bmp", "{id}.* {id}.*", ["{id}.*"]),
    (" ".join(SCANS), " ".join(CHANNELS), ["1 of 3", "c_t2.nii", "--skip-unpaired"]),
    ("a_0.nii a.nii b_0.nii b.nii c_0.nii c_1.nii c.nii", "{id}_{channel}.nii {id}.nii",
     ["c has 1", "--channels 0"]),
]  # fmt: skip


def make_files(names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def spell(case):
    def side(files):
        named = [(name, path) for name, paths in files.items() for path in paths]
        return " + ".join(f"{name}={path}" if name else str(path) for name, path in named)

    group = f"[{case.group}] " if case.group else ""
    images = side({name: [path] for name, path in case.images.items()})
    return f"{group}{images} < {side(case.masks)}"


def pairs(*patterns, **options):
    return [spell(case) for case in pair(*patterns, **options)]


@pytest.mark.parametrize("images, masks", DOCUMENTED)
def test_documented_patterns_pair_what_they_stand_for(images, masks):
    """Of alternatives the first, and of placeholders their names: {id:**} is 'id'."""
    for text in (images, masks):
        path = re.sub(r"\{(\w+)[^{}]*\}", r"\1", text).replace("**", "a/b").replace("*", "w")
        make_files([f"{path}slice" if path[-1] == "/" else path])
    (case,) = pair(images, masks)
    assert case.parts[-1:] == ("id",) and case.group == ("group" if "{group}" in images else "")


@pytest.mark.parametrize("row", re.split(r"\n(?! )", RULES.strip()))
def test_files_are_paired(row):
    patterns, *lines = row.split("\n    ")
    wanted = [line for line in lines if " < " in line]
    files = re.split(" [<+] |, ", " + ".join(lines).replace("also ", ""))
    make_files(re.sub(r"^\[.*?\] |^\w+=", "", file) for file in files)
    assert sorted(pairs(*patterns.split())) == sorted(wanted)


@pytest.mark.parametrize("files, patterns, words", WRONG)
def test_what_is_wrong_is_told(files, patterns, words):
    make_files(files.split())
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        pair(*patterns.split())
    (message,) = str(error.value).splitlines()
    assert all(word in message for word in words), message


def test_channels_and_classes_are_chosen_and_ordered():
    make_files([*SCANS, "a_x_y.nii", "b_x_y.nii", "i/a.png", "m/a_axon.png", "m/a_myelin.png"])
    assert pairs(*CHANNELS, channels=["T1"]) == [f"t1={n}_t1.nii < {n}_seg.nii" for n in "abc"]
    chosen = pairs(*CHANNELS, channels=["x_y", "t1"], skip_unpaired=True)
    assert chosen == [f"x_y={n}_x_y.nii + t1={n}_t1.nii < {n}_seg.nii" for n in "ab"]
    for channels, words in ((["t2", "t1"], "c_t2.nii"), (["flair"], "flair.*t1")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            pair(*CHANNELS, channels=channels)
    with pytest.raises(ValueError, match="--channels"):
        pair("{id}_t1.nii", "{id}_seg.nii", channels=["t1"])
    patterns = "i/{id}.png", "m/{id}_{class}.png"
    assert pairs(*patterns, classes=["Axon"]) == ["i/a.png < Axon=m/a_axon.png"]
    with pytest.raises(ValueError, match="nerve.*axon"):
        pair(*patterns, classes=["nerve"])


def test_links_are_followed_but_not_in_a_circle(here):
    make_files(["far/sub/1.png", "m/1.png"])
    Path("i").mkdir()
    for link, target in (("i/link", "far"), ("far/sub/up", "i"), ("far/itself", "far/itself")):
        Path(link).symlink_to(here / target)
    assert pairs("i/**/{id}.png", "m/{id}.png") == ["i/link/sub/1.png < m/1.png"]


@pytest.mark.parametrize(
    "images, masks, expected",
    [
        ("IS_1.jpg IS_2.jpg", "IS_1_Seg.png IS_2_Seg.png", ("{id}.jpg", "{id}_seg.png")),
        ("img_1.png img_2.png", "mask_1.png mask_2.png", ("img_{id}.png", "mask_{id}.png")),
        ("i001.png i012.png", "la001.png la012.png", ("i{id}.png", "la{id}.png")),
        ("21_t.tif 22_t.tif", "21_m1.gif 22_m1.gif", ("{id}_t.tif", "{id}_m1.gif")),
        ("a.jpg b.png", "a.png b.png", ("{id}.*", "{id}.png")),
        ("s/1.ppm s/2.ppm", "s/1.ah.ppm s/2.ah.ppm", ("{id:**}.ppm", "{id:**}.ah.ppm")),
        ("Za\u0308.png Ü.png", "Z\xe4_m.png U\u0308_m.png", ("{id}.png", "{id}_m.png")),
    ],
)
def test_two_folders_write_two_patterns(images, masks, expected):
    make_files([f"A/{name}" for name in images.split()] + [f"B/{name}" for name in masks.split()])
    found = patterns_of_folders("A", "B")
    assert found == (f"A/{expected[0]}", f"B/{expected[1]}") and len(pair(*found)) == 2


def test_a_lone_name_keeps_its_digits():
    make_files(["A/scan_5.png", "B/scan_7_mask.png", "C/notes.txt"])
    for masks, words in (("B", "scan_5.*scan_7_mask"), ("C", "C: holds no images.*txt")):
        with pytest.raises(ValueError, match=words):
            patterns_of_folders("A", masks)
