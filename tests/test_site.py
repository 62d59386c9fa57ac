"""The documentation as a site: it builds without a warning, needs no network, omits nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.documents import ROOT

from dino.train.config import PretrainConfig

pytest.importorskip("sphinx")
pytest.importorskip("furo")
pytest.importorskip("myst_parser")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(out / "doctrees"), str(ROOT / "docs"), str(out / "html")],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.mark.timeout(240)
def test_every_page_is_there(site: Path) -> None:
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages <= {page.stem for page in site.glob("*.html")}
    start = (site / "index.html").read_text(encoding="utf-8")
    assert {f'href="{page}.html"' for page in pages} <= {*re.findall(r'href="[^"#]+"', start)}


@pytest.mark.timeout(240)
def test_every_setting_and_command_is_in_the_reference(site: Path) -> None:
    text = re.sub(
        "<[^>]+>", "", (site / "generated/configuration.html").read_text(encoding="utf-8")
    )
    assert not [name for name in PretrainConfig().flat() if name not in text]
    commands = (site / "generated/commands.html").read_text(encoding="utf-8")
    for name in ("dino evaluate knn", "dino data check", "dino explore", "dino pretrain"):
        assert f">{name}<" in commands


@pytest.mark.timeout(240)
def test_no_page_asks_for_another_address(site: Path) -> None:
    loaded = re.compile(r"""(?:src|<link[^>]*href)=["'](https?:)?//[^"']+""")
    found = {
        page.name: loaded.findall(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")
    }
    assert not {name: links for name, links in found.items() if links}
