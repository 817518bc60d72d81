"""How fast it is, as ratios that hold on any machine: both sides of a pair run in turn, in processes of their own.

    python tests/benchmark.py --data dataset                      # against this project's own plain way
    python tests/benchmark.py --data dataset --tutorial DIR       # and against the tutorial's program, laid out in DIR
    python tests/benchmark.py --quick                             # on phantoms, small: that it runs, not how fast

Each side is warmed up before its clock starts (except where a cold start is what is measured) and runs
--rounds times; the table shows medians and the spread of the ratio. No network, SwanLab off.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Each snippet finds its settings in `s` and prints one JSON object.
START = "import json, sys, time; s = json.loads(sys.argv[1])\n"

LOADER_OURS = START + """
from net import keep_freed_memory; keep_freed_memory()
from data import Batches, load_split
batches = Batches(load_split(s['data'], 'train', s['size']), 32, shuffle=True)
for _ in batches: pass
begun = time.perf_counter()
for epoch in range(5):
    for images, masks in batches: pass
print(json.dumps({'images_per_second': 5 * len(batches.rows) / (time.perf_counter() - begun)}))
"""
LOADER_EACH_TIME = START + """
import torch
from data import COCOSegmentationDataset, load_coco
dataset = COCOSegmentationDataset(load_coco(s['data'] + '/train'), s['data'] + '/train', image_size=s['size'])
loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)
begun = time.perf_counter()
for images, masks in loader: pass
print(json.dumps({'images_per_second': len(dataset) / (time.perf_counter() - begun)}))
"""
LOADER_TUTORIAL = START + """
import contextlib, torch, torchvision.transforms as transforms
from pycocotools.coco import COCO
from data import COCOSegmentationDataset
transform = transforms.Compose([transforms.ToTensor(), transforms.Resize((256, 256)),
                                transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])])
with contextlib.redirect_stdout(None):
    coco = COCO(s['data'] + '/train/_annotations.coco.json')
loader = torch.utils.data.DataLoader(COCOSegmentationDataset(coco, s['data'] + '/train', transform), batch_size=32, shuffle=True)
begun = time.perf_counter()
for images, masks in loader: pass
print(json.dumps({'images_per_second': len(loader.dataset) / (time.perf_counter() - begun)}))
"""
STEP = START + """
import torch
from torch.utils.flop_counter import FlopCounterMode
from net import UNet, keep_freed_memory, pick_device
from train import choose_precision, combined_loss
device = pick_device(s['device'])
torch.manual_seed(0)
model = UNet(n_filters=s['filters'])
images = torch.randn(s['batch'], 3, s['size'], s['size'], device=device)
masks = (torch.rand(s['batch'], 1, s['size'], s['size'], device=device) > 0.96).float()
plain = s['plain']
if not plain and device.type == 'cpu': keep_freed_memory()
precision = 'fp32' if plain else choose_precision('auto', device)
dtype = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}[precision]
model.to(device, memory_format=torch.contiguous_format if plain else torch.channels_last)
if not plain: images = images.contiguous(memory_format=torch.channels_last)
if s['compile']: model.compile()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=not plain)
def step():
    with torch.autocast(device.type, dtype, enabled=precision != 'fp32'):
        outputs = model(images)
    loss = combined_loss(outputs, masks)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
def seconds(function, times):
    function(); wait(); begun = time.perf_counter()
    for _ in range(times): function()
    wait(); return (time.perf_counter() - begun) / times
with FlopCounterMode(display=False) as counter:
    step()
if device.type == 'cuda': torch.cuda.reset_peak_memory_stats()
taken = seconds(step, s['steps'])
n = 8192 if device.type == 'cuda' else 2048
a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
rate = 2 * n ** 3 / seconds(lambda: a @ b, 10)
print(json.dumps({'images_per_second': s['batch'] / taken, 'share_of_matrix_rate': counter.get_total_flops() / taken / rate,
                  'matrix_tflops': rate / 1e12, 'gpu_gib': torch.cuda.max_memory_allocated() / 2**30 if device.type == 'cuda' else None}))
"""
FOLDER_TUTORIAL = START + """
import pathlib
from predict import load_model, predict_mask, preprocess_image
import torch
device = 'cuda' if torch.cuda.is_available() and s['device'] != 'cpu' else 'cpu'
model = load_model(s['model'], device)
for path in pathlib.Path(s['folder']).iterdir():
    predict_mask(model, preprocess_image(path)[0], device).cpu().numpy()
print(json.dumps({}))
"""


def run(command, cwd=None, path=None):
    """Run a command; its last JSON line, its wall seconds and its peak memory in MiB."""
    import time
    environment = {**os.environ, "PYTHONPATH": str(path or ""), "SWANLAB_MODE": "disabled"}
    with tempfile.TemporaryFile("w+") as said:
        begun = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), cwd=cwd, env=environment, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - begun
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise RuntimeError(f"{command} ended with status {process.returncode}:\n{text[-3000:]}")
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return {**(found[-1] if found else {}), "wall": wall, "peak_mib": usage.ru_maxrss / 1024, "text": text}


def snippet(code, settings, cwd=None):
    return lambda: run([sys.executable, "-c", code, json.dumps(settings)], cwd=cwd, path=cwd or ROOT)


def subset(source, target, counts, repeat=1):
    """A data set of the first images of another, each `repeat` times under names of its own, linked."""
    for split, count in counts.items():
        content = json.loads((source / split / "_annotations.coco.json").read_text())
        images, annotations = [], []
        (target / split).mkdir(parents=True)
        for image in content["images"][:count]:
            for copy in range(repeat):
                number, name = len(images), f"{copy}_{image['file_name']}"
                (target / split / name).symlink_to((source / split / image["file_name"]).resolve())
                images.append({**image, "id": number, "file_name": name})
                annotations += [{**a, "id": len(annotations) + k, "image_id": number}
                                for k, a in enumerate(a for a in content["annotations"] if a["image_id"] == image["id"])]
        (target / split / "_annotations.coco.json").write_text(json.dumps({**content, "images": images, "annotations": annotations}))
    return target


def compare(table, name, key, ours, other, rounds, higher_is_better):
    """Run ours and the other in turn; a row with both medians and the ratio pair by pair."""
    pairs = []
    for _ in range(rounds):
        pairs.append((other()[key], ours()[key]))
    ratios = sorted(b / a if higher_is_better else a / b for a, b in pairs)
    row = {"name": name, "unit": key, "other": statistics.median(a for a, _ in pairs), "ours": statistics.median(b for _, b in pairs),
           "times_as_good": statistics.median(ratios), "from": ratios[0], "to": ratios[-1], "rounds": rounds}
    table.append(row)
    print(f"{name:<60} {row['other']:>10.3f} {row['ours']:>10.3f} {row['times_as_good']:>8.2f}x  ({ratios[0]:.2f} to {ratios[-1]:.2f})  {key}", flush=True)


def second_epoch_of_ours(folder):
    lines = (folder / "metrics.csv").read_text().splitlines()
    return dict(zip(lines[0].split(","), map(float, lines[2].split(","))))["seconds"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the data set; without it, phantoms")
    parser.add_argument("--tutorial", type=Path, help="folder with the tutorial's own net.py, data.py, train.py and predict.py")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=64, help="images in an epoch; 0 for the whole data set")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--json", type=Path, default="benchmark.json")
    args = parser.parse_args()
    size, filters, batch, steps, rounds = (32, 4, 4, 2, 1) if args.quick else (256, 32, 32 if args.images >= 32 or not args.images else args.images, 3, args.rounds)
    args.images = 8 if args.quick else args.images

    import torch

    from net import UNet
    table, facts = [], {}
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        source = args.data
        if source is None:
            from download import make_phantoms
            source = make_phantoms(place / "phantoms", counts=(24, 8, 8), size=128)
        source = source.resolve()
        counts = {"train": args.images, "valid": max(args.images // 4, 2), "test": 2} if args.images else {"train": None, "valid": None, "test": 2}
        data = subset(source, place / "data", counts)
        settings = {"data": str(data), "size": size, "filters": filters, "batch": batch, "steps": steps, "device": args.device,
                    "plain": False, "compile": False}
        torch.save(UNet(n_filters=filters).state_dict(), place / "best_model.pth")
        print(f"{'':<60} {'other':>10} {'ours':>10}")

        def wanted(name):
            return args.only in name

        def row(name, key, ours, other, higher_is_better=False):
            if wanted(name):
                compare(table, name, key, ours, other, rounds, higher_is_better)

        # ---- loading
        ours = snippet(LOADER_OURS, settings)
        row("loader, cached against decoding each time", "images_per_second", ours, snippet(LOADER_EACH_TIME, settings), True)
        if args.tutorial:
            row("loader, against the tutorial's", "images_per_second", ours, snippet(LOADER_TUTORIAL, settings, args.tutorial), True)

        # ---- training
        last = {}

        def step(**change):
            def once():
                last.update(snippet(STEP, {**settings, **change})())
                return last
            return once

        row("training step, against fp32, contiguous, unfused", "images_per_second", step(), step(plain=True), True)
        if wanted("training step") and last:
            facts.update({key: last[key] for key in ("share_of_matrix_rate", "matrix_tflops", "gpu_gib", "peak_mib")})
            print(f"  a step runs at {100 * facts['share_of_matrix_rate']:.0f} % of the {facts['matrix_tflops']:.2f} TFLOP/s of a matrix product")
        if not args.quick:  # compiling takes a minute
            row("training step, compiled against not", "images_per_second", step(compile=True), step(), True)

        def train(folder, data=data, launcher=(sys.executable,), epochs=2, extra=()):
            found = run([*launcher, ROOT / "train.py", "--data", data, "--out", place / folder, "--epochs", epochs, "--image-size", size,
                         "--n-filters", filters, "--batch-size", batch, "--device", args.device, "--swanlab", "disabled", *extra])
            return {**found, "second_epoch": second_epoch_of_ours(place / folder) if epochs > 1 else None}

        if args.tutorial:
            link = args.tutorial / "dataset"
            link.unlink(missing_ok=True)
            link.symlink_to(data)

            def tutorial_epochs():
                os.environ["EPOCHS"] = "2"
                text = run([sys.executable, "train.py"], cwd=args.tutorial)["text"]
                lines = [json.loads(line.split("TUTORIAL ")[1]) for line in text.splitlines() if line.startswith("TUTORIAL ")]
                return {"second_epoch": next(line["seconds"] for line in lines if line["step"] == 2)}

            row("second epoch, against the tutorial's", "second_epoch", lambda: train("epoch"), tutorial_epochs)
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
        row("second epoch, two processes against one", "second_epoch", lambda: train("two", launcher=torchrun), lambda: train("one"))

        # ---- prediction
        picture = sorted((data / "test").glob("*.*g"))[0]
        folder = place / "folder"
        folder.mkdir()
        pictures = [path for path in sorted((data / "train").iterdir()) if path.suffix != ".json"]
        for number in range(10 if args.quick else 200):
            (folder / f"{number}{picture.suffix}").symlink_to(pictures[number % len(pictures)].resolve())
        predict = [sys.executable, ROOT / "predict.py", "--device", args.device, "--model", place / "best_model.pth"]
        facts["single_prediction_seconds"] = run([*predict, picture, "--output", place / "single"])["wall"]
        if args.tutorial:
            example = data / "test" / "27_jpg.rf.b2a2b9811786cc32a23c46c560f04d07.jpg"  # the image its predict.py opens
            if not example.exists():
                example.symlink_to(picture.resolve())
            torch.save(UNet(n_filters=32).state_dict(), args.tutorial / "best_model.pth")
            torch.save(UNet(n_filters=32).state_dict(), place / "best_model.pth")
            row("one prediction from a cold start, against the tutorial's", "wall", lambda: run([*predict, example, "--output", place / "single"]),
                lambda: run([sys.executable, "predict.py"], cwd=args.tutorial))
            row("a folder of 200 images, against the tutorial's", "wall", lambda: run([*predict, folder, "--output", place / "masks"]),
                snippet(FOLDER_TUTORIAL, {**settings, "folder": str(folder), "model": str(place / "best_model.pth")}, args.tutorial))

        # ---- memory and time against the number of images
        if wanted("scale"):
            base = {"train": 32 if not args.quick else 8, "valid": 4, "test": 2}
            for factor in (1, 4, 16):
                scaled = subset(source, place / f"x{factor}", base, repeat=factor)
                flags = ("--image-size", 128 if not args.quick else 32, "--n-filters", 4, "--batch-size", 8)
                train(f"cache{factor}", scaled, epochs=1, extra=flags)  # makes the cache
                found = train(f"scale{factor}", scaled, extra=flags)
                images = base["train"] * factor
                facts[f"scale_{factor}x"] = {"images": images, "peak_mib": found["peak_mib"], "ms_per_image": 1000 * found["second_epoch"] / images}
                print(f"scale, {images:>5} images: peak {found['peak_mib']:.0f} MiB, {facts[f'scale_{factor}x']['ms_per_image']:.2f} ms an image in the second epoch", flush=True)

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and args.device != "cpu" else None
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__, "python": platform.python_version()}
    args.json.write_text(json.dumps({"machine": machine, "settings": {"size": size, "filters": filters, "batch": batch, "images": args.images},
                                     "rows": table, "facts": facts}, indent=1))
    print(f"{machine}\nwritten to {args.json}")


if __name__ == "__main__":
    main()
