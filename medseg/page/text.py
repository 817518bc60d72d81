"""What the page says, as HTML, and how it looks. No torch."""

import html

from medseg.drawing import class_colors
from medseg.results.table import COLUMNS as TABLE_COLUMNS

MAX_PROBLEMS = 5  # lines shown
COLUMNS = [name for name in TABLE_COLUMNS if name not in ("image", "series")]  # shown
CSS = """
.gradio-container > main { max-width: 1100px !important; padding: 1.2rem !important; }
#head h1 { margin: 0; font-size: 1.35rem; font-weight: 600; overflow-wrap: anywhere; }
#head p { margin: 0.2rem 0 0; color: var(--neutral-600); }
.dark #head p { color: var(--neutral-300); }
#head strong { color: #b45309; font-weight: 600; }
.dark #head strong { color: #fbbf24; }
#examples .grid-wrap { padding-top: 2.2rem; }
#examples .thumbnail-lg { background: #000; aspect-ratio: 1.15; }
#image, #mask, #overlay { background: #14171c; }
#overlay img { background: #14171c !important; }
#text p { margin: 0.1rem 0; font-size: 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
#text .problem { color: #b91c1c; }
.dark #text .problem { color: #fca5a5; }
#text .legend span { margin-right: 1.2rem; }
#text .legend i { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.4em;
  border-radius: 2px; vertical-align: -0.1em; }
#table table { border-collapse: collapse; font-size: 0.9rem; }
#table th, #table td { padding: 0.2rem 0.6rem; text-align: right; white-space: nowrap;
  border: 1px solid var(--border-color-primary); }
#table th:first-child, #table td:first-child { text-align: left; }
#table th { color: var(--neutral-600); font-weight: 600; }
.dark #table th { color: var(--neutral-300); }
#table div { overflow-x: auto; }
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


def escape(text):
    """Text for HTML that gradio also takes for a template."""
    return html.escape(str(text)).replace("{", "&#123;").replace("$", "&#36;")


def head_html(title, predictor):
    side, names = predictor.image_size, predictor.class_names
    size = "its own size" if side is None else f"{side}x{side} pixels"
    classes = "one class" if len(names) == 1 else f"{len(names)} classes"
    return (
        f"<h1>{escape(title)}</h1><p>The network takes an image at {size} and marks {classes}. "
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


def table_html(rows):
    """The rows of one picture, as `medseg.results.table.measure` has them; known columns alone."""
    columns = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    head = "".join(f"<th>{name}</th>" for name in columns)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{_cell(row.get(name))}</td>" for name in columns)
        lines.append(f"<tr>{cells}</tr>")
    body = f"<table><tr>{head}</tr>{''.join(lines)}</table>" if rows else ""
    return f"<div>{body}</div>"


def _cell(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else escape(value)
