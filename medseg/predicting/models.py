"""The two kinds of models that predict.py runs: weights in PyTorch, or an ONNX file without it."""

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from medseg.cli import one_line
from medseg.files import available_cores
from medseg.images import IMAGE_SIZE, describe, preprocess
from medseg.inference import PLAIN, average_over_flips, read_inference
from medseg.normalization import normalize
from medseg.ood import FeatureRecorder
from medseg.predicting.assessment import Agreement, assess
from medseg.predicting.onnx_file import import_onnx_library, not_ours, read_metadata
from medseg.pretrained import ABOUT_PRETRAINED, pretrained_path
from medseg.settings import read_settings
from medseg.tiles import apply_network, by_tiles, read_tiling, tiling_of

INPUT, OUTPUT = "images", "probabilities"  # of an ONNX file


def default_model():
    """The weights to use where none are named: best_model.pth, else PRETRAINED, and says so."""
    own, path = Path("best_model.pth"), pretrained_path()
    if own.exists() or path is None:
        return str(own)
    print(f"no {own} here: taking {path} ({ABOUT_PRETRAINED}; see docs/pretrained.md)")
    return str(path)


class Model:
    """A network, and what prediction has to know of it.

    image_size, n_channels, n_classes, class_names, window, orientation: as of `net.UNet`.
    recorded: the `medseg.inference.Inference` in its file, or None; inference: the one to predict
    with. batch_size: how many images to predict at a time. run(images): normalised float32
    (B, n_channels, H, W) -> probabilities, float32 array (B, n_classes, H, W), of one pass through
    the network; normalize(pixels): what it takes, of uint8 (B, H, W, n_channels). trained_flips:
    and exclusive: as of `net.UNet`. tiling: how it takes images too large for the memory, a
    `medseg.tiles.Tiling` or None.
    """

    recorded, inference, tiling = None, PLAIN, None
    recorder = agreement = None

    def __init__(self, network, device_type):
        self.image_size, self.n_channels = network.image_size, network.n_channels
        self.class_names, self.n_classes = tuple(network.class_names), len(network.class_names)
        self.window, self.orientation = network.window, network.orientation
        self.recorded = getattr(network, "inference", None)  # which only a UNet has
        self.inference = self.recorded or PLAIN
        self.trained_flips = tuple(getattr(network, "trained_flips", ()))
        self.exclusive = getattr(network, "exclusive", True)
        numbers = tuple(range(1, self.n_classes + 1))
        order = getattr(network, "draw_order", ()) or numbers
        self.draw_order = () if self.exclusive else order
        self.batch_size = 4 if device_type == "cpu" else 16  # more do not fit a CPU's caches
        if self.image_size is None:  # images keep their own
            self.batch_size = 1

    def prepare(self, image):
        """PIL image -> uint8 (S, S, n_channels), of the size that the network was trained at."""
        return preprocess(image, self.image_size, self.n_channels)

    def predict(self, image):
        """PIL image -> probabilities, float32 (n_classes, S, S)."""
        return self.probabilities(self.prepare(image)[None])[0]

    def probabilities(self, pixels):
        """uint8 (B, S, S, n_channels) -> float32 (B, n_classes, S, S), values 0..1."""
        channels_first = np.moveaxis(pixels, -1, 1)
        given = channels_first, self.tiling, self.device
        return by_tiles(self.predict_part, *given, enter=self.enter)

    def predict_part(self, pixels):
        """As `probabilities`, of uint8 (B, n_channels, H, W): images, or tiles of them."""
        return self.average(self.normalize(np.moveaxis(pixels, 1, -1)))

    def average(self, images):
        """As `run`, averaged over the flips of `inference`."""

        def run(part):
            return average_over_flips(self.run, part, self.inference.flips, self.see)

        return by_tiles(run, images, self.tiling, self.device, enter=self.enter)

    def members(self):
        """The models that are averaged: itself."""
        return [self]

    def assess(self, pixels):
        """(what `probabilities` gives, an `Assessment` of each image), of the same passes."""
        models, flips = self.members(), self.inference.flips
        agreement = Agreement(self.inference.threshold, len(models) * (1 + len(flips)))
        for model in models:
            model.agreement = agreement
        try:
            probabilities = self.probabilities(pixels)
        finally:
            ratios = [model.end() for model in models]
        return probabilities, assess(agreement.result(), ratios, len(pixels))

    def enter(self, inside):
        """Called before images, or tiles of them, are passed, of which `inside` is assessed."""
        for model in self.members():
            if model.agreement:
                model.agreement.inside = inside
                if model.recorder:
                    model.recorder.look(inside)  # at the first pass: the images as they are

    def see(self, probabilities):
        """Called with what each pass gives, flipped back."""
        if self.agreement:
            self.agreement.add(probabilities)

    def end(self):
        """Stop; returns how unlike the training each image is, (B,), or None if that is unknown."""
        self.agreement = None
        pooled = self.recorder.take() if self.recorder else None
        return None if pooled is None else self.statistics.ratios(pooled)

    def labels(self, probabilities, size, threshold, spacing=None, *, marked=None):
        """`medseg.inference.Inference.labels` at this threshold: what is written as the mask."""
        inference = self.inference._replace(threshold=threshold)
        options = {"marked": marked, "draw_order": self.draw_order}
        return inference.labels(probabilities, size, spacing, **options)

    def describe(self, path, labels, highest, threshold, marked):
        """`medseg.images.describe` of labels that were made at this threshold."""
        inference = self.inference._replace(threshold=threshold)
        return describe(path, labels, highest, self.class_names, inference, marked)

    def masks(self, probabilities, size, threshold, spacing=None):
        """The mask of each class by itself, bool (C, height, width); None if a pixel has one."""
        inference = self.inference._replace(threshold=threshold)
        return inference.overlapping(probabilities, size, spacing, exclusive=self.exclusive)


class TorchModel(Model):
    """A UNet on its device.

    precision: as --precision has it; images: how many are to be predicted, for which 'auto' may
    time bf16. `precision` is the one found, `precision_note` what to say of it.
    """

    def __init__(self, network, device, precision="auto", images=0):
        import torch

        from medseg.device import find_precision, make_autocast

        self.network, self.device = network, torch.device(device)
        super().__init__(network, self.device.type)
        self.statistics = getattr(network, "feature_statistics", None)  # which only a UNet has
        self.recorder = FeatureRecorder(network) if self.statistics else None
        self.tiling = tiling_of(network)
        amount = {"images": images, "size": self.image_size or IMAGE_SIZE}
        self.precision, self.precision_note = find_precision(
            precision, self.device, network, batch_size=self.batch_size, **amount
        )
        self.autocast = make_autocast(self.precision, self.device)

    def normalize(self, pixels):
        import torch

        return normalize(torch.from_numpy(pixels).to(self.device))

    def run(self, images):
        found = predict_probabilities(self.network, images, self.device, autocast=self.autocast)
        return found.cpu().numpy()


def predict_probabilities(network, images, device="cuda", *, autocast=nullcontext()):
    """Normalised images (B, n_channels, H, W) -> float32 probabilities (B, n_classes, H, W).

    images, and what is returned: tensors, the latter on the device. autocast: a context for the
    network, see `medseg.device.make_autocast`. Raises ValueError where the memory does not suffice.
    """
    import torch

    from medseg.device import available_device, out_of_memory

    device, (count, _, height, width) = available_device(device), images.shape
    try:
        with torch.inference_mode(), autocast:
            return apply_network(network, images.to(device))
    except (MemoryError, RuntimeError) as error:
        memory = out_of_memory(error)
        if memory is None:
            raise
        other = "" if torch.device(device).type == "cpu" else "try --device cpu, or "
        raise ValueError(
            f"out of {memory} with {count} x {width}x{height} pixels: {other}give smaller images"
        ) from None


class OnnxModel(Model):
    """A file of `predict.py --export model.onnx`, on the CPU.

    device, precision: as the flags of predict.py. The number of threads is OMP_NUM_THREADS, else
    that of the cores that this process may use. Raises FileNotFoundError; ValueError for any other
    file or device, and where onnxruntime is missing.
    """

    device, precision, precision_note = "cpu", "fp32", ""

    def __init__(self, path, device="auto", precision="auto"):
        if device not in ("auto", self.device):
            raise ValueError(
                f"--device {device}: {path} runs on the CPU; a GPU needs the .pth file"
            )
        if precision not in ("auto", "fp32"):
            raise ValueError(f"--precision {precision}: {path} runs in fp32; give the .pth file")
        metadata = read_metadata(path)  # which refuses files that onnxruntime must not see
        settings = read_settings(metadata)
        settings["inference"] = read_inference(metadata.get("inference"))
        super().__init__(SimpleNamespace(**(metadata | settings)), self.device)
        self.tiling = read_tiling(metadata.get("tiling"))
        self.path = Path(path)
        # In float32, as for the training: the same pixels give the same numbers.
        self.statistics = [np.float32(metadata[key]) * np.float32(255) for key in ("mean", "std")]
        try:
            onnxruntime = import_onnx_library("onnxruntime")
        except ImportError:
            raise ValueError(f"{path}: needs onnxruntime: pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = available_threads()
        options.log_severity_level = 4  # errors are raised, and one line is enough
        self.run_options = onnxruntime.RunOptions()
        self.run_options.log_severity_level = 4
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of kinds of its own
            raise ValueError(f"{path}: refused by onnxruntime ({one_line(error)})") from None
        self._check_signature()

    def _check_signature(self):
        """ValueError unless input and output are those that `medseg.predicting.export` writes."""
        signature = []
        for values in (self.session.get_inputs(), self.session.get_outputs()):
            for value in values:
                shape = [side if isinstance(side, int) else "any" for side in value.shape]
                signature.append((value.name, value.type, shape))
        expected = []
        for name, channels in ((INPUT, self.n_channels), (OUTPUT, self.n_classes)):
            expected.append((name, "tensor(float)", ["any", channels, "any", "any"]))
        if signature != expected:
            raise not_ours(self.path, f"its inputs and outputs are {signature!r:.300}")

    def normalize(self, pixels):
        return normalize(pixels, self.statistics)

    def run(self, images):
        """Raises ValueError where the network fails or what it returns are no probabilities."""
        images = np.ascontiguousarray(images)
        try:
            (result,) = self.session.run([OUTPUT], {INPUT: images}, self.run_options)
        except Exception as error:  # of kinds of its own
            size = "x".join(map(str, images.shape))
            raise ValueError(f"{self.path}: failed on {size} ({one_line(error)})") from None
        shape = (len(images), self.n_classes, *images.shape[2:])
        if result.shape != shape or not ((result >= 0) & (result <= 1)).all():
            raise not_ours(self.path, "what it returns are no probabilities")
        return result


def available_threads():
    """OMP_NUM_THREADS, or the number of cores that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isascii() and wanted.isdecimal() and 0 < int(wanted) <= 1024:
        return int(wanted)
    return available_cores()
