"""A self-contained HTML page: style and images inside, no script, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

LIGHT = """--ground: #fbfaf7; --card: #fff; --ink: #1d1f24; --soft: #5d636e;
  --line: #e3e1da; --trained: #1f63c6; --other: #9a9ea7; --warn: #a4550b; --good: #1c7a43;"""
DARK = """--ground: #14161a; --card: #1c1f25; --ink: #e9e9e6;
  --soft: #a3a8b2; --line: #31353d; --trained: #79abff; --other: #777d88; --warn: #f0a860;
  --good: #66cf92;"""
"""The colours of a page on a light and on a dark screen."""

STYLE = (
    f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
"""
    + """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 72px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 52px 0 4px; }
h3 { font-size: 1rem; margin: 0 0 4px; display: flex; justify-content: space-between; gap: 8px; }
p { margin: 4px 0 14px; max-width: 70ch; }
.soft, figcaption, th { color: var(--soft); }
.warn { color: var(--warn); font-weight: 600; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .84rem; line-height: 1.45; margin-top: 6px; max-width: 96ch; }
img { display: block; width: 100%; border-radius: 4px; }
img.map { image-rendering: pixelated; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); }
.row { display: grid; grid-template: "name bar value" / 15em 1fr 5.2em; gap: 0 16px;
  align-items: center; padding: 5px 0; }
.row b { grid-area: value; font-size: 1.35rem; text-align: right; }
.rail { grid-area: bar; background: var(--line); border-radius: 3px; }
.bar { height: 14px; border-radius: 3px; background: var(--other); }
.bar.trained { background: var(--trained); }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11.5px; fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .curve { fill: none; stroke: var(--trained); stroke-width: 1.8; stroke-linejoin: round; }
svg .end { fill: var(--trained); }
svg .level { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 3; }
svg .name { fill: var(--ink); }
.block { margin: 0 0 30px; }
.pictures { display: grid; gap: 10px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.heads { display: grid; gap: 6px; margin-top: 10px;
  grid-template-columns: repeat(auto-fill, minmax(80px, 1fr)); }
.query { display: grid; gap: 6px 22px; grid-template-columns: 1fr 5fr 5fr; padding: 12px 0 10px;
  border-top: 1px solid var(--line); align-items: start; }
.neighbours { display: grid; align-content: start; gap: 5px;
  grid-template-columns: repeat(5, minmax(0, 1fr)); }
.query .name { grid-column: 1 / -1; font-size: .78rem; color: var(--soft); }
.query figcaption { font-size: .74rem; line-height: 1.3; margin-top: 3px; overflow-wrap: anywhere; }
.query img { aspect-ratio: 1; object-fit: cover; border: 3px solid transparent; }
.query .query-image img { border-color: var(--line); }
.query .same img { border-color: var(--good); }
.query .apart img { border: 3px dashed var(--warn); }
.healthy { color: var(--good); }
.doubtful, .failed { color: var(--warn); }
td.healthy, td.doubtful, td.failed { font-weight: 600; }
table.facts td { white-space: pre-line; }
table.facts td:first-child { color: var(--soft); width: 14em; }
table { border-collapse: collapse; font-size: .86rem; width: 100%; }
td, th { text-align: left; padding: 3px 12px 3px 0; vertical-align: top; }
th { font-weight: 500; }
.card:has(> table) { overflow-x: auto; }
.facts td, details td, details th { overflow-wrap: anywhere; }
details th { width: 45%; }
summary { cursor: pointer; font-weight: 600; margin-top: 44px; }
@media (max-width: 700px) { main { padding: 24px 14px 48px; }
  .row { grid-template: "name value" "bar bar" / 1fr max-content; }
  .query { grid-template-columns: 1fr; }
  .query .query-image { width: 40%; } }
"""
)

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""


def page(title: str, sections: Sequence[str], refresh: int | None = None) -> str:
    """A complete HTML document.

    Args:
        title: plain text.
        sections: HTML; empty ones are left out.
        refresh: seconds after which a browser loads the page again.
    """
    body = "\n".join(filter(None, sections))
    again = f'\n<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return PAGE.format(title=escape(title), style=STYLE, body=body, refresh=again)


def table(cells: Sequence[Sequence[str]], head: Sequence[str] = (), css: str = "") -> str:
    """A table of plain text, with a line on top."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in cells]
    body = "".join(f"<tr>{line}</tr>" for line in filter(None, [top, *lines]))
    return f'<table class="{css}">{body}</table>'


def picture(image: Image.Image, alt: str, *, width: int = 480, exact: bool = False) -> str:
    """An `img` with the pixels inside.

    Args:
        image: scaled down to `width` pixels where it is wider.
        alt: a description.
        width: largest width.
        exact: for maps of few pixels: lossless, with sharp squares.
    """
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))))
    kind = "png" if exact else "jpeg"
    file = io.BytesIO()
    image.convert("RGB").save(file, kind, **({} if exact else {"quality": 88}))
    data = base64.b64encode(file.getvalue()).decode()
    sharp = ' class="map"' if exact else ""
    return f'<img{sharp} alt="{escape(alt)}" src="data:image/{kind};base64,{data}">'


def figure(content: str, caption: str, css: str = "") -> str:
    """HTML content with a caption (plain text) under it."""
    return f'<figure class="{css}">{content}<figcaption>{escape(caption)}</figcaption></figure>'
