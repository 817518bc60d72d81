"""`predict.py --page`: a page in the browser, on this computer. gradio is optional. No torch.

What it predicts with, here called the predictor, is a `medseg.predicting.models.Model`.
"""

import html
import os
import signal
import sys
import threading
from types import SimpleNamespace

import numpy as np
from PIL import Image

from medseg.drawing import class_colors
from medseg.images import FORMAT_NAMES, read_image, save_png
from medseg.page import server
from medseg.page.gate import MAX_UPLOAD, SHARED, Gate, browser_folder
from medseg.page.session import Session
from medseg.phantoms import draw_phantom
from medseg.predicting.inputs import data_set_images
from medseg.signals import Signals, Stopped

OLDEST_GRADIO = (6, 31)  # that of 6.0 has the browser fetch files from other sites
EXAMPLES, THUMBNAIL = 4, 160  # how many, and pixels a side
UPLOADS = "uploads"  # the folder of what browsers send and get
MAX_PROBLEMS = 5  # lines shown
TAKES = f"Images: DICOM, NIfTI, {FORMAT_NAMES}; one or several"
WAITING = "Drop an image above, or choose an example."
CSS = """
.gradio-container > main { max-width: 1100px !important; padding: 1.2rem !important; }
#head h1 { margin: 0; font-size: 1.35rem; font-weight: 600; overflow-wrap: anywhere; }
#head p { margin: 0.2rem 0 0; color: var(--neutral-600); }
.dark #head p { color: var(--neutral-300); }
#head strong { color: #b45309; font-weight: 600; }
.dark #head strong { color: #fbbf24; }
#examples .grid-wrap { padding-top: 2.2rem; }
#examples .thumbnail-lg { background: #000; }
#image, #mask, #overlay { background: #14171c; }
#text p { margin: 0.1rem 0; font-size: 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
#text .problem { color: #b91c1c; }
.dark #text .problem { color: #fca5a5; }
#text .legend span { margin-right: 1.2rem; }
#text .legend i { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.4em;
  border-radius: 2px; vertical-align: -0.1em; }
#download { align-self: stretch; font-size: 1rem; }
"""
# Under the name the file has on the server, as soon as it is written.
START_DOWNLOAD = """(file) => {
  if (!file) return;
  const link = document.createElement("a");
  link.href = file.url;
  link.download = file.orig_name;
  link.click();
}"""


def serve(
    predictor,
    model_path,
    *,
    host="127.0.0.1",
    port=None,
    threshold=0.5,
    window=None,
    pixel_size=None,
):
    """Serve the page until Ctrl-C, SIGTERM or a closed terminal; then remove what was uploaded.

    port: None for 7860 or the next free one, 0 for any free one. threshold: where the slider
    starts. window: (center, width) of DICOM and NIfTI values. Raises ValueError where gradio is
    missing or the address cannot be had.
    """
    signals = Signals()
    try:
        with (
            signals.installed(),
            server.hang_up_ends(signals),
            server.open_socket(host, port) as listening,
            server.temporary_folder("medseg-page-") as folder,
        ):
            gradio = import_gradio(folder)
            uploads = folder / UPLOADS
            page = Page(gradio, predictor, uploads, threshold, window, pixel_size)
            blocks = layout(page, f"Segmentation with {model_path}", example_images(folder))
            server.run(Gate(make_app(gradio, blocks), uploads), listening, host)
    except Stopped as stop:
        print(f"stopped by {signal.Signals(stop.signum).name}", file=sys.stderr)
        sys.exit(128 + stop.signum)


def import_gradio(folder):
    """The module, told to send nothing and to keep files in `folder`.

    Raises ValueError where it is missing or too old.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # predictions, stored in the browser
    os.environ["GRADIO_TEMP_DIR"] = str(folder / UPLOADS)
    try:
        import gradio
    except ImportError:
        raise ValueError("the page needs gradio: run `pip install gradio`") from None
    if tuple(map(int, gradio.__version__.split(".")[:2])) < OLDEST_GRADIO:
        oldest = ".".join(map(str, OLDEST_GRADIO))
        raise ValueError(
            f"the page needs gradio {oldest}, not {gradio.__version__}: run `pip install -U gradio`"
        )
    return gradio


def make_app(gradio, blocks):
    """The ASGI application of a gradio.Blocks. Not through its launch(), which asks itself for the
    page, and fails where a proxy is set."""
    import fastapi

    # Its default weight of 600 lacks most letters. The files are gradio's, none is fetched.
    font = gradio.themes.utils.fonts.LocalFont("Source Sans Pro", weights=(400, 700))
    hues = {"primary_hue": "sky", "neutral_hue": "slate"}
    blocks.queue(default_concurrency_limit=8)  # browsers do not wait for each other's whole folders
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        blocks,
        path="",
        css=CSS,
        theme=gradio.themes.Default(font=[font, "system-ui", "sans-serif"], **hues),
        max_file_size=MAX_UPLOAD,
        footer_links=[],
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
    )
    blocks.has_launched = True  # else gradio itself would read any file that a request names
    return app


class Page:
    """What the controls do. The layout is below."""

    def __init__(self, gradio, predictor, folder, threshold, window, pixel_size=None):
        self.gradio, self.predictor, self.folder = gradio, predictor, folder
        self.threshold, self.window, self.pixel_size = threshold, window, pixel_size
        self._lock = threading.Lock()  # browsers are served in threads; the network takes turns

    def probabilities(self, image):
        """PIL image -> float32 array (C, S, S) of 0..1."""
        pixels = self.predictor.prepare(image)
        with self._lock:
            return self.predictor.probabilities(pixels[None])[0]

    def predict(self, paths, threshold, progress, folder=None):
        """Predict files -> session, number and button as they are then, and what `show` returns.

        folder: of the session; by default that of all browsers.
        """
        predictor = self.predictor
        about = (predictor.class_names, self.window, predictor.orientation)
        session = Session(folder or self.folder, *about, predictor.inference.clean, self.pixel_size)
        session.predict(paths or [], self.probabilities, progress)
        count = len(session.predictions)
        number = session.first(threshold) + 1 if count else 1
        label = "Download mask" if count < 2 else f"Download {count} masks"
        return (
            session,
            self.gradio.Slider(maximum=max(count, 2), value=number, visible=count > 1),
            self.gradio.Button(label, interactive=count > 0),
            *self.show(session, number, threshold),
        )

    def show(self, session, number, threshold):
        """Image, mask, overlay and the text on them. The network does not run."""
        if session is None or not (session.predictions or session.problems):
            return None, None, None, text_html([WAITING])
        if not session.predictions:
            return None, None, None, text_html([], session.problems)
        last = len(session.predictions)  # less than the number, where pictures were just removed
        view = session.view(min(max(int(number), 1), last) - 1, threshold)
        text = text_html([view.line], session.problems, self.predictor.class_names)
        return view.image, view.mask, view.overlay, text


def layout(page, title, examples):
    """The gradio.Blocks of a `Page`."""
    gr = page.gradio
    about = {"title": title, "analytics_enabled": False}
    with gr.Blocks(fill_width=True, **about) as blocks:
        gr.HTML(head_html(title, page.predictor), elem_id="head")
        parts = SimpleNamespace(session=gr.State())
        with gr.Row():
            parts.files = gr.File(
                label=TAKES, file_count="multiple", height=150, min_width=340, elem_id="files"
            )
            parts.examples = gr.Gallery(
                write_thumbnails(examples, page.folder / SHARED),
                label="Examples: click one",
                columns=len(examples),
                height=150,
                min_width=340,
                object_fit="contain",
                allow_preview=False,
                interactive=False,
                buttons=[],
                elem_id="examples",
            )
        with gr.Row():
            parts.views = [
                gr.Image(
                    label=name.capitalize(),
                    format="png",
                    height=330,
                    min_width=240,
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id=name,
                )
                for name in ("image", "mask", "overlay")
            ]
        parts.text = gr.HTML(text_html([WAITING]), elem_id="text")
        parts.number = gr.Slider(1, 2, 1, step=1, label="Picture", visible=False, elem_id="number")
        with gr.Row(equal_height=True):
            parts.threshold = gr.Slider(
                *(0, 1, page.threshold),
                step=0.01,
                label="Threshold: foreground is above this probability",
                elem_id="threshold",
                scale=3,
                min_width=300,
            )
            parts.download = gr.Button(
                "Download mask", variant="primary", interactive=False, elem_id="download"
            )
        parts.written = gr.File(visible=False)
        connect(page, parts, examples)
    return blocks


def connect(page, parts, examples):
    """What happens on which event."""
    gr = page.gradio
    shown = [*parts.views, parts.text]
    predicted = [parts.session, parts.number, parts.download, *shown]
    private = {"api_visibility": "private"}

    def predict_in_folder(request, *given):
        folder = browser_folder(page.folder, request.session_hash)
        folder.mkdir(parents=True, exist_ok=True)
        session, *values = page.predict(*given, folder)
        return session, *as_files(session, values)

    report = gr.Progress()  # gradio looks for it among the defaults

    def predict(paths, threshold, request: gr.Request, progress=report):
        return predict_in_folder(request, paths, threshold, progress)

    def predict_example(threshold, request: gr.Request, event: gr.SelectData):
        if type(event.index) is not int or not 0 <= event.index < len(examples):
            raise gr.Error("no such example", print_exception=False)
        chosen = [examples[event.index]]
        return None, *predict_in_folder(request, chosen, threshold, lambda done: None)

    def show(session, number, threshold):
        return as_files(session, page.show(session, number, threshold))

    def write(session, threshold):
        return session and str(session.write(threshold))

    gr.on(
        [parts.files.upload, parts.files.delete, parts.files.clear],
        predict,
        [parts.files, parts.threshold],
        predicted,
        show_progress_on=parts.text,
        **private,
    )
    parts.examples.select(
        predict_example,
        parts.threshold,
        [parts.files, *predicted],
        show_progress_on=parts.text,
        **private,
    )
    gr.on(
        [parts.threshold.change, parts.number.input],
        show,
        [parts.session, parts.number, parts.threshold],
        shown,
        show_progress="hidden",
        trigger_mode="always_last",
        **private,
    )
    parts.download.click(write, [parts.session, parts.threshold], parts.written, **private).then(
        None, parts.written, None, js=START_DOWNLOAD
    )


# ---- examples and text -----------------------------------------------------------------------


def example_images(folder):
    """Paths of a few images of the data set; without one, of phantoms drawn into `folder`."""
    images = data_set_images()
    if images:
        return images[:: -(-len(images) // EXAMPLES)]
    paths = [folder / f"phantom_{number}.png" for number in range(1, EXAMPLES + 1)]
    for seed, path in enumerate(paths):
        pixels, _ = draw_phantom(np.random.default_rng(seed), 256)
        Image.fromarray(pixels).save(path)
    return paths


def as_files(session, values):
    """`values` with paths in the session's folder for images: gradio's own folder is everyone's."""
    return [session.save(one) if isinstance(one, Image.Image) else one for one in values]


def write_thumbnails(paths, folder):
    """Write the `thumbnail` of each image to a folder; return their paths."""
    folder.mkdir(parents=True)
    written = [folder / f"{number}.png" for number in range(len(paths))]
    for path, target in zip(paths, written, strict=True):
        save_png(thumbnail(path), target)
    return written


def thumbnail(path):
    """A small PIL image; grey where the file is damaged, as the page says once it is clicked."""
    try:
        image = read_image(path)
    except ValueError:
        return Image.new("RGB", (THUMBNAIL, THUMBNAIL), "grey")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def escape(text):
    """Text for HTML that gradio also takes for a template."""
    return html.escape(str(text)).replace("{", "&#123;").replace("$", "&#36;")


def head_html(title, predictor):
    side, names = predictor.image_size, predictor.class_names
    size = "its own size" if side is None else f"{side}x{side} pixels"
    classes = "one class" if len(names) == 1 else f"{len(names)} classes"
    extras = predictor.inference.extras()
    made = f" Masks: {', '.join(extras)}." if extras else ""
    return (
        f"<h1>{escape(title)}</h1><p>The network takes an image at {size} and marks {classes}."
        f"{escape(made)} "
        "Everything stays on the computer that runs this page. "
        "<strong>Not for clinical use.</strong></p>"
    )


def text_html(lines, problems=(), class_names=()):
    """Lines on a prediction, what could not be predicted, and with several classes the legend."""
    parts = [f"<p>{escape(line)}</p>" for line in lines]
    if len(class_names) > 1:
        colors = zip(class_names, class_colors(len(class_names)), strict=True)
        spans = [
            f'<span><i style="background: rgb{color}"></i>{escape(name)}</span>'
            for name, color in colors
        ]
        parts.append(f'<p class="legend">{"".join(spans)}</p>')
    said = list(problems[:MAX_PROBLEMS])
    if len(problems) > MAX_PROBLEMS:
        said.append(f"and {len(problems) - MAX_PROBLEMS} more")
    parts += [f'<p class="problem">{escape(line)}</p>' for line in said]
    return "".join(parts)
