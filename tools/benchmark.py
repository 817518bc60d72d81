"""How fast it is, as ratios that hold on any machine: both sides of a pair run in turn.

    python tools/benchmark.py --data dataset                 # against this project's own plain way
    python tools/benchmark.py --data dataset --tutorial DIR  # and the tutorial's program in DIR
    python tools/benchmark.py --quick                        # on phantoms: that it runs

Every measurement is a process of its own. It is warmed up before its clock starts (except where a
cold start is what is measured) and repeated --rounds times; the table shows medians and the range
of the ratio. No network, SwanLab off. With --quick, sizes are small, there is one round, and the
trainings are forks, which need not import PyTorch: their times mean nothing.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from harness import ROOT, describe_machine, prepare_forks, run, wait_for

from medseg.cli import ArgumentParser

ANNOTATIONS = "_annotations.coco.json"
EXAMPLE = "27_jpg.rf.b2a2b9811786cc32a23c46c560f04d07.jpg"  # what the tutorial's predict.py opens
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2")
SCRIPTS = ("data", "train", "predict", "download")

# ---- measurements: each runs in a process of its own and returns its figures -------------------
# `data`, `predict` and so on are this project's modules, or the tutorial's, by settings["path"].


def loader_cached(settings):
    from data import Batches, Order, load_split
    from medseg.device import keep_freed_memory

    keep_freed_memory()
    rows = load_split(settings["data"], "train", settings["size"])
    batches = Batches(rows, Order(32, shuffle=True))
    for _ in batches:
        pass
    started = time.perf_counter()
    for _ in range(5):
        for _ in batches:
            pass
    return {"images_per_second": 5 * len(batches.rows) / (time.perf_counter() - started)}


def loader_decoding(settings):
    from data import COCOSegmentationDataset
    from medseg.coco import load_coco

    folder = Path(settings["data"]) / "train"
    dataset = COCOSegmentationDataset(load_coco(folder), folder, image_size=settings["size"])
    return time_loader(dataset)


def loader_of_tutorial(settings):
    from pycocotools.coco import COCO
    from torchvision import transforms

    from data import COCOSegmentationDataset

    normalize = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    steps = [transforms.ToTensor(), transforms.Resize((256, 256)), normalize]
    folder = Path(settings["data"]) / "train"
    with contextlib.redirect_stdout(None):
        coco = COCO(folder / ANNOTATIONS)
    return time_loader(COCOSegmentationDataset(coco, folder, transforms.Compose(steps)))


def time_loader(dataset):
    import torch

    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)
    started = time.perf_counter()
    for _ in loader:
        pass
    return {"images_per_second": len(dataset) / (time.perf_counter() - started)}


def training_step(settings):
    """plain: in float32, memory in the default order, the optimizer not fused."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from medseg.device import choose_precision, keep_freed_memory, make_autocast, pick_device
    from net import UNet
    from train import combined_loss

    device, plain = pick_device(settings["device"]), settings["plain"]
    if not plain and device.type == "cpu":
        keep_freed_memory()
    order = torch.contiguous_format if plain else torch.channels_last
    torch.manual_seed(0)
    model = UNet(n_filters=settings["filters"]).to(device, memory_format=order)
    precision = choose_precision("fp32" if plain else "auto", device)
    shape = (settings["batch"], 1, settings["size"], settings["size"])
    images = torch.randn(shape, device=device).repeat(1, 3, 1, 1).contiguous(memory_format=order)
    masks = (torch.rand(shape, device=device) > 0.96).float()
    if settings["compile"]:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=not plain)
    autocast = make_autocast(precision, device)

    def step():
        with autocast:
            outputs = model(images)
        loss = combined_loss(outputs, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = time_on(device, step, settings["steps"])
    rate = matrix_rate(device, precision, settings["matrix"])
    return {
        "images_per_second": settings["batch"] / seconds,
        "share_of_matrix_rate": counter.get_total_flops() / seconds / rate,
        "matrix_tflops": rate / 1e12,
        "gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def time_on(device, function, times):
    """Seconds that a call takes, after one to warm up."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    function()
    wait()
    started = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return (time.perf_counter() - started) / times


def matrix_rate(device, precision, size):
    """Floating-point operations a second of a product of square matrices."""
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    a, b = torch.randn(2, size, size, device=device, dtype=dtypes[precision])
    return 2 * size**3 / time_on(device, lambda: a @ b, 10)


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


def measure(function, settings, path=ROOT, **more):
    """Run one of the measurements above in a process, with the modules of `path`."""
    given = json.dumps({**settings, **more, "path": str(path)})
    return run([sys.executable, __file__, "--measure", function.__name__, given], cwd=path)


def train_in_forks(flags, processes, log):
    """train.py in forks of this process, several as torchrun starts them; what `wait_for` does."""
    from helpers import fork_script

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes}
    started, forks = time.perf_counter(), []
    for rank in range(processes):
        ranks = {} if processes == 1 else {**world, "RANK": rank, "LOCAL_RANK": rank}
        given = {name: str(value) for name, value in ranks.items()}
        prepare = partial(os.environ.update, given)
        forks.append(fork_script("train.py", *flags, log=f"{log}.{rank}", prepare=prepare))
    ends = [wait_for(fork.pid, started, f"{log}.{rank}") for rank, fork in enumerate(forks)]
    return ends[0]


def subset(source, target, counts, repeat=1):
    """Write a data set of the first images of another, as links; return `target`.

    Each image is there `repeat` times, under names of its own.
    """
    for split, count in counts.items():
        content = json.loads((source / split / ANNOTATIONS).read_text())
        images, annotations = [], []
        (target / split).mkdir(parents=True)
        for image in content["images"][:count]:
            own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
            for copy in range(repeat):
                number, name = len(images), f"{copy}_{image['file_name']}"
                file = source / split / image["file_name"]
                (target / split / name).symlink_to(file.resolve())
                images.append({**image, "id": number, "file_name": name})
                for entry in own:
                    annotations.append({**entry, "id": len(annotations), "image_id": number})
        content |= {"images": images, "annotations": annotations}
        (target / split / ANNOTATIONS).write_text(json.dumps(content))
    return target


class Bench:
    """A folder with a data set and a model to measure with, and the figures so far."""

    def __init__(self, args, place):
        import torch

        from medseg.device import pick_device
        from medseg.phantoms import make_phantoms
        from net import UNet

        if args.quick:
            args.device = "cpu"  # a GPU cannot be used in a fork
        self.args, self.place, self.table, self.facts = args, place, [], {}
        self.rounds = 1 if args.quick else args.rounds
        phantoms = partial(make_phantoms, place / "phantoms", counts=(24, 8, 8), size=128)
        self.source, count = (args.data or phantoms()).resolve(), 8 if args.quick else args.images
        counts = {"train": None, "valid": None, "test": 2}
        if count:
            counts = {"train": count, "valid": max(count // 4, 2), "test": 2}
        self.data = subset(self.source, place / "data", counts)
        sizes = {"size": 32, "filters": 4, "batch": 4, "steps": 2, "matrix": 256}
        if not args.quick:
            sizes = {"size": 256, "filters": 32, "batch": min(count or 32, 32), "steps": 3}
            sizes["matrix"] = 8192 if pick_device(args.device).type == "cuda" else 2048
        given = {"data": str(self.data), "images": count, "device": args.device}
        self.settings = {**sizes, **given, "plain": False, "compile": False}
        self.model = place / "best_model.pth"
        torch.save(UNet(n_filters=self.settings["filters"]).state_dict(), self.model)
        if args.quick:
            prepare_forks()

    def compare(self, name, key, other, ours, higher_is_better=False):
        """Run both in turn; add a row with both medians and the range of the ratio."""
        if self.args.only not in name:
            return
        pairs = [(other()[key], ours()[key]) for _ in range(self.rounds)]
        ratios = [b / a if higher_is_better else a / b for a, b in pairs]
        row = {
            "name": name,
            "unit": key,
            "other": statistics.median(a for a, _ in pairs),
            "ours": statistics.median(b for _, b in pairs),
            "times_as_good": statistics.median(ratios),
            "from": min(ratios),
            "to": max(ratios),
            "rounds": self.rounds,
        }
        self.table.append(row)
        print(
            f"{name:<60} {row['other']:>10.3f} {row['ours']:>10.3f} {row['times_as_good']:>8.2f}x"
            f"  ({row['from']:.2f} to {row['to']:.2f})  {key}",
            flush=True,
        )

    def measure(self, function, **more):
        return partial(measure, function, self.settings, **more)

    def train(self, folder, data=None, processes=1, extra=()):
        """Train for two epochs; what `run` returns and the seconds of the second epoch."""
        settings, out = self.settings, self.place / folder
        flags = ("--data", data or self.data, "--out", out, "--overwrite", "--epochs", 2)
        flags += ("--image-size", settings["size"], "--n-filters", settings["filters"])
        flags += ("--batch-size", settings["batch"], "--device", self.args.device)
        flags += ("--swanlab", "disabled", *extra)
        if self.args.quick:
            result = train_in_forks(flags, processes, self.place / f"{folder}.log")
        else:
            launcher = TORCHRUN if processes > 1 else ()
            result = run([sys.executable, *launcher, ROOT / "train.py", *flags])
        names, _, second = (out / "metrics.csv").read_text().splitlines()
        row = dict(zip(names.split(","), second.split(","), strict=True))
        return {**result, "second_epoch": float(row["seconds"])}


def measure_imports(bench):
    """Each script imported in a process of its own, against PyTorch alone."""

    def seconds_of(module):
        return partial(run, [sys.executable, "-c", f"import {module}"], cwd=ROOT)

    other = "sys" if bench.args.quick else "torch"
    for script in SCRIPTS:
        name = f"import {script}, against import torch"
        bench.compare(name, "wall", seconds_of(other), seconds_of(script))


def measure_loading(bench):
    rate, cached = "images_per_second", bench.measure(loader_cached)
    decoding = bench.measure(loader_decoding)
    bench.compare("loader, cached against decoding each time", rate, decoding, cached, True)
    if bench.args.tutorial:
        tutorial = bench.measure(loader_of_tutorial, path=bench.args.tutorial)
        bench.compare("loader, against the tutorial's", rate, tutorial, cached, True)


def measure_training(bench):
    last = {}

    def step():
        last.update(bench.measure(training_step)())
        return last

    rate, plain = "images_per_second", bench.measure(training_step, plain=True)
    bench.compare("training step, against fp32, contiguous, unfused", rate, plain, step, True)
    if last:
        names = ("share_of_matrix_rate", "matrix_tflops", "gpu_gib", "peak_mib")
        bench.facts.update({name: last[name] for name in names})
        share = 100 * last["share_of_matrix_rate"]
        print(f"  at {share:.0f} % of a matrix product's {last['matrix_tflops']:.2f} TFLOP/s")
    if not bench.args.quick:  # compiling takes a minute
        compiled = bench.measure(training_step, compile=True)
        bench.compare("training step, compiled against not", rate, step, compiled, True)
    if bench.args.tutorial:
        name, tutorial = "second epoch, against the tutorial's", partial(tutorial_epochs, bench)
        bench.compare(name, "second_epoch", tutorial, partial(bench.train, "epoch"))
    bench.compare(
        "second epoch, two processes against one",
        "second_epoch",
        partial(bench.train, "one"),
        partial(bench.train, "two", processes=2),
    )


def tutorial_epochs(bench):
    """Two epochs of the tutorial's program, which prints lines like TUTORIAL {"step": 2, ...}."""
    link = bench.args.tutorial / "dataset"
    link.unlink(missing_ok=True)
    link.symlink_to(bench.data)
    os.environ["EPOCHS"] = "2"
    text = run([sys.executable, "train.py"], cwd=bench.args.tutorial)["text"]
    lines = [line.split("TUTORIAL ")[1] for line in text.splitlines() if "TUTORIAL " in line]
    seconds = {line["step"]: line["seconds"] for line in map(json.loads, lines)}
    return {"second_epoch": seconds[2]}


def measure_prediction(bench):
    picture = sorted((bench.data / "test").glob("*.*g"))[0]
    command = (sys.executable, ROOT / "predict.py", "--device", bench.args.device)
    command += ("--model", bench.model)
    single = partial(run, [*command, picture, "--output", bench.place / "single"])
    bench.facts["single_prediction_seconds"] = single()["wall"]
    name = "one prediction from a cold start, ONNX against PyTorch"
    if bench.args.only in name and not bench.args.quick:  # the export takes a while
        exported = bench.place / "model.onnx"
        run([sys.executable, ROOT / "predict.py", "--model", bench.model, "--export", exported])
        onnx = [sys.executable, ROOT / "docs" / "predict_onnx.py", exported, picture]
        bench.compare(name, "wall", single, partial(run, [*onnx, "--output", bench.place / "onnx"]))
    tutorial = bench.args.tutorial
    if not tutorial:
        return
    import torch

    from net import UNet

    example = bench.data / "test" / EXAMPLE
    if not example.exists():
        example.symlink_to(picture.resolve())
    for path in (bench.model, tutorial / "best_model.pth"):
        torch.save(UNet(n_filters=32).state_dict(), path)
    folder = bench.place / "folder"
    folder.mkdir()
    train = (bench.data / "train").iterdir()
    pictures = [path for path in sorted(train) if path.suffix != ".json"]
    for number in range(200):
        link = folder / f"{number}{picture.suffix}"
        link.symlink_to(pictures[number % len(pictures)].resolve())
    bench.compare(
        "one prediction from a cold start, against the tutorial's",
        "wall",
        partial(run, [sys.executable, "predict.py"], cwd=tutorial),
        partial(run, [*command, example, "--output", bench.place / "single"]),
    )
    bench.compare(
        "a folder of 200 images, against the tutorial's",
        "wall",
        bench.measure(
            folder_of_tutorial, path=tutorial, folder=str(folder), model=str(bench.model)
        ),
        partial(run, [*command, folder, "--output", bench.place / "masks"]),
    )


def measure_scale(bench):
    """Memory and time of a training against the number of images."""
    from data import load_split

    quick = bench.args.quick
    base = {"train": 8 if quick else 32, "valid": 4, "test": 2}
    size = 32 if quick else 128
    flags = ("--image-size", size, "--n-filters", 4, "--batch-size", 8)

    def train(factor):
        data = subset(bench.source, bench.place / f"x{factor}", base, repeat=factor)
        for split in base:
            load_split(data, split, size)  # makes the cache
        return bench.train(f"scale{factor}", data, extra=flags)

    for factor in (1, 4, 16):
        result, images = train(factor), base["train"] * factor
        peak, per_image = result["peak_mib"], 1000 * result["second_epoch"] / images
        facts = {"images": images, "peak_mib": peak, "ms_per_image": per_image}
        bench.facts[f"scale_{factor}x"] = facts
        print(
            f"scale, {images:>5} images: peak {peak:.0f} MiB, {per_image:.2f} ms an image in the "
            "second epoch",
            flush=True,
        )


def write_figures(bench):
    names = ("size", "filters", "batch", "images", "device")
    settings = {name: bench.settings[name] for name in names}
    figures = {"machine": describe_machine(), "settings": settings}
    figures |= {"rows": bench.table, "facts": bench.facts}
    bench.args.json.write_text(json.dumps(figures, indent=1))
    print(f"{figures['machine']}\nwritten to {bench.args.json}")


def get_args():
    parser = ArgumentParser("tools/benchmark.py", __doc__)
    add = parser.add_argument
    add("--data", type=Path, help="the data set; without it, phantoms")
    add("--tutorial", type=Path, help="folder with the tutorial's net, data, train and predict.py")
    add("--device", default="auto")
    add("--rounds", type=int, default=3)
    add("--images", type=int, default=64, help="images in an epoch; 0 for the whole data set")
    add("--quick", action="store_true", help="small sizes, one round")
    add("--only", default="", help="rows whose name holds this")
    add("--json", type=Path, default=Path("benchmark.json"))
    add("--measure", nargs=2, help=argparse.SUPPRESS)  # a measurement and its settings
    return parser.parse_args()


def main():
    args = get_args()
    if args.measure:
        name, settings = args.measure[0], json.loads(args.measure[1])
        sys.path.insert(0, settings["path"])
        print(json.dumps(globals()[name](settings)))
        return
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(args, Path(place))
        print(f"{'':<60} {'other':>10} {'ours':>10}")
        measure_imports(bench)
        measure_loading(bench)
        measure_training(bench)
        measure_prediction(bench)
        if args.only in "scale":
            measure_scale(bench)
        write_figures(bench)


if __name__ == "__main__":
    main()
