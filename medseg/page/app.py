"""`predict.py --page`: a page in the browser, on this computer. gradio is optional. No torch.

What it predicts with, here called the predictor, is a `medseg.predicting.models.Model`.
"""

import os
import signal
import sys
import threading
from functools import partial
from types import SimpleNamespace

from PIL import Image

from medseg.cli import parse_named_values
from medseg.images import FORMAT_NAMES
from medseg.inference import MAX_TEXT, PLAIN, flips_to_average
from medseg.page import server
from medseg.page.examples import example_images, write_thumbnails
from medseg.page.gate import MAX_UPLOAD, SHARED, Gate, browser_folder
from medseg.page.session import Session
from medseg.page.text import CSS, START_DOWNLOAD, head_html, table_html, text_html
from medseg.pieces import CLEANINGS
from medseg.signals import Signals, Stopped

OLDEST_GRADIO = (6, 31)  # that of 6.0 has the browser fetch files from other sites
UPLOADS = "uploads"  # the folder of what browsers send and get
TAKES = f"Images: DICOM, NIfTI, {FORMAT_NAMES}; one or several"
VIEW_HEIGHT = 330  # of the three pictures, in pixels of the browser
ZOOMS = "Overlay: turn the wheel to zoom"
WAITING = "Drop an image above, or choose an example."


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

    def assess(self, image, threshold, tta):
        """PIL image -> (probabilities, float32 array (C, S, S) of 0..1; Assessment)."""
        predictor = self.predictor
        pixels, flips = predictor.prepare(image), ()
        if tta:
            flips = flips_to_average(predictor.recorded, predictor.trained_flips)
        with self._lock:
            predictor.inference = predictor.inference._replace(threshold=threshold, flips=flips)
            (probabilities,), (assessment,) = predictor.assess(pixels[None])
        return probabilities, assessment

    def predict(self, paths, threshold, tta, clean, progress, folder=None):
        """Predict files -> session, number and buttons as they are then, and what `show` returns.

        tta: whether to average over flips; clean: as --clean; progress: as `Session.predict` has
        it; folder: of the session, by default that of all browsers.
        """
        predictor, gr = self.predictor, self.gradio
        about = (predictor.class_names, self.window, predictor.orientation, self.pixel_size)
        session = Session(folder or self.folder, *about, draw_order=predictor.draw_order)

        def assess(image):
            return self.assess(image, threshold, tta)

        session.predict(paths or [], assess, progress, threshold)
        count = len(session.predictions)
        number = session.first(threshold) + 1 if count else 1
        label = "Download mask" if count < 2 else f"Download {count} masks"
        return (
            session,
            gr.Slider(maximum=max(count, 2), value=number, visible=count > 1),
            gr.Button(label, interactive=count > 0),
            gr.Button(interactive=count > 0),
            gr.Button(interactive=session.has_pictures()),
            *self.show(session, number, threshold, clean),
        )

    def show(self, session, number, threshold, clean):
        """Image, mask, image and overlay as a pair, the text on them and the table.

        The network does not run.
        """
        nothing = None, None, None
        if session is None or not (session.predictions or session.problems):
            return *nothing, text_html([WAITING]), table_html([])
        if not session.predictions:
            return *nothing, text_html([], session.problems), table_html([])
        last = len(session.predictions)  # less than the number, where pictures were just removed
        try:
            view = session.view(min(max(int(number), 1), last) - 1, threshold, check(clean))
        except ValueError as error:
            return *nothing, text_html([], [str(error)]), table_html([])
        problems = [*session.unlike(), *session.problems]
        text = text_html([view.line], problems, self.predictor.class_names)
        pair = view.image, view.overlay
        return view.image, view.mask, pair, text, table_html(view.rows)

    def write(self, what, session, threshold, clean):
        """The path of a download; what: a method of `Session`. gradio.Error where it is none."""
        try:
            return session and str(what(session, threshold, check(clean)))
        except ValueError as error:
            raise self.gradio.Error(str(error), print_exception=False) from None


def check(clean):
    """What a browser gives as clean-up, as --clean has it. ValueError that names the control."""
    clean = (clean or "").strip() or "none"
    try:
        if len(clean) > MAX_TEXT:
            raise ValueError(f"more than {MAX_TEXT} characters")
        parse_named_values(clean, CLEANINGS)
    except ValueError as error:
        raise ValueError(f"Clean-up: {error}") from None
    return clean


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
            looks = {"height": VIEW_HEIGHT, "min_width": 240, "buttons": ["fullscreen"]}
            zoomed = {"slider_position": 0, "max_height": VIEW_HEIGHT, **looks}
            parts.views = [
                gr.Image(label="Image", interactive=False, elem_id="image", **looks),
                gr.Image(label="Mask", interactive=False, elem_id="mask", **looks),
                gr.ImageSlider(label=ZOOMS, interactive=False, elem_id="overlay", **zoomed),
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
        add_switches(page, parts)
        add_table(gr, parts)
        parts.written = gr.File(visible=False)
        connect(page, parts, examples)
    return blocks


def add_switches(page, parts):
    """Those of the command line: flips and clean-up, as the weights or flags have them."""
    gr, predictor = page.gradio, page.predictor
    flips = flips_to_average(predictor.recorded, predictor.trained_flips)
    (average,) = PLAIN._replace(flips=flips).extras()
    with gr.Row(equal_height=True):
        parts.clean = gr.Textbox(
            predictor.inference.clean,
            label="Clean-up, then Enter: none, or of min-area=50, min-mm2=5, largest, fill",
            max_length=MAX_TEXT,
            elem_id="clean",
            scale=3,
            min_width=300,
        )
        parts.tta = gr.Checkbox(
            bool(predictor.inference.flips), label=f"Average over {average}", elem_id="tta"
        )


def add_table(gr, parts):
    """The measurements of the picture that is shown, and the downloads below them."""
    parts.table = gr.HTML(table_html([]), elem_id="table")
    with gr.Row():
        for name, label in (("csv", "Download table"), ("labelme", "Download LabelMe")):
            button = gr.Button(label, size="sm", interactive=False, elem_id=name)
            setattr(parts, name, button)


def connect(page, parts, examples):
    """What happens on which event."""
    gr = page.gradio
    shown = [*parts.views, parts.text, parts.table]
    buttons = [parts.download, parts.csv, parts.labelme]
    predicted = [parts.session, parts.number, *buttons, *shown]
    switches = [parts.threshold, parts.tta, parts.clean]
    predicts = {"show_progress_on": parts.text, "api_visibility": "private"}
    private = {"api_visibility": "private"}

    def predict_in_folder(request, *given):
        folder = browser_folder(page.folder, request.session_hash)
        folder.mkdir(parents=True, exist_ok=True)
        session, *values = page.predict(*given, folder)
        return session, *as_files(session, values)

    report = gr.Progress()  # gradio looks for it among the defaults

    def predict(paths, threshold, tta, clean, request: gr.Request, progress=report):
        return predict_in_folder(request, paths, threshold, tta, clean, progress)

    def predict_again(session, threshold, tta, clean, request: gr.Request, progress=report):
        paths = session and session.paths
        return predict_in_folder(request, paths, threshold, tta, clean, progress)

    def predict_example(threshold, tta, clean, request: gr.Request, event: gr.SelectData):
        if type(event.index) is not int or not 0 <= event.index < len(examples):
            raise gr.Error("no such example", print_exception=False)
        chosen = [examples[event.index]]
        given = threshold, tta, clean, lambda done, title: None
        return None, *predict_in_folder(request, chosen, *given)

    def show(session, *given):
        return as_files(session, page.show(session, *given))

    gr.on(
        [parts.files.upload, parts.files.delete, parts.files.clear],
        predict,
        [parts.files, *switches],
        predicted,
        **predicts,
    )
    parts.examples.select(
        predict_example,
        switches,
        [parts.files, *predicted],
        **predicts,
    )
    parts.tta.input(predict_again, [parts.session, *switches], predicted, **predicts)
    gr.on(
        [parts.threshold.change, parts.number.input, parts.clean.submit, parts.clean.blur],
        show,
        [parts.session, parts.number, parts.threshold, parts.clean],
        shown,
        show_progress="hidden",
        trigger_mode="always_last",
        **private,
    )
    connect_downloads(page, parts, buttons)


def connect_downloads(page, parts, buttons):
    """buttons: of the masks, the table and the LabelMe files."""
    downloads = Session.write, Session.table, Session.labelme
    for button, what in zip(buttons, downloads, strict=True):
        given = [parts.session, parts.threshold, parts.clean]
        write = partial(page.write, what)
        button.click(write, given, parts.written, api_visibility="private").then(
            None, parts.written, None, js=START_DOWNLOAD
        )


def as_files(session, value):
    """`value` with paths in the session's folder for images: gradio's own folder is everyone's."""
    if isinstance(value, Image.Image):
        return session.save(value)
    if isinstance(value, list | tuple):
        return [as_files(session, one) for one in value]
    return value
