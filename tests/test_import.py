"""download.py's imports: names, groups, splits, what is replaced, and flags."""

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    PHOTO,
    annotations,
    box,
    class_names,
    coco_file,
    grey,
    labelme,
    labels,
    output_of,
    polygon,
    refuse_download,
    run_download,
    save_pair,
    script_here,
    shape,
    stored,
    tree,
    write_groups,
)
from PIL import Image, ImageDraw, ImageFilter

from medseg import phantoms
from medseg.images import as_picture
from medseg.importing import collect, writing
from medseg.importing.writing import Example, deal_examples, write_dataset
from medseg.run_lengths import encode
from medseg.splits import SPLITS

THIRDS = ("--split", 34, 33, 33)
UNSPLIT = ("--masks", "images", "masks")


def save_pairs(count):
    for number in range(count):
        save_pair(f"{number}", seed=number)


def counts(root="dataset"):
    return {path.name: len(annotations(path.name, root)["images"]) for path in Path(root).iterdir()}


def test_two_calls_keep_a_published_split(here):
    save_pairs(20)
    out = run_download(*UNSPLIT, "--split", 80, 20, 0, "--data", "mine")
    assert counts("mine") == {"train": 16, "valid": 4}
    assert "missing: test" in out and "--into test" in out and "train.py --" not in out
    foreground = np.mean([labels(number) == 1 for number in range(20)])
    assert f"class foreground: value 1, {100 * foreground:.2f} % of the pixels" in out
    before, into = tree("mine"), (*UNSPLIT, "--into", "test", "--data", "mine")
    refuse_download(*into, "--classes", "vessel", words=["foreground", "vessel", "--classes"])
    out = run_download(*into)
    assert "next: python data.py mine\nnext: python train.py --data mine --recipe auto\n" in out
    assert counts("mine") == {"train": 16, "valid": 4, "test": 20}
    assert before.items() <= tree("mine").items()
    refuse_download(*into, words=["mine/test", "--force"])
    for number in range(3, 20):
        Path(f"images/{number}.png").unlink()
    run_download(*into, "--force", "--skip-unpaired")
    assert counts("mine") == {"train": 16, "valid": 4, "test": 3}


def test_the_next_command_suits_the_data(here):
    for number in range(6):
        save_pair(f"{number}", grey([0, 1, 2])(labels(number, 2)), seed=number)
    out = run_download(*UNSPLIT, "--into", "test", "--classes", "cup,disc")
    assert "missing: train" in out and "missing: valid" in out and "python" not in out
    out = run_download(*UNSPLIT, "--data", "own", "--classes", "cup,disc")
    command = "next: python train.py --data own --recipe auto --classes each --folds 4\n"
    assert out.endswith(f"next: python data.py own\n{command}")
    assert output_of("data.py", "own", cwd=here).endswith(command)


def test_a_later_split_may_lack_a_class(here):
    save_pair("a", grey([0, 1, 2, 3])(labels(0, 3)))
    run_download(*UNSPLIT, "--into", "train", "--classes", "one,two,three")
    save_pair("a", grey([0, 1, 0, 3])(labels(0, 3)))
    into = (*UNSPLIT, "--into", "test")
    refuse_download(*into, words=["one, two, three", "1, 3"])
    refuse_download(*into, "--classes", "three,one", words=["one, two, three"])
    run_download(*into, "--classes", "one,three")
    assert class_names("test") == ["one", "two", "three"]
    assert {a["category_id"] for a in annotations("test")["annotations"]} == {1, 3}


# ---- splits and groups ---------------------------------------------------------------------------


def test_split_is_drawn_by_the_seed(here):
    save_pairs(20)
    for data, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_download(*UNSPLIT, "--data", data, "--seed", seed)
    assert counts("a") == counts("c") == {"train": 14, "valid": 3, "test": 3}
    assert set(stored("test", "a")) == set(stored("test", "b")) != set(stored("test", "c"))
    assert "group" not in annotations("train", "a")["images"][0]
    everything = [set(stored(split, "a")) for split in SPLITS]
    assert set.union(*everything) == {str(number) for number in range(20)}


def test_every_split_gets_an_image():
    for count in range(3, 30):
        items = [Example(str(number), "", None) for number in range(count)]
        dealt = deal_examples(items, (90, 5, 5), None, 0)
        assert deal_examples(items[::-1], (90, 5, 5), None, 0) == dealt
        sizes = [len(own) for own in dealt.values()]
        assert sum(sizes) == count and min(sizes) >= 1 and abs(sizes[0] - 0.9 * count) < 2.1
    with pytest.raises(ValueError, match="3 splits"):
        deal_examples(items[:2], (90, 5, 5), None, 0)


def splits_by_group():
    """{first part of a file stem: splits of its images}, a split for each image."""
    places = {}
    for split in SPLITS:
        for stem in stored(split):
            places.setdefault(stem.split("_")[0], []).append(split)
    return places


def test_groups_stay_together(here):
    for patient in range(8):
        for number in range(patient % 3 + 1):
            save_pair(f"p{patient}/{number}")
    flags = (*UNSPLIT, "--split", 50, 25, 25)
    names = [path.relative_to("images").as_posix() for path in Path("images").rglob("*.png")]
    table = write_groups({name: name.split("/")[0] for name in names})
    assert "groups: 8 of groups.csv" in run_download(*flags, *table)
    places = splits_by_group()
    assert len(places) == 8 and all(len(set(splits)) == 1 for splits in places.values())
    for record in annotations("train")["images"]:  # which has no other key of ours
        stem, size = record["file_name"].split("_")[0], {"width": PHOTO[0], "height": PHOTO[1]}
        assert record == {key: record[key] for key in ("id", "file_name")} | {**size, "group": stem}
    for groups, word in (
        (dict.fromkeys(names, "p"), "1 groups"),
        (dict.fromkeys(names[1:], "p"), names[0]),
        ({"": "p"}, "groups.csv"),
        ({"1.png,p\n1.png": "q"}, "1.png"),
    ):
        write_groups(groups)
        refuse_download(*flags, "--force", *table, words=[word])
    refuse_download(*flags, "--force", "--groups", "none.csv", words=["none.csv"])


def test_bids_names_are_subjects(here):
    names = [f"sub-{n}_ses-{s}_T{t}w" for n in (1, 10, "b2") for s in (1, 2) for t in (1, 2)]
    names += [f"sub-{n}/{t}" for n in ("x", "y") for t in ("flair", "dwi")]
    names += ["sub-z", "SUB-1_T1w", "my_sub-1_T1w", "sub-_1", "sub-1é_T1w"]
    for name in names:
        save_pair(name)
    out = run_download(*UNSPLIT, *THIRDS)
    (line,) = (line for line in out.splitlines() if line.startswith("groups: "))
    assert "6 subjects" in line and "17 images" in line and "sub-1:" in line and "--groups" in line
    places = splits_by_group()
    subjects = {"sub-1": 4, "sub-10": 4, "sub-b2": 4, "sub-x": 2, "sub-y": 2, "sub-z": 1}
    for subject, count in subjects.items():
        assert len(places[subject]) == count and len(set(places[subject])) == 1
    assert len(places) == 6 + 4  # the others are no subjects
    table = write_groups({f"{name}.png": name[-1] for name in names})
    assert "subjects" not in run_download(*UNSPLIT, *THIRDS, "--force", *table)
    ends = [{name[-1] for name in stored(split)} for split in SPLITS]
    assert sum(map(len, ends)) == len(set.union(*ends))
    write_groups({"a": 1, "C/b.PNG": 2, "c.png": 3})
    assert collect.find_groups(["x/a.png", "x/c/b.png"], "groups.csv") == ["1", "2"]


@pytest.mark.parametrize("source", ["labelme", "coco"])
def test_bids_names_of_annotated_images(here, source):
    stems = [f"sub-{subject}_{number}" for subject in "abc" for number in range(4)]
    for stem in stems:
        labelme(stem, [shape("a", box(2, 3, 5))])
    coco_file([(n, 2, polygon(3, 4, 6)) for n in range(12)], [f"{stem}.png" for stem in stems])
    flags = ("--labelme", "lm") if source == "labelme" else ("--coco", "c.json", "images")
    assert "3 subjects in the names of 12 images" in run_download(*flags, *THIRDS)
    assert all(len(set(splits)) == 1 for splits in splits_by_group().values())


# ---- whole or not at all -------------------------------------------------------------------------


def test_nothing_is_replaced_unasked(here):
    save_pairs(4)
    run_download(*UNSPLIT)
    Path("dataset/notes.txt").write_text("mine")
    for flags in (UNSPLIT, ("--synthetic",), (), ("--zip", "a.zip")):
        refuse_download(*flags, words=["dataset", "--force"])
    run_download(*UNSPLIT, "--force", "--seed", 3)
    assert Path("dataset/notes.txt").read_text() == "mine"
    inside = ("--masks", "dataset/train", "masks", "--force", "--skip-unpaired")
    refuse_download(*inside, words=["dataset/train"])
    refuse_download("--labelme", ".", "--into", "test", "--force", words=["--data"])
    phantoms.make_phantoms("drawn", (1, 1, 1), size=64)
    refuse_download(*UNSPLIT, "--data", "drawn", words=["drawn/train", "--force"])
    shutil.rmtree("drawn/test")
    into = (*UNSPLIT, "--data", "drawn", "--into", "test", "--classes", "tumour")
    refuse_download(*into, words=["drawn/train"])


def test_interrupted_import_leaves_nothing(here, monkeypatch):
    save_pairs(9)
    run_download(*UNSPLIT)
    before, convert = tree(here), writing._convert

    def stop(example, **options):
        if example.name == "5":
            raise KeyboardInterrupt
        return convert(example, **options)

    monkeypatch.setattr(writing, "_convert", stop)
    for data in ("dataset", "new"):
        result = script_here("download.py", *UNSPLIT, "--force", "--data", data, cwd=here)
        assert (result.returncode, result.stderr) == (130, "download.py: interrupted\n")
        assert tree(here) == before


def test_full_disk(here, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    save_pairs(3)
    monkeypatch.setattr(writing.shutil, "copyfile", full)
    refuse_download(*UNSPLIT, words=["dataset: No space", "--data"])


WRONG = [  # flags; the one that the message names
    ("--masks a", "--masks"),
    ("--masks a b --zip c", "--masks"),
    ("--labelme a --coco b c", "--coco"),
    ("--labelme a --split 50 20 20", "--split"),
    ("--labelme a --into test --split 80 20 0", "--split"),
    ("--labelme a --into tests", "--into"),
    ("--labelme a --boxes", "--coco"),
    ("--labelme a --window 40 80", "--window"),
    ("--masks a b --window 40 0", "--window"),
    ("--groups x", "--groups"),
    ("--into test --synthetic", "--into"),
    ("--two-classes", "--two-classes"),
    ("--zip a --synthetic", "--synthetic"),
    ("--phantoms 0 1 1", "--phantoms"),
    ("x --zip y", "x"),
]


@pytest.mark.parametrize("flags, word", WRONG)
def test_wrong_flags(here, flags, word):
    refuse_download(*flags.split(), words=[word, "--help"])


def test_names_are_unique_and_safe():
    names = collect.unique_names
    assert names(["a/1.png", "a/2.jpg"]) == ["1", "2"]
    assert names(["a/1.png", "b/1.png", "b/2.png"]) == ["a_1", "b_1", "b_2"]
    assert len(set(names(["a_b/1.png", "a/b_1.png", "c/1.png", "c/1.jpg"]))) == 4
    assert len({name.casefold() for name in names(["x/A.png", "x/a.jpg"])}) == 2
    for name in names(["..png", "a\nb.png", "é" * 300 + ".png", "\udcff.png", "c:d.png"]):
        assert len(name.encode()) < 230 and not name.startswith(".")
        assert not set(name) & set('\n\\/:*?"<>|') and name.isprintable()


def test_what_the_masks_of_an_example_may_be(here, capsys):
    def write(folder, **masks):
        example = Example("x", "", lambda: (as_picture(Image.new("RGB", PHOTO)), masks))
        write_dataset(Path(folder), {"train": [example]}, ["a", "b"])

    full = np.ones(PHOTO[::-1], bool)
    write("good", a=encode(full), b=encode(~full))
    assert list(stored(root="good")["x"]) == ["a"]  # an empty mask is no annotation
    lines = capsys.readouterr().out.splitlines()
    assert ["<-" in line for line in lines] == [False, True, False]  # more than half of the pixels
    with pytest.raises(ValueError, match="^x: "):
        write("bad", a=encode(full.T))


def test_memory_does_not_grow_with_the_images(here):
    def load():
        mask = np.zeros((256, 256), bool)
        mask[50:90, 60:99] = True
        return as_picture(Image.new("RGB", (256, 256))), {"a": encode(mask)}

    peaks = []
    for count in (20, 120):
        items = [Example(f"{number:04}", "", load) for number in range(count)]
        tracemalloc.start()
        write_dataset(Path(f"d{count}"), {"train": items}, ["a"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 100 * 6000, peaks  # bytes; a mask and image have 260,000


def test_two_classes_of_phantoms(here):
    flags = ("--synthetic", "--phantoms", 4, 1, 1, "--data")
    run_download(*flags, "two", "--two-classes")
    assert class_names(root="two") == ["bright", "dark"]
    content, values = annotations("train", "two"), {1: [], 2: []}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        image = Image.open(f"two/train/{names[annotation['image_id']]}").convert("L")
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).polygon(annotation["segmentation"][0], fill=1)
        inside, near = np.asarray(mask), np.asarray(mask.filter(ImageFilter.MaxFilter(31)))
        inside, around = (np.median(np.asarray(image)[near + inside == n]) for n in (2, 1))
        values[annotation["category_id"]].append(inside - around)
    assert np.mean(values[1]) > np.mean(values[2]) + 20  # dark ones have bright rims
    refuse_download(*flags, "two", words=["two", "--force"])
