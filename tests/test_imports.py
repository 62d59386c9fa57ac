"""`import dino` and `dino --help` load nothing heavy, which is why they answer at once.

What stands here in place of a time: a second Python tells which modules it has loaded.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    *("numpy", "PIL", "safetensors", "scipy", "sklearn", "torch", "torchvision"),
    *("pyarrow", "skimage", "tensorboard", "timm"),
}
HELP = """
import sys
from dino.cli import main
sys.argv = ["dino", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def loaded_by(code: str, cwd: Path | None = None) -> set[str]:
    """The packages of `HEAVY` that a new Python has loaded after running `code` in `cwd`."""
    code += "\nimport sys\nprint(*sorted({name.split('.')[0] for name in sys.modules}), sep='\\n')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return HEAVY.intersection(done.stdout.splitlines())


@pytest.mark.parametrize("code", ["import dino", HELP], ids=["import dino", "dino --help"])
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded_by(code) == set()


def test_a_heavy_package_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino" / "__init__.py").write_text("import json, numpy")
    assert loaded_by("import dino", cwd=tmp_path) == {"numpy"}
