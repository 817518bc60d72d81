"""download.py's imports: names, groups, splits, what is replaced, flags, and damaged files."""

import json
import math
import os
import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ALL,
    PHOTO,
    annotations,
    assert_refused,
    box,
    class_names,
    coco_file,
    grey,
    labelme,
    labels,
    output_of,
    photo,
    png,
    polygon,
    refuse_download,
    run_download,
    save,
    save_pair,
    script_here,
    shape,
    stored,
    tree,
    write_groups,
)
from PIL import Image

from medseg import phantoms
from medseg.images import as_picture
from medseg.importing import collect, writing
from medseg.importing.writing import Example, write_dataset
from medseg.splits import draw_splits

THIRDS = ("--split", 34, 33, 33)
UNSPLIT = ("--masks", "images", "masks")
AREA = [shape("a", box(2, 3, 5))]


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
    before = tree("mine")
    into = (*UNSPLIT, "--into", "test", "--data", "mine")
    refuse_download(*into, "--classes", "vessel", words=["foreground", "vessel", "--classes"])
    out = run_download(*into)
    assert "missing" not in out
    assert "next: python data.py mine\nnext: python train.py --data mine --recipe auto\n" in out
    assert counts("mine") == {"train": 16, "valid": 4, "test": 20}
    assert before.items() <= tree("mine").items()
    refuse_download(*into, words=["mine/test", "--force"])
    shutil.rmtree("images")
    for number in range(3):
        save(photo(number), f"images/{number}.png")
    run_download(*into, "--force", "--skip-unpaired")
    assert counts("mine") == {"train": 16, "valid": 4, "test": 3}


def test_the_next_command_suits_the_data(here):
    for number in range(6):
        save_pair(f"{number}", grey([0, 1, 2])(labels(number, 2)), seed=number)
    out = run_download(*UNSPLIT, "--into", "test", "--classes", "cup,disc")
    assert "missing: train" in out and "missing: valid" in out and "python" not in out
    out = run_download(*UNSPLIT, "--data", "own", "--classes", "cup,disc")
    command = "python train.py --data own --recipe auto --classes each"
    assert out.endswith(f"next: python data.py own\nnext: {command}\n")
    assert output_of("data.py", "own", cwd=here).endswith(f"next: {command}\n")


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


@pytest.mark.parametrize(
    "flags",
    [
        ("--masks", "ring", "ring"),
        ("--labelme", "ring"),
        ("--coco", "ring", "ring"),
        ("--masks", "images", "masks", "--data", "ring"),
    ],
)
def test_links_in_a_circle_are_one_line(flags, here):
    save_pair("a")
    os.symlink(here / "other", "ring")
    os.symlink(here / "ring", "other")
    refuse_download(*flags, *ALL, words=["ring"])


def test_split_is_drawn_by_the_seed(here):
    save_pairs(20)
    for data, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_download(*UNSPLIT, "--data", data, "--seed", seed)
    assert counts("a") == counts("c") == {"train": 14, "valid": 3, "test": 3}
    assert set(stored("test", "a")) == set(stored("test", "b")) != set(stored("test", "c"))
    everything = [set(stored(split, "a")) for split in ("train", "valid", "test")]
    assert set.union(*everything) == {str(number) for number in range(20)}


def splits_by_group():
    """{first part of a file stem: splits of its images}, a split for each image."""
    places = {}
    for split in ("train", "valid", "test"):
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
    write_groups(dict.fromkeys(names, "p"))
    refuse_download(*flags, "--force", *table, words=["1 groups", "--split"])
    write_groups(dict.fromkeys(names[1:], "p"))
    refuse_download(*flags, "--force", *table, words=["groups.csv", names[0]])
    refuse_download(*flags, "--force", "--groups", "none.csv", words=["none.csv"])
    Path("groups.csv").write_text("file,group\n1.png,p\n")
    refuse_download(*flags, "--force", *table, words=["groups.csv", "image"])
    Path("groups.csv").write_text("image,group\n1.png,p\n1.png,q\n")
    refuse_download(*flags, "--force", *table, words=["groups.csv", "1.png"])


def test_bids_names_are_subjects(here):
    names = [f"sub-{n}_ses-{s}_T{t}w" for n in (1, 10, "b2") for s in (1, 2) for t in (1, 2)]
    names += [f"sub-{n}/{t}" for n in ("x", "y") for t in ("flair", "dwi")]
    names += ["sub-z", "SUB-1_T1w", "my_sub-1_T1w", "sub-_1", "sub-1é_T1w"]
    for name in names:
        save_pair(name)
    out = run_download(*UNSPLIT, *THIRDS)
    line = next(line for line in out.splitlines() if line.startswith("groups: "))
    assert "6 subjects" in line and "17 images" in line and "sub-1:" in line and "--groups" in line
    places = splits_by_group()
    subjects = {"sub-1": 4, "sub-10": 4, "sub-b2": 4, "sub-x": 2, "sub-y": 2, "sub-z": 1}
    for subject, count in subjects.items():
        assert len(places[subject]) == count and len(set(places[subject])) == 1
    assert len(places) == 6 + 4  # the others are no subjects
    table = write_groups({f"{name}.png": name[-1] for name in names})
    assert "subjects" not in run_download(*UNSPLIT, *THIRDS, "--force", *table)
    ends = [{name[-1] for name in stored(split)} for split in ("train", "valid", "test")]
    assert sum(map(len, ends)) == len(set.union(*ends))
    assert collect.find_groups(["sub-1", "site/sub-2/x.png", "x.png"]) == ["sub-1", "sub-2", ""]
    write_groups({"a": 1, "C/b.PNG": 2, "c.png": 3})
    assert collect.find_groups(["x/a.png", "x/c/b.png"], "groups.csv") == ["1", "2"]


@pytest.mark.parametrize(
    "stem, flags, group",
    [
        ("p1_0", ("--groups", "groups.csv"), {"group": "p1"}),
        ("sub-07_T1w", (), {"group": "sub-07"}),
        ("p1_0", (), {}),  # as it has always been
    ],
)
def test_a_record_names_the_group_and_holds_no_more_besides(here, stem, flags, group):
    save_pair(stem)
    write_groups({"p1_0.png": "p1"})
    run_download(*UNSPLIT, *ALL, *flags)
    (record,) = annotations("train")["images"]
    width, height = PHOTO
    size = {"width": width, "height": height}
    assert record == {"id": 0, "file_name": f"{stem}.png", **size, **group}


@pytest.mark.parametrize("source", ["labelme", "coco"])
def test_bids_names_of_annotated_images(here, source):
    stems = [f"sub-{subject}_{number}" for subject in "abc" for number in range(4)]
    for stem in stems:
        labelme(stem, AREA)
    outlines = [(number, 2, polygon(3, 4, 6)) for number in range(12)]
    coco_file(outlines, [f"{stem}.png" for stem in stems])
    flags = ("--labelme", "lm") if source == "labelme" else ("--coco", "c.json", "images")
    assert "3 subjects in the names of 12 images" in run_download(*flags, *THIRDS)
    assert all(len(set(splits)) == 1 for splits in splits_by_group().values())


def test_every_split_gets_an_image():
    for count in range(3, 30):
        items = [Example(str(number), "", None) for number in range(count)]
        drawn = draw_splits(items, (90, 5, 5), 0)
        sizes = [len(drawn[split]) for split in ("train", "valid", "test")]
        assert sum(sizes) == count and min(sizes) >= 1
        assert abs(sizes[0] - 0.9 * count) < 2.1
    with pytest.raises(ValueError, match="2 images .* too few for 3 splits"):
        draw_splits(items[:2], (90, 5, 5), 0)


def test_nothing_is_replaced_unasked(here):
    save_pairs(4)
    run_download(*UNSPLIT)
    Path("dataset/notes.txt").write_text("mine")
    refuse_download(*UNSPLIT, words=["dataset/train", "--force"])
    for flags in (("--synthetic",), (), ("--zip", "a.zip")):
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
    refuse_download(*into, words=["drawn/train holds phantoms"])


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


@pytest.mark.parametrize(
    "flags, word",
    [
        (("--masks", "a"), "--masks"),
        (("--masks", "a", "b", "c"), "--masks"),
        (("--masks", "a", "b", "--zip", "c"), "--masks"),
        (("--labelme", "a", "--coco", "b", "c"), "--coco"),
        (("--synthetic", "--labelme", "a"), "--labelme"),
        (("--labelme", "a", "--split", "50", "20", "20"), "--split"),
        (("--labelme", "a", "--into", "test", "--split", "80", "20", "0"), "--split"),
        (("--labelme", "a", "--into", "tests"), "--into"),
        (("--labelme", "a", "--boxes"), "--coco"),
        (("--labelme", "a", "--window", "40", "80"), "--window"),
        (("--masks", "a", "b", "--window", "40", "0"), "--window"),
        (("--groups", "x"), "--groups"),
        (("--into", "test", "--synthetic"), "--into"),
        (("--two-classes",), "--two-classes"),
        (("--source", "ftp"), "--source"),
        (("--zip", "a", "--synthetic"), "--synthetic"),
        (("--phantoms", "0", "1", "1"), "--phantoms"),
        (("x", "--zip", "y"), "x"),
    ],
)
def test_wrong_flags(here, flags, word):
    refuse_download(*flags, words=[word, "--help"])


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
    write("good", a=full, b=~full)
    assert list(stored(root="good")["x"]) == ["a"]  # an empty mask is no annotation
    lines = capsys.readouterr().out.splitlines()
    assert ["<-" in line for line in lines] == [False, True, False]  # more than half of the pixels
    with pytest.raises(ValueError, match="^x: "):
        write("bad", a=full.T)


def test_memory_does_not_grow_with_the_images(here):
    def load():
        mask = np.zeros((256, 256), bool)
        mask[50:90, 60:99] = True
        return as_picture(Image.new("RGB", (256, 256))), {"a": mask}

    def peak(count):
        items = [Example(f"{number:04}", "", load) for number in range(count)]
        tracemalloc.start()
        write_dataset(Path(f"d{count}"), {"train": items}, ["a"])
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    small, large = peak(60), peak(360)
    assert large - small < 300 * 6000, (small, large)  # bytes; a mask and image have 260,000


def test_text_of_half_a_character_is_one_line(here):
    labelme("x", [*AREA, shape("a\ud800", box(2, 3, 5))])
    refuse_download("--labelme", "lm", words=["lm/x.json", "shapes[1]", "\\ud800"])
    coco_file([(0, 2, polygon(3, 4, 6))])
    content = json.loads(Path("c.json").read_text())
    content["categories"][2]["name"] = "\ud800"
    Path("c.json").write_text(json.dumps(content))
    refuse_download("--coco", "c.json", "images", words=["c.json", "\\ud800"])


SPECIAL = [None, True, -1, 0, 2**63, 10**30, 0.5, 1e308, math.nan, "", "../../x", "/etc/passwd"]
SPECIAL += ["C:\\x", "a\0b", "\ud800", "é" * 300, [], {}, [[]], [None], {"counts": [10**18]}]


def mutate(value, rng, depth=0):
    """Replace, remove or repeat something somewhere in nested lists and dicts."""
    if depth > 6 or not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return json.loads(json.dumps(rng.choice(SPECIAL)))
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = rng.randrange(8)
    if how == 0:
        del value[key]
    elif how == 1 and isinstance(value, list):
        value.extend([value[key]] * 5)
    else:
        value[key] = mutate(value[key], rng, depth + 1)
    return value


@pytest.mark.parametrize("source", ["labelme", "coco"])
def test_mutated_files_end_in_success_or_one_line(here, source):
    rng = random.Random(11)
    bitmap = np.eye(4, dtype=np.uint8)
    labelme("y", [*AREA, shape("b", [[1, 1], [4, 4]], "mask", mask=png(bitmap))], "images")
    labelme("x", [shape("a", [[9, 9], [3, 4]], "circle")], "images", imageData=png(bitmap))
    coco_file([(0, 2, polygon(3, 4, 6)), (1, 3, {"bbox": [1, 2, 3, 4]})], ["x.png", "y.png"])
    path = Path("c.json" if source == "coco" else "images/y.json")
    good = path.read_bytes()
    flags = ("--coco", path, "images", "--boxes") if source == "coco" else ("--labelme", "images")
    statuses = set()
    for _ in range(40):
        if rng.random() < 0.75:
            content = json.loads(good)
            for _ in range(rng.randint(1, 3)):
                content = mutate(content, rng)
            path.write_text(json.dumps(content))
        else:
            changed = bytearray(good)
            changed[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
            path.write_bytes(changed[: rng.choice([len(good), rng.randrange(len(good))])])
        before = set(tree(here))
        result = script_here("download.py", *flags, *ALL, cwd=here)
        statuses.add(result.returncode)
        if result.returncode:
            assert_refused(result)
        else:
            assert not result.stderr
            stored()
            shutil.rmtree("dataset")
        assert set(tree(here)) == before
    assert statuses == {0, 2}


def test_two_classes_of_phantoms(here):
    flags = ("--synthetic", "--phantoms", 4, 1, 1, "--data")
    run_download(*flags, "two", "--two-classes")
    run_download(*flags, "one")
    assert class_names(root="two") == ["bright", "dark"]
    assert {a["category_id"] for a in annotations("train", "two")["annotations"]} == {1, 2}
    assert "already there" in run_download(*flags, "two", "--two-classes")
    refuse_download(*flags, "two", words=["two", "--force"])
