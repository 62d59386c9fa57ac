"""A self-contained HTML page: style, images and what little script it has inside, no network."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Sequence
from html import escape

from PIL import Image

from dino.data.images.map_overlay import COLORS, Color, ColorMap
from dino.files import UserError

LIGHT = """--ground: #fbfaf7; --card: #fff; --ink: #1d1f24; --soft: #5d636e;
  --line: #e3e1da; --trained: #1f63c6; --other: #9a9ea7; --warn: #a4550b; --good: #1c7a43;
  --run0: #0072b2; --run1: #c44e00; --run2: #1d1f24; --run3: #b0528a; --run4: #00805d;
  --run5: #8f6a00;"""
DARK = """--ground: #14161a; --card: #1c1f25; --ink: #e9e9e6;
  --soft: #a3a8b2; --line: #31353d; --trained: #79abff; --other: #777d88; --warn: #f0a860;
  --good: #66cf92;
  --run0: #56b4e9; --run1: #e8761c; --run2: #e9e9e6; --run3: #d68fb8; --run4: #19b890;
  --run5: #e6c229;"""
"""The colours of a page on a light and on a dark screen."""

RUNS = 6
"""Runs that charts can tell apart, by colour, dashes and letter."""

DASHES = ("none", "7 3", "2 3", "10 3 2 3", "5 2 1 2 1 2", "14 4")
"""The dashes of each run's curve."""


def _run_styles() -> str:
    return "".join(
        f"svg .run{number} {{ stroke: var(--run{number}); stroke-dasharray: {dashes}; }}\n"
        f"svg .end.run{number}, svg .letter.run{number} {{ fill: var(--run{number}); }}\n"
        for number, dashes in enumerate(DASHES)
    )


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
main.wide { max-width: 1800px; }
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
.grid { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 326px), 1fr)); }
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
svg .end { fill: var(--trained); stroke: none; }
svg .healthy-band { fill: var(--good); opacity: .13; }
RUNS.swatch { display: inline-flex; gap: 6px; align-items: center; font-weight: 600; }
.swatch svg { width: 34px; height: 10px; }
svg .letter { stroke: none; font-weight: 700; }
.bar-legend { display: inline-flex; gap: 6px; align-items: center; }
.bar-legend i { display: inline-block; width: 7em; height: .8em; border-radius: 3px; }
.key { display: inline-block; width: 1.6em; height: .8em; vertical-align: baseline;
  background: color-mix(in srgb, var(--good) 22%, transparent); border-radius: 3px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 22px; max-width: none; font-size: .84rem;
  color: var(--soft); }
.advice { color: var(--warn); font-size: .84rem; line-height: 1.45; margin: 6px 0 0; }
svg .level { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 3; }
svg .name { fill: var(--ink); }
.block { margin: 0 0 30px; }
.pictures { display: grid; gap: 10px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.pictures:has(> :nth-child(3):last-child) { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.block.steps { grid-template-columns: repeat(6, minmax(0, 1fr)); margin-bottom: 12px; }
.views { display: grid; gap: 10px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); }
.heads { display: grid; gap: 6px; margin-top: 10px;
  grid-template-columns: repeat(auto-fill, minmax(80px, 1fr)); }
.query { display: grid; gap: 6px 22px; grid-template-columns: minmax(90px, 160px) 1fr;
  padding: 12px 0 10px; border-top: 1px solid var(--line); align-items: start; }
.query > div:last-child { display: grid; gap: 6px 22px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
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
th[scope=col] { white-space: nowrap; }
th[scope=row] { min-width: 7em; }
.explore { width: 100%; height: min(86vh, 900px); border: 1px solid var(--line);
  border-radius: 10px; background: var(--ground); }
:focus-visible { outline: 3px solid var(--trained); outline-offset: 2px; }
summary { cursor: pointer; font-weight: 600; margin-top: 44px; }
@media (max-width: 700px) { main { padding: 24px 14px 48px; }
  .row { grid-template: "name value" "bar bar" / 1fr max-content; }
  .block.steps { grid-template-columns: repeat(3, minmax(0, 1fr)); margin-bottom: 24px; }
  .query { grid-template-columns: 1fr; }
  .query .query-image { width: 40%; } }
"""
).replace("RUNS", _run_styles())

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">{again}
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main{css}>
{body}
</main>{script}</body>
</html>
"""

AGAIN = """
<noscript><meta http-equiv="refresh" content="{seconds}"></noscript>
<meta name="reload" content="{seconds}">"""

RELOAD = """"use strict";
// Load the page again, since its file is written anew, and come back to the same place.
const seconds = Number(document.querySelector("meta[name=reload]").content);
const details = () => [...document.querySelectorAll("details")];
const before = history.state?.report;
if (before) {
  details().forEach((one, i) => { one.open = before.open[i] ?? one.open; });
  scrollTo(0, before.top);
}
history.scrollRestoration = "manual";
setInterval(() => {
  if (document.hidden || document.activeElement?.tagName === "IFRAME") return; // in use
  history.replaceState({ report: { top: scrollY, open: details().map((one) => one.open) } }, "");
  location.reload();
}, 1000 * seconds);
"""


def page(
    title: str,
    sections: Sequence[str],
    *,
    refresh: int | None = None,
    scripts: Sequence[str] = (),
    wide: bool = False,
) -> str:
    """A complete HTML document.

    Args:
        title: plain text.
        sections: HTML; empty ones are left out.
        refresh: seconds after which a browser loads the page again, at the same place.
        scripts: hashes of those that frames inside of the page may run.
        wide: use the width of large screens.
    """
    own = [RELOAD] if refresh else []
    hashes = [*map(content_hash, own), *scripts]
    allowed = " ".join(f"'{one}'" for one in hashes) or "'none'"
    return PAGE.format(
        title=escape(title),
        style=STYLE,
        body="\n".join(filter(None, sections)),
        again=AGAIN.format(seconds=refresh) if refresh else "",
        allowed=allowed,
        css=' class="wide"' if wide else "",
        script="".join(f"<script>{script}</script>" for script in own),
    )


def content_hash(text: str) -> str:
    """The hash by which a page's policy allows a script or a style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def section(title: str, draw: Callable[[], str], tag: str = "h2") -> str:
    """A section of a page; where it cannot be drawn, its title and the reason."""
    try:
        return draw()
    except Exception as error:  # whatever a damaged run, image or network leads to
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        text = f"This section is left out, since it cannot be drawn: {reason}."
        return f'<{tag}>{escape(title)}</{tag}><p class="soft">{escape(text)}</p>'


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


def color_bar(colors: ColorMap, low: str, high: str) -> str:
    """The colours of a map between the words for its smallest and its largest value."""
    return _bar([f"#{color}" for color in COLORS[colors].split()], low, high)


def legend(*items: str) -> str:
    """What colours mean: HTML side by side."""
    return f'<p class="legend">{"".join(f"<span>{item}</span>" for item in items)}</p>'


def gradient(ends: Sequence[Color]) -> str:
    """A bar from one colour to another."""
    return _bar([f"rgb{color}" for color in ends], "", "")


def _bar(colors: Sequence[str], low: str, high: str) -> str:
    bar = f'<i style="background:linear-gradient(90deg,{",".join(colors)})"></i>'
    return f'<span class="bar-legend">{escape(low)}{bar}{escape(high)}</span>'


def figure(content: str, caption: str, css: str = "") -> str:
    """HTML content with a caption (plain text) under it."""
    return f'<figure class="{css}">{content}<figcaption>{escape(caption)}</figcaption></figure>'
