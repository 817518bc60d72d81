"""`predict.py --page`: a page in the browser, for one person. gradio is optional.

Of a forged request gradio lets a File read uploads only, but an Image, an ImageSlider or a Gallery
any picture of this computer: these are never the input of an event.
"""

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
import threading
import weakref
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from medseg import cli, drawing, images, pieces
from medseg.files import file_format, name_file
from medseg.inference import PLAIN, Inference, flips_to_average
from medseg.own_files import TABLE
from medseg.predicting import inputs
from medseg.results.assessment import describe_unlike, reliability_columns
from medseg.results.folder import Results
from medseg.results.masks import describe, make_masks
from medseg.results.table import COLUMNS, measure, table_text, write_text
from medseg.samples import KINDS
from medseg.signals import Signals

OLDEST_GRADIO = (6, 31)  # that of 6.0 has the browser fetch files from other sites
EXAMPLES, MAX_UPLOAD = 4, 2 * 1024**3  # how many, and bytes of a file, at most
VIEW_SIDE, HEIGHT = 2048, 330  # pixels of what the browser can zoom into, and on its screen
WAITING = "Drop an image above."
ABOUT = f"Takes {KINDS}. Nothing is sent. **Not for clinical use.**"
# What each download writes of an image, as --write names it.
DOWNLOADS = {"masks": ("mask",), "table": (), "all": ("mask", "overlay", "labelme")}
LABELS = {"min-area": "Smallest piece, pixels", "min-mm2": "Smallest piece, mm²"}
LABELS |= {"largest": "Only the largest piece", "fill": "Fill holes", "split": "Split touching"}
CSS = """
#examples .grid-wrap { padding-top: 2.2rem; }
#examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
.switch { min-width: 120px !important; flex: 1 1 120px !important; }
#image, #mask, #overlay, #overlay img, #examples .thumbnail-lg { background: #14171c !important; }
"""
# Under the name the file has on the server, as soon as it is written.
START_DOWNLOAD = """file => file && Object.assign(document.createElement("a"),
  {href: file.url, download: file.orig_name}).click()"""


# ---- what was predicted: probabilities, kept so that threshold and clean-up can change -------


class Session:
    """The predictions of some files, below `folder`, removed when nothing refers to them.

    model: a `medseg.predictor.Predictor`; window, pixel_size: as of `inputs.open_file`.
    predictions: of each image its frame, size, `Prediction`, how many pixels are `marked`, and
    `arrays`, a file with the picture as it is shown and the probabilities; volumes are the last.
    first: the index of that to show first. problems: a line on each file that could not be
    predicted.
    """

    def __init__(self, folder, model, window=None, pixel_size=None):
        self.model, self.names, self.threshold = model, model.info.class_names, None
        self._window, self._pixel_size = window, pixel_size
        self.predictions, self.problems, self.first, self._files = [], [], 0, {}
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        weakref.finalize(self, shutil.rmtree, self._folder, True)

    def predict(self, paths, threshold, tta=False, progress=lambda done, title: None):
        """Run the network on image, DICOM and NIfTI files; tta: average over flips.

        progress((done, None), title): called before each image; done: how many are.
        """
        info, self.threshold = self.model.info, threshold
        flips = flips_to_average(info.inference, info.trained_flips) if tta else ()
        self.model.inference = self.model.inference._replace(threshold=threshold, flips=flips)
        for number, frame in enumerate(self._open(paths)):
            progress((number, None), frame.title)
            with self._noting_problems():
                self._add(frame)
        self.problems = [why.replace(f"{self._folder}{os.sep}", "") for why in self.problems]
        if len({one.frame.path for one in self.predictions}) == 1:  # the slice with most foreground
            self.first = int(np.argmax([one.marked for one in self.predictions]))

    def _open(self, paths):
        """Yield the Frame of each image and slice that can be read."""
        with self._noting_problems():
            files = inputs.expand([self._own_copy(path) for path in paths], self.model.info)
            self._files |= {file.path: file for file in files}
            frames, volumes, problems = inputs.sort_files(files, self._window, self._pixel_size)
            self.problems += [why for _, why in problems]
            yield from frames
            for file in volumes:
                with self._noting_problems():
                    yield from inputs.open_file(file, self._window, self.model.info)[0]

    def _own_copy(self, path):
        """The path of the file in the folder; the second scan.png becomes 2_scan.png."""
        own = self._folder / Path(path).name
        while own.exists():
            own = own.with_name(f"2_{own.name}")
        return Path(shutil.copyfile(path, own))

    @contextlib.contextmanager
    def _noting_problems(self):
        try:
            yield
        except (FileNotFoundError, ValueError) as error:
            self.problems.append(cli.one_line(error))

    def _add(self, frame):
        image, model = frame.read(), self.model
        with name_file(frame.path):
            inputs.check_channels(image, model.info)
            pixels = images.preprocess(image, model.info.image_size, model.n_channels)
        (prediction,) = model.predict(torch.from_numpy(pixels)[None].permute(0, 3, 1, 2))
        view, arrays = image.rgb(), Path(tempfile.mkdtemp(dir=self._folder), "arrays.npz")
        view.thumbnail((VIEW_SIDE, VIEW_SIDE), Image.Resampling.BICUBIC)
        np.savez(arrays, view=np.asarray(view), probabilities=prediction.probabilities)
        if file_format(frame.path) == "volume":
            frame = frame._replace(read=None)  # which keeps the whole volume in memory
        one = SimpleNamespace(frame=frame, size=image.size, arrays=arrays)
        one.marked = int((prediction.probabilities > self.threshold).sum())
        one.assessed = prediction._replace(probabilities=None)  # they are on the disk
        self.predictions.append(one)

    def _load(self, one, threshold, clean):
        """(picture as it is shown, `Prediction`): its agreement is at the network's threshold."""
        pieces.check_clean(clean, one.frame.spacing, one.frame.path.name)
        with np.load(one.arrays) as arrays:
            image = Image.fromarray(arrays["view"])
            known = one.assessed._replace(probabilities=arrays["probabilities"])
        return image, known if threshold == self.threshold else known._replace(agreement=None)

    def view(self, index, threshold, clean=PLAIN.clean, **looks):
        """([image, mask, overlay], PIL images; lines on them; rows of measurements, of each class).

        clean: as `Inference` has it; looks: of the overlay. ValueError where it cannot clean up.
        """
        one, names, inference = self.predictions[index], self.names, Inference(threshold, (), clean)
        (image, prediction), frame = self._load(one, threshold, clean), one.frame
        probabilities, image = prediction.probabilities, images.enlarge_small(image)
        masks = make_masks(self.model, probabilities, one.size, frame.spacing, inference=inference)
        labels = images.resize_nearest(masks.labels, image.height, image.width)
        mask = drawing.with_legend(drawing.draw_labels(labels, len(names)), names)
        drawn = drawing.overlay(image, labels, len(names), **looks)
        unlike = describe_unlike([(each.frame.title, each.assessed) for each in self.predictions])
        about = filter(None, [drawing.describe_shown(self.model.info.channel_names)])
        lines = [describe(frame.title, masks, names, inference), *unlike, *self.problems, *about]
        rows = measure(masks, names, frame.spacing, frame.depth)
        rows = [row | reliability_columns([prediction]) for row in rows]
        return [image, mask, drawn], lines, rows

    def save(self, image):
        """Write a picture of `view`; return its path, which is the same every time."""
        exact = image.getcolors() is not None  # masks and grey images: few colours are fast as PNG
        name = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
        path = self._folder / f"{name}.{'png' if exact else 'jpg'}"
        (images.save_png if exact else images.save_jpeg)(image, path)
        return str(path)

    def download(self, what, threshold, clean=PLAIN.clean):
        """The path of one of DOWNLOADS, of the bytes that predict.py writes: a file, or a zip."""
        folder = Path(tempfile.mkdtemp(dir=self._folder), what)
        folder.mkdir()
        inference = Inference(threshold, clean=clean)
        results = Results(folder, self.model, DOWNLOADS[what], inference=inference)
        for path, group in groupby(self.predictions, lambda one: one.frame.path):
            predicted = ((one, self._load(one, threshold, clean)[1]) for one in group)
            if file_format(path) == "volume":
                slices = ((one.frame, one, prediction) for one, prediction in predicted)
                _, volume = inputs.open_file(self._files[path], self._window, self.model.info)
                results.add_volume(self._files[path], volume, slices, self._window)
                continue
            if what == "all":
                path = Path(shutil.copy(path, folder))  # LabelMe needs it beside its file
            for one, prediction in predicted:
                results.add(one.frame._replace(path=path), one.frame.read(), prediction)
        if what != "masks":
            write_text(folder / TABLE, table_text([*chain(*results.rows.values())]))
        written = list(folder.iterdir())
        return written[0] if len(written) == 1 else Path(shutil.make_archive(folder, "zip", folder))


# ---- controls, layout and events -------------------------------------------------------------


def layout(model, title, examples, folder, settings):
    """The gradio.Blocks of the page; examples: paths of images; the others as of `Session`."""
    import gradio as gr

    tall, parts = {"height": 190, "min_width": 340}, SimpleNamespace()
    wide = {"height": HEIGHT, "min_width": 240, "interactive": False, "buttons": ["fullscreen"]}
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown(f"## {title}\n{ABOUT}", elem_id="head")
        with gr.Row():
            parts.files = gr.File(label="Images", file_count="multiple", elem_id="files", **tall)
            looks = {"columns": EXAMPLES, "object_fit": "contain", "visible": bool(examples)}
            looks |= {"allow_preview": False, "interactive": False, "buttons": [], **tall}
            looks |= {"label": "Examples: click one", "elem_id": "examples"}
            shown = [images.read_image(path).rgb() for path in examples]
            parts.examples = gr.Gallery(shown, **looks)
        with gr.Row():
            image = gr.Image(label="Image", elem_id="image", **wide)
            mask = gr.Image(label="Mask", elem_id="mask", **wide)
            looks = {"slider_position": 0, "max_height": HEIGHT, "elem_id": "overlay", **wide}
            drawn = gr.ImageSlider(label="Overlay: turn the wheel to zoom", **looks)
        parts.text = gr.Textbox(WAITING, show_label=False, max_lines=8, elem_id="text")
        with gr.Row(visible=False, equal_height=True) as parts.pictures:
            parts.previous = gr.Button("Previous", min_width=90, elem_id="previous")
            parts.next = gr.Button("Next", min_width=90, elem_id="next")
            parts.number = gr.Slider(1, 2, 1, step=1, label="Picture", scale=4, elem_id="number")
        add_settings(gr, model, parts)
        table = gr.Dataframe(interactive=False, visible=False, show_label=False, elem_id="rows")
        parts.shown = [image, mask, drawn, parts.text, table]
        with gr.Row():
            button = partial(gr.Button, interactive=False, min_width=120)
            parts.buttons = [button(f"Download {what}", elem_id=what) for what in DOWNLOADS]
        parts.written, parts.session = gr.File(visible=False), gr.State()
        connect(gr, parts, examples, lambda: Session(folder, model, **settings))
    return blocks


def add_settings(gr, model, parts):
    """Threshold, looks, flips and clean-up, which begin as the weights or the flags have them."""
    info, (threshold, flips, clean) = model.info, model.inference
    sizes = {"step": 0.01, "min_width": 300}
    with gr.Row(equal_height=True):
        threshold = gr.Slider(0, 1, threshold, label="Threshold", elem_id="threshold", **sizes)
        opacity = gr.Slider(0, 1, 0.4, label="Overlay: opacity", elem_id="opacity", **sizes)
    with gr.Row(equal_height=True):
        outlined = gr.Checkbox(label="Overlay: outline", elem_id="outline", elem_classes="switch")
        views = Inference(flips=flips_to_average(info.inference, info.trained_flips)).extras()[0]
        looks = {"label": f"Average over {views}", "elem_id": "tta", "elem_classes": "switch"}
        parts.cleaning, parts.tta = [], gr.Checkbox(bool(flips), **looks)
        for name, (default, highest) in pieces.CLEANINGS.items():
            looks = {"label": LABELS.get(name, name), "elem_id": name, "elem_classes": "switch"}
            part = gr.Checkbox if default else partial(gr.Number, minimum=0, maximum=highest)
            parts.cleaning.append(part(clean.get(name, 0), **looks))
    parts.threshold, parts.settings = threshold, [threshold, opacity, outlined, *parts.cleaning]


def connect(gr, parts, examples, new_session):
    """What happens on which event; new_session() -> a `Session`."""
    private, report = {"api_visibility": "private"}, gr.Progress()  # found among the defaults

    def choose(event: gr.SelectData):
        return [shutil.copy(examples[event.index], tempfile.gettempdir())]

    def predict(paths, threshold, tta, progress=report):
        session = new_session()
        session.predict(paths or [], threshold, tta, progress)
        count = len(session.predictions)
        number = gr.Slider(maximum=max(count, 2), value=session.first + 1)
        buttons = [gr.Button(interactive=count > 0) for _ in DOWNLOADS]
        return session, number, gr.Row(visible=count > 1), *buttons

    def show(session, number, threshold, opacity, outlined, *cleaning):
        if session is None or not session.predictions:
            lines = (session and session.problems) or [WAITING]
            return None, None, None, "\n".join(lines), table_of(gr, [])
        index, looks = step(0, session, number) - 1, {"opacity": opacity, "outlined": outlined}
        pictures, lines, rows = told(session.view, index, threshold, clean_of(cleaning), **looks)
        image, mask, drawn = map(session.save, pictures)
        return image, mask, (image, drawn), "\n".join(lines), table_of(gr, rows)

    def step(by, session, number):
        return min(max(int(number) + by, 1), len(session.predictions) if session else 1)

    def write(what, session, threshold, *cleaning):
        return session and str(told(session.download, what, threshold, clean_of(cleaning)))

    def told(method, *given, **looks):
        try:
            return method(*given, **looks)
        except ValueError as error:  # a clean-up in mm2, of pixels of unknown size
            raise gr.Error(str(error), print_exception=False) from None

    shows = {"inputs": [parts.session, parts.number, *parts.settings], "outputs": parts.shown}
    shows |= {"fn": show, "show_progress": "hidden", "trigger_mode": "always_last", **private}
    network = {"inputs": [parts.files, parts.threshold, parts.tta], "fn": predict, **private}
    network["outputs"] = [parts.session, parts.number, parts.pictures, *parts.buttons]
    network |= {"show_progress_on": parts.text, "concurrency_id": "network"}
    changed = [parts.files.upload, parts.files.delete, parts.files.clear, parts.tta.input]
    gr.on(changed, **network).then(**shows)
    chosen = parts.examples.select(choose, None, parts.files, **private)
    chosen.then(**network).then(**shows)
    for button, by in ((parts.previous, -1), (parts.next, 1)):
        place = [parts.session, parts.number]
        button.click(partial(step, by), place, parts.number, **private).then(**shows)
    gr.on([parts.number.input, *(setting.change for setting in parts.settings)], **shows)
    for button, what in zip(parts.buttons, DOWNLOADS, strict=True):
        given = [parts.session, parts.threshold, *parts.cleaning]
        click = button.click(partial(write, what), given, parts.written, **private)
        click.then(None, parts.written, None, js=START_DOWNLOAD)


def clean_of(cleaning):
    """Values of the controls of the clean-up, in the order of CLEANINGS -> of `Inference`."""
    return pieces.read_clean(dict(zip(pieces.CLEANINGS, cleaning, strict=True)))


def table_of(gr, rows):
    """The rows of one picture as a Dataframe, of the known columns; hidden without rows."""
    names = [name for name in COLUMNS[1:] if any(row.get(name) is not None for row in rows)]
    cells = [[row.get(name) for name in names] for row in rows]
    cells = [[f"{cell:.4g}" if type(cell) is float else cell for cell in row] for row in cells]
    return gr.Dataframe({"headers": names, "data": cells}, visible=bool(rows))


# ---- the server ------------------------------------------------------------------------------


def serve(model, model_paths, address, **settings):
    """Serve the page until Ctrl-C, SIGTERM or a closed terminal; then remove what was uploaded.

    model: of the files `model_paths`; address: as of `launch`; settings: as of `Session`.
    """
    signals = Signals()
    with signals.exit_when_stopped(""), signals.installed(), temporary_folder(signals) as folder:
        gradio, title = import_gradio(folder), f"Segmentation with {', '.join(model_paths)}"
        examples = inputs.learned_images(model_paths[0], EXAMPLES)
        blocks = layout(model, title, examples, folder, settings)
        launch(gradio, blocks, *address)
        while True:
            threading.Event().wait(0.5)  # Windows notices Ctrl-C only between two of these


@contextlib.contextmanager
def temporary_folder(signals):
    """The folder of all temporary files, removed in the end also where threads write to it."""
    others, tempfile.tempdir = tempfile.tempdir, tempfile.mkdtemp(prefix="medseg-page-")
    folder = tempfile.tempdir
    try:
        yield folder
    finally:
        signals.received, signals.deferred = 0, True  # a second Ctrl-C leaves nothing behind
        for _ in range(100):
            shutil.rmtree(folder, ignore_errors=True)
        tempfile.tempdir = others


def import_gradio(folder):
    """The module, told to send nothing and to keep files in `folder`; ValueError without it."""
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_NUM_WORKERS"] = "0"  # which would hand out files to any Host
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"  # launch() asks itself for the page
    with contextlib.suppress(ImportError):
        import gradio

        if tuple(map(int, gradio.__version__.split(".")[:2])) >= OLDEST_GRADIO:
            return gradio
    raise ValueError("the page needs gradio 6.31 or later: run `pip install -U gradio`")


def launch(gradio, blocks, host, port, auth):
    """Serve a gradio.Blocks in threads. port: None for a free one; auth: (user, password)."""
    import fastapi

    local = host == "localhost" or host.startswith("127.")

    def check(request: fastapi.Request):
        """Other sites in the same browser get nothing, nor one renamed to 127.0.0.1."""
        named, origin = (request.headers.get(name, "") for name in ("host", "origin"))
        known = not local or named.partition(":")[0] in ("localhost", "127.0.0.1", host)
        if not known or (origin and origin.partition("://")[2] != named):
            raise fastapi.HTTPException(403, "another Host or Origin than this page")

    try:  # gradio would try in vain for minutes
        socket.create_server((host, port or 0)).close()
    except OSError as error:
        raise ValueError(f"--host {host} --port {port or ''}: {error.strerror or error}") from None
    checked = {"dependencies": [fastapi.Depends(check)], "openapi_url": None}
    where = {"server_name": host, "server_port": port, "auth": auth}
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # none is fetched
    theme = gradio.themes.Default(primary_hue="sky", neutral_hue="slate", **fonts)
    looks = {"theme": theme, "css": CSS, "footer_links": [], "quiet": True}
    off = ("share", "ssr_mode", "enable_monitoring", "mcp_server", "pwa", "run_history")
    looks |= {"max_file_size": MAX_UPLOAD, **dict.fromkeys(off, False)}
    blocks.launch(app_kwargs=checked, prevent_thread_lock=True, **where, **looks)
    print(f"open {blocks.local_url.rstrip('/')} in a browser; Ctrl-C ends it", flush=True)
    if not local and not auth:
        print(f"every computer that can reach {host} can use the page: see --auth", flush=True)
