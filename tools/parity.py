"""Do exported models, and bf16, give what PyTorch gives in fp32? Two tables.

    python tools/parity.py                        # every network and format, random weights
    python tools/parity.py --images dataset/test --model dataset/tumor.pth   # masks of real images

The first table has the largest difference of a probability over images of 1x1, 37x50, 64x96,
255x257 and 640x640 pixels and a batch of three. The second has the mask pixels that are not those
of PyTorch in fp32, at the size of the images, and the Dice of each format.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import table_row

from medseg.cli import ArgumentParser


def networks(n_filters=None):
    """{name: UNet}: the named networks, and the tutorial's with both kinds of normalisation.

    n_filters: instead of those that --arch has.
    """
    from medseg.layers import ARCHITECTURES, N_FILTERS
    from net import UNet

    normalised = {f"--norm {norm}": {"norm": norm} for norm in ("batch", "group")}
    models = {}
    for name, architecture in {**ARCHITECTURES, **normalised}.items():
        filters = n_filters or N_FILTERS.get(name, N_FILTERS["tutorial"])
        models[name] = draw_weights(UNet(n_filters=filters, **architecture))
    return models


def draw_weights(model):
    """Random weights whose probabilities vary: those of a new UNet are nearly constant."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            torch.nn.init.kaiming_normal_(module.weight)
    model.train()
    with torch.no_grad():
        for _ in range(3):  # running means and variances
            model(torch.randn(2, model.n_channels, 64, 64))
    return model.eval()


def compare_networks(models, folder):
    """Print a row for each network: its spread of probabilities, and the difference of each format.

    A format that refuses a network has its reason in the row.
    """
    from medseg.predicting.export import FORMATS, export

    print_row("network", "probabilities", *FORMATS)
    for name, model in models.items():
        with torch.inference_mode():
            out = model(torch.randn(1, model.n_channels, 64, 64))
        cells = [f"{out.min():.2f} to {out.max():.2f}"]
        for suffix in FORMATS:
            try:
                cells.append(f"{export(model, folder / f'model{suffix}'):.1e}")
            except ValueError as error:
                cells.append(str(error))
        print_row(name, *cells)


def compare_masks(path, images, folder):
    """Print a row for each format and for bf16: mask pixels that differ from fp32, and Dice."""
    import predict
    from medseg.inference import PLAIN, full_size_masks
    from medseg.metrics import class_scores
    from medseg.predicting import scoring
    from medseg.predictor import Predictor

    models = open_models(path, folder)
    predictor = Predictor([predict.load_model(path, "cpu")], "cpu", inference=PLAIN)
    scores = {name: scoring.open_folder(predictor, images) for name in models}
    differing = {name: [] for name in models}  # pixels of each image
    dataset, size = scores["fp32"].dataset, 0
    for index in range(len(dataset)):
        image, _ = dataset.load(index)
        size += image.width * image.height
        masks = {}
        sizes = {"image_size": dataset.image_size, "n_channels": dataset.n_channels}
        tensor, _ = predict.preprocess_image(image, **sizes)
        for name, run in models.items():
            probabilities = torch.as_tensor(run(tensor)).detach().numpy()[0]
            scores[name].add(dataset.path(index), image.size, probabilities)
            masks[name] = full_size_masks(probabilities, image.size, 0.5)
            differing[name].append(np.count_nonzero(masks[name] != masks["fp32"]))
    print(f"{path}, {images}: {len(dataset)} images, {size} pixels")
    print_row("", "mask pixels that differ", "in so many images", "Dice")
    for name in models:
        counts, *_ = scores[name].result()
        dice = class_scores(counts[:, 0], predictor.info.class_names)["dice"]
        different = np.array(differing[name])
        print_row(name, different.sum(), np.count_nonzero(different), f"{dice:.6f}")


def open_models(path, folder):
    """{name: a function of normalised images} of a file of weights, exported to `folder`."""
    import predict
    from medseg.device import make_autocast
    from medseg.inference import PLAIN
    from medseg.predicting.export import FORMATS, export
    from medseg.predictor import Predictor

    model, models = predict.load_model(path, "cpu"), {}
    for name in ("fp32", "bf16"):
        autocast = make_autocast(name, torch.device("cpu"))
        models[name] = Predictor([model], "cpu", inference=PLAIN, autocast=autocast)
    for suffix, (_, read, _) in FORMATS.items():
        file = folder / f"model{suffix}"
        export(model, file)
        models[suffix] = read(file)
    return models


def print_row(*cells):
    print(table_row(*cells), flush=True)


def main(argv=None):
    parser = ArgumentParser("tools/parity.py", __doc__)
    parser.add_argument("--images", type=Path, help="a folder with annotations")
    parser.add_argument("--model", default="best_model.pth", help="weights for --images")
    parser.add_argument("--n-filters", type=int, help="of the networks (default: as published)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.images:
            compare_masks(args.model, args.images, Path(folder))
        else:
            compare_networks(networks(args.n_filters), Path(folder))


if __name__ == "__main__":
    main()
