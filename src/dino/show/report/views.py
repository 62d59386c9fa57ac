"""The views that training makes of some images, on the page of a run."""

from __future__ import annotations

from html import escape

from dino.data.commands.preview import enlarged, make_rows, with_boxes
from dino.data.images.pixel_format import PixelFormat
from dino.data.sources.open import open_source
from dino.data.views.view_spec import ViewSettings
from dino.settings import parsed
from dino.show.html import figure, picture
from dino.show.report.run_contents import Run

IMAGES, TILE = 2, 224
"""Images whose views are shown; side of the pictures of images, in pixels."""


def views_section(run: Run, pixels: PixelFormat) -> str:
    """Images with the crops drawn in, and each view as the student gets it.

    Raises:
        UserError: if the images do not exist any more.
    """
    settings = {
        name.removeprefix("views."): tuple(value) if isinstance(value, list) else value
        for name, value in run.settings.items()
        if name.startswith("views.")
    }
    data, seed = run.about.get("data"), run.settings.get("run.seed")
    if not settings or not isinstance(data, str):
        return ""
    specs = parsed(ViewSettings, settings, run.folder / "config.json").specs()
    source = open_source(data, pixels)
    rows, _ = make_rows(source, specs, images=IMAGES, seed=seed if isinstance(seed, int) else 0)
    blocks = []
    for row in rows:
        name = row.name.rpartition("/")[2]
        full = picture(with_boxes(row, TILE), f"{name} with its crops")
        figures = [figure(full, f"{name}, {row.original.width} x {row.original.height} px")]
        for number, view in enumerate(row.views, start=1):
            title = f"{number} {view.spec.name}, {view.spec.size} px: "
            caption = title + ", ".join(view.caption()[1:] or ["as it is"])
            shown = picture(enlarged(view.picture), f"{name}, view {caption}")
            figures.append(figure(shown, caption))
        blocks.append(f'<div class="block views">{"".join(figures)}</div>')
    intro = (
        "What the networks are trained on: two global views, which teacher and student get, and "
        "local ones for the student. Boxes in the image are the crops, with the numbers of the "
        "views. Views are those of the first epoch. Good: a person still recognises the object in "
        "most global views. dino data preview shows more."
    )
    return f"<h2>Views</h2><p>{escape(intro)}</p>{''.join(blocks)}"
