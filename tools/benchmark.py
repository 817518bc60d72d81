"""How fast it is, as ratios that hold on any machine: both sides of a pair run in turn.

    python tools/benchmark.py --data dataset                 # against this project's own plain way
    python tools/benchmark.py --data dataset --tutorial DIR  # and the tutorial's program in DIR
    python tools/benchmark.py --data dataset/synthetic --images 8 --size 32 --n-filters 4 --rounds 1

Every measurement is a process of its own. It is warmed up before its clock starts (except where a
cold start is what is measured) and repeated --rounds times; the table shows medians and the range
of the ratio. No network, SwanLab off. The last command only shows that it runs.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from quality import ROOT, describe_machine

from medseg.cli import ArgumentParser

ANNOTATIONS = "_annotations.coco.json"
EXAMPLE = "27_jpg.rf.b2a2b9811786cc32a23c46c560f04d07.jpg"  # what the tutorial's predict.py opens
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2")

# ---- measurements: each runs in a process of its own and returns its figures -------------------
# `data`, `predict` and so on are this project's modules, or the tutorial's, by settings["path"].


def loader_cached(settings):
    from data import Batches, Order, load_split

    batches = Batches(load_split(settings["data"], "train", settings["size"]), Order(32, True))
    list(batches)
    return time_loader(batches, settings["images"])


def loader_of_tutorial(settings):
    import torch
    from pycocotools.coco import COCO
    from torchvision import transforms

    from data import COCOSegmentationDataset

    normalize = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    steps = [transforms.ToTensor(), transforms.Resize((256, 256)), normalize]
    folder = Path(settings["data"]) / "train"
    dataset = COCOSegmentationDataset(COCO(folder / ANNOTATIONS), folder, transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)
    return time_loader(loader, settings["images"])


def time_loader(loader, images):
    started = time.perf_counter()
    for _ in loader:
        pass
    return {"images_per_second": images / (time.perf_counter() - started)}


def training_step(settings):
    """plain: in float32, memory in the default order, the optimizer not fused."""
    import torch

    from medseg.device import choose_precision, keep_freed_memory, make_autocast, pick_device
    from net import UNet
    from train import combined_loss

    device, plain = pick_device(settings["device"]), settings["plain"]
    if not plain and device.type == "cpu":
        keep_freed_memory()
    order = torch.contiguous_format if plain else torch.channels_last
    model = UNet(n_filters=settings["filters"]).to(device, memory_format=order)
    shape = (settings["batch"], 1, settings["size"], settings["size"])
    images = torch.randn(shape, device=device).repeat(1, 3, 1, 1).contiguous(memory_format=order)
    masks = (torch.rand(shape, device=device) > 0.96).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=not plain)
    autocast = make_autocast(choose_precision("fp32" if plain else "auto", device), device)

    def step():
        with autocast:
            outputs = model(images)
        loss = combined_loss(outputs, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):
        step()
    wait()
    started = time.perf_counter()
    for _ in range(3):
        step()
    wait()
    return {"images_per_second": 3 * settings["batch"] / (time.perf_counter() - started)}


def folder_of_tutorial(settings):
    import torch

    from predict import load_model, predict_mask, preprocess_image

    use_gpu = torch.cuda.is_available() and settings["device"] != "cpu"
    device = "cuda" if use_gpu else "cpu"
    model = load_model(settings["model"], device)
    for path in Path(settings["folder"]).iterdir():
        predict_mask(model, preprocess_image(path)[0], device).cpu().numpy()
    return {}


# ---- running them ----------------------------------------------------------------------------


def run(command, cwd=None, **environment):
    """Run a command; its last line of JSON, its output as `text`, and its seconds as `wall`."""
    started = time.perf_counter()
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "SWANLAB_MODE": "disabled", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wall = time.perf_counter() - started
    if result.returncode:
        raise RuntimeError(f"{command} ended with {result.returncode}:\n{result.stdout[-3000:]}")
    figures = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {**(figures[-1] if figures else {}), "wall": wall, "text": result.stdout}


def subset(source, target, counts):
    """Write a data set of the first images of another, as links; return `target`."""
    for split, count in counts.items():
        content = json.loads((source / split / ANNOTATIONS).read_text())
        (target / split).mkdir(parents=True)
        images = content["images"][:count]
        kept = {image["id"] for image in images}
        for image in images:
            file = source / split / image["file_name"]
            (target / split / image["file_name"]).symlink_to(file.resolve())
        annotations = [one for one in content["annotations"] if one["image_id"] in kept]
        content |= {"images": images, "annotations": annotations}
        (target / split / ANNOTATIONS).write_text(json.dumps(content))
    return target


class Bench:
    """A folder with a data set and a model to measure with, and the figures so far."""

    def __init__(self, args, place):
        import torch

        from net import UNet

        self.args, self.place, self.table = args, place, []
        counts = {"train": args.images, "valid": max(args.images // 4, 2), "test": 2}
        self.data = subset(args.data.resolve(), place / "data", counts)
        self.settings = {
            "data": str(self.data),
            "images": args.images,
            "device": args.device,
            "size": args.size,
            "filters": args.n_filters,
            "batch": min(args.images, 32),
            "plain": False,
        }
        self.model = place / "best_model.pth"
        torch.save(UNet(n_filters=args.n_filters).state_dict(), self.model)

    def compare(self, name, key, other, ours, higher_is_better=False):
        """Run both in turn; add a row with both medians and the range of the ratio."""
        if self.args.only not in name:
            return
        pairs = [(other()[key], ours()[key]) for _ in range(self.args.rounds)]
        ratios = [b / a if higher_is_better else a / b for a, b in pairs]
        medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
        row = {"name": name, "unit": key, "other": medians[0], "ours": medians[1]}
        row |= {"ratio": statistics.median(ratios), "from": min(ratios), "to": max(ratios)}
        self.table.append(row)
        print(
            f"{name:<58} {medians[0]:>9.3f} {medians[1]:>9.3f} {row['ratio']:>7.2f}x "
            f"({row['from']:.2f} to {row['to']:.2f})  {key}",
            flush=True,
        )

    def measure(self, function, path=ROOT, **more):
        """Run one of the measurements above in a process, with the modules of `path`."""
        given = json.dumps({**self.settings, **more, "path": str(path)})
        command = [sys.executable, __file__, "--measure", function.__name__, given]
        return partial(run, command, cwd=path)

    def train(self, processes=1):
        """Train for two epochs; the seconds of the second one."""
        settings, out = self.settings, self.place / f"run{processes}"
        flags = ("--data", self.data, "--out", out, "--overwrite", "--epochs", 2)
        flags += ("--image-size", settings["size"], "--n-filters", settings["filters"])
        flags += ("--batch-size", settings["batch"], "--device", self.args.device)
        launcher = TORCHRUN if processes > 1 else ()
        run([sys.executable, *launcher, ROOT / "train.py", *flags, "--swanlab", "disabled"])
        with open(out / "metrics.csv") as file:
            return {"second_epoch": float(list(csv.DictReader(file))[1]["seconds"])}

    def train_tutorial(self):
        """Two epochs of the tutorial's program, which prints lines of TUTORIAL and JSON."""
        link = self.args.tutorial / "dataset"
        link.unlink(missing_ok=True)
        link.symlink_to(self.data)
        text = run([sys.executable, "train.py"], cwd=self.args.tutorial, EPOCHS="2")["text"]
        lines = [line.split("TUTORIAL ")[1] for line in text.splitlines() if "TUTORIAL " in line]
        seconds = {line["step"]: line["seconds"] for line in map(json.loads, lines)}
        return {"second_epoch": seconds[2]}


def measure_training(bench):
    rate, step = "images_per_second", bench.measure(training_step)
    plain = bench.measure(training_step, plain=True)
    bench.compare("training step, against fp32, contiguous, unfused", rate, plain, step, True)
    one, two = bench.train, partial(bench.train, processes=2)
    bench.compare("second epoch, two processes against one", "second_epoch", one, two)
    if bench.args.tutorial:
        tutorial = bench.measure(loader_of_tutorial, path=bench.args.tutorial)
        cached = bench.measure(loader_cached)
        bench.compare("loader, against the tutorial's", rate, tutorial, cached, True)
        name = "second epoch, against the tutorial's"
        bench.compare(name, "second_epoch", bench.train_tutorial, bench.train)


def measure_prediction(bench):
    picture = sorted((bench.data / "test").glob("*.*g"))[0]
    command = (sys.executable, ROOT / "predict.py", "--device", bench.args.device)
    command += ("--model", bench.model)
    single = partial(run, [*command, picture, "--output", bench.place / "single"])
    name = "one prediction from a cold start, ONNX against PyTorch"
    if bench.args.only in name:
        exported = bench.place / "model.onnx"
        run([sys.executable, ROOT / "predict.py", "--model", bench.model, "--export", exported])
        onnx = [sys.executable, ROOT / "docs" / "predict_onnx.py", exported, picture]
        bench.compare(name, "wall", single, partial(run, [*onnx, "--output", bench.place / "onnx"]))
    if bench.args.tutorial:
        against_tutorial(bench, picture, command)


def against_tutorial(bench, picture, command):
    import torch

    from net import UNet

    tutorial, example = bench.args.tutorial, bench.data / "test" / EXAMPLE
    if not example.exists():
        example.symlink_to(picture.resolve())
    for path in (bench.model, tutorial / "best_model.pth"):
        torch.save(UNet(n_filters=32).state_dict(), path)
    folder = bench.place / "folder"
    folder.mkdir()
    pictures = sorted(path for path in (bench.data / "train").iterdir() if path.suffix != ".json")
    for number in range(200):
        link = folder / f"{number}{picture.suffix}"
        link.symlink_to(pictures[number % len(pictures)].resolve())
    bench.compare(
        "one prediction from a cold start, against the tutorial's",
        "wall",
        partial(run, [sys.executable, "predict.py"], cwd=tutorial),
        partial(run, [*command, example, "--output", bench.place / "single"]),
    )
    more = {"folder": str(folder), "model": str(bench.model)}
    bench.compare(
        "a folder of 200 images, against the tutorial's",
        "wall",
        bench.measure(folder_of_tutorial, path=tutorial, **more),
        partial(run, [*command, folder, "--output", bench.place / "masks"]),
    )


def main():
    parser = ArgumentParser("tools/benchmark.py", __doc__)
    add = parser.add_argument
    add("--data", type=Path, default=Path("dataset"), help="the data set")
    add("--tutorial", type=Path, help="folder with the tutorial's net, data, train and predict.py")
    add("--device", default="auto", help="as train.py has it")
    add("--rounds", type=int, default=3, help="how often each pair is run")
    add("--images", type=int, default=64, help="training images of an epoch")
    add("--size", type=int, default=256, help="pixels a side")
    add("--n-filters", type=int, default=32, help="channels of the first level")
    add("--only", default="", help="rows whose name holds this")
    add("--json", type=Path, default=Path("benchmark.json"), help="where to write the figures")
    add("--measure", nargs=2, help=argparse.SUPPRESS)  # a measurement and its settings
    args = parser.parse_args()
    if args.measure:
        settings = json.loads(args.measure[1])
        sys.path.insert(0, settings["path"])
        print(json.dumps(globals()[args.measure[0]](settings)))
        return
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(args, Path(place))
        print(f"{'':<58} {'other':>9} {'ours':>9}")
        for module in ("data", "train", "predict", "download"):
            torch, own = (
                partial(run, [sys.executable, "-c", f"import {name}"], cwd=ROOT)
                for name in ("torch", module)
            )
            bench.compare(f"import {module}, against import torch", "wall", torch, own)
        measure_training(bench)
        measure_prediction(bench)
        figures = {"machine": describe_machine(), "settings": bench.settings, "rows": bench.table}
        args.json.write_text(json.dumps(figures, indent=1))
    print(f"{figures['machine']}\nwritten to {args.json}")


if __name__ == "__main__":
    main()
