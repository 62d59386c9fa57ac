"""The floors of the package: which modules may import which, read from the imports with `ast`.

A module imports from lower floors or its own room, never up; sideways only where `SIDEWAYS` says
so; never in a circle; what is in `CLOSED` only where it says so. Optional packages are imported
inside the function that needs them. Only `runtime.py` and `rendezvous.py` name
`torch.distributed` or `cuda`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "dino"

# Room (a folder or a file of the package, "" is its __init__.py) -> floor.
FLOORS = dict.fromkeys(("arguments", "cgroups", "files", "progress", "settings"), 1)
FLOORS |= dict.fromkeys(("rendezvous", "runtime"), 1)
FLOORS |= dict.fromkeys(("models", "weights", "data"), 2)
FLOORS |= dict.fromkeys(("distillation", "features"), 3)
FLOORS |= dict.fromkeys(("train", "evaluate", "show", "jobs"), 4)
FLOORS |= dict.fromkeys(("", "ablation", "pretraining", "cli"), 5) | {"__main__": 6}

# (Room, the module or room of the same floor that it may import).
SIDEWAYS = {
    ("runtime", "cgroups"),
    ("runtime", "files"),
    ("runtime", "rendezvous"),
    ("rendezvous", "files"),
    ("settings", "files"),
    *(("arguments", "files"), ("arguments", "settings")),
    ("weights", "models"),
    ("models", "data.images.decode"),
    ("models", "data.images.image_errors"),
    ("models", "data.images.pixel_format"),
    ("models", "data.images.preprocessing"),
    ("models", "data.sources.open"),
    ("weights", "data.images.decode"),
    ("weights", "data.images.pixel_format"),
    ("weights", "data.images.preprocessing"),
    ("train", "evaluate.protocol"),
    *(("", "pretraining"), ("cli", "pretraining"), ("cli", "ablation"), ("cli", "")),
}

# Module or package -> the only modules outside of it that may import it or a part of it.
CLOSED = {
    "cli": {"__main__"},
    "show.explorer": {"", "cli", "show.report.similarity"},
    "show.report": {"ablation", "pretraining", "show.explorer.live_run"},
}

# What the extras of pyproject.toml install (but for `dev`), by its import name.
OPTIONAL = {
    *("av", "datasets", "fsspec", "imagecodecs", "mlflow", "onnx", "onnxruntime", "onnxscript"),
    *("openvino", "pyarrow", "pydicom", "skimage", "starlette", "tensorboard", "tifffile", "timm"),
    *("uvicorn", "wandb", "webdataset"),
}

# Imported by tifffile and torch.utils.tensorboard; the data of skimage are read as files.
INDIRECT = {"skimage", "tensorboard"}

RUNTIME_ONLY = {"cuda", "distributed"}


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """The dotted name of each import below `node`, and whether it stands inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            yield from ((f"{base}.{alias.name}", inside) for alias in child.names)
        else:
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield from imports(child, inside or function)


def within(module: str, package: str) -> bool:
    """Whether a module is this one, or in this package."""
    return f"{module}.".startswith(f"{package}.")


def broken_by(module: str, tree: ast.Module, inner: set[str]) -> Iterator[str]:
    """What `module`, which imports the modules `inner` of the package, does against the rules."""
    room = module.split(".")[0]
    for target in sorted(inner):
        other = target.split(".")[0]
        level = FLOORS[other] - FLOORS[room] if room != other else -1
        sideways = not {(room, other), (room, target)}.isdisjoint(SIDEWAYS)
        if level > 0 or (level == 0 and not sideways):
            yield f"imports {'up' if level else 'sideways'}: {target or 'dino'}"
        for closed, allowed in CLOSED.items():
            if within(target, closed) and not (within(module, closed) or module in allowed):
                yield f"imports {target}, which is closed to it"
    for name, inside in imports(tree):
        if name.startswith("."):
            yield f"imports relatively: {name}"
        if name.split(".")[0] in OPTIONAL and not inside:
            yield f"imports an optional package outside of a function: {name}"
    named = {name for name, _ in imports(tree) if name.startswith("torch.")}
    named |= {f".{node.attr}" for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if module not in ("runtime", "rendezvous"):
        yield from (f"names {n}" for n in sorted(named) if RUNTIME_ONLY & {*n.split(".")[1:]})


def violations(source: Path) -> list[str]:
    """One line for each place where the package in the folder `source` breaks a rule."""
    trees = {}
    for path in sorted(source.rglob("*.py")):
        module = ".".join(path.relative_to(source).with_suffix("").parts)
        trees[module.removesuffix("__init__").removesuffix(".")] = ast.parse(path.read_bytes())
    found = [f"{m}: has no floor" for m in trees if m.split(".")[0] not in FLOORS]
    if found:
        return found
    graph: dict[str, set[str]] = {}
    for module, tree in trees.items():
        graph[module] = set()
        for name in (name for name, _ in imports(tree) if name.split(".")[0] == "dino"):
            parts = name.split(".")[1:]
            while parts and ".".join(parts) not in trees:  # `name` may end in a function or class
                parts.pop()
            graph[module].add(".".join(parts))
        found += [f"{module or 'dino'}: {what}" for what in broken_by(module, tree, graph[module])]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"imports in a circle: {' <- '.join(error.args[1])}")
    return found


def test_every_module_keeps_to_its_floor() -> None:
    assert violations(SOURCE) == []


def test_the_drawing_shows_every_room_on_its_floor() -> None:
    drawing = (SOURCE.parents[1] / "docs" / "floors.svg").read_text(encoding="utf-8")
    rooms = re.findall(r'class="r(\d)"[^>]*/><text class="t"[^>]*>(\w+)<', drawing)
    shown = {"" if room == "dino" else room: int(floor) for floor, room in rooms}
    assert shown == {room: floor for room, floor in FLOORS.items() if room != "__main__"}


def test_every_extra_is_imported() -> None:
    trees = (ast.parse(path.read_bytes()) for path in SOURCE.rglob("*.py"))
    used = {name.split(".")[0] for tree in trees for name, _ in imports(tree)}
    assert used & OPTIONAL == OPTIONAL - INDIRECT


SOUND = {
    "__init__.py": "def load():\n    from dino.weights.load import load\n",
    "__main__.py": "from dino.cli import main",
    "cli.py": "import dino\ndef explore():\n    from dino.show.explorer.page import explore",
    "runtime.py": "import torch.distributed\nfrom dino.files import UserError\ntorch.cuda.Stream()",
    "files.py": "import json",
    "data/__init__.py": "",
    "data/sampler.py": "from dino.data.images import decode",
    "data/images/decode.py": "def photographs():\n    import skimage.data",
    "models/vit.py": "import torch\nfrom dino.data.images.decode import read_image",
    "weights/load.py": "from dino.models.vit import ViT",
    "distillation/loss.py": "import dino.runtime",
    "train/loop.py": "from dino.data import sampler\nfrom dino.evaluate.protocol import Evaluation",
    "evaluate/protocol.py": "from dino import files",
    "evaluate/knn.py": "from dino.evaluate.protocol import Evaluation",
    "show/explorer/__init__.py": "",
    "show/explorer/page.py": "import dino.show.explorer.payload",
    "show/explorer/payload.py": "",
    "show/report.py": "def write(device):\n    return device.type == 'cuda'",
}


def build(folder: Path, files: dict[str, str]) -> Path:
    for name, code in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)
    return folder


def test_a_sound_package_is_accepted(tmp_path: Path) -> None:
    assert violations(build(tmp_path, SOUND)) == []


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("data/sampler.py", "import dino.train.loop", "data.sampler: imports up: train.loop"),
        ("files.py", "from dino import load", "files: imports up: dino"),
        ("data/sampler.py", "def f():\n from dino.models.vit import ViT", "sideways: models.vit"),
        (
            "models/vit.py",
            "from dino.data import sampler",
            "models.vit: imports sideways: data.sampler",
        ),
        ("train/loop.py", "from dino.evaluate.knn import knn", "imports sideways: evaluate.knn"),
        ("data/images/decode.py", "def f():\n import dino.data.sampler", "in a circle: data"),
        ("__init__.py", "from dino.cli import main", "dino: imports cli, which is closed to it"),
        ("train/loop.py", "from dino import cli", "train.loop: imports up: cli"),
        (
            "show/report.py",
            "import dino.show.explorer",
            "show.report: imports show.explorer, which",
        ),
        (
            "show/attention.py",
            "def f():\n from dino.show.explorer.page import explore",
            "show.attention: imports show.explorer.page, which",
        ),
        ("show/report.py", "from . import explorer", "show.report: imports relatively: ..explorer"),
        ("models/vit.py", "from timm import layers", "outside of a function: timm.layers"),
        ("models/vit.py", "class A:\n import timm", "outside of a function: timm"),
        ("models/vit.py", "from torch import distributed", "models.vit: names torch.distributed"),
        ("models/vit.py", "import torch.cuda.amp", "models.vit: names torch.cuda.amp"),
        ("models/vit.py", "def f(x):\n return x.cuda()", "models.vit: names .cuda"),
        ("utils.py", "", "utils: has no floor"),
    ],
)
def test_a_planted_violation_is_found(name: str, code: str, expected: str, tmp_path: Path) -> None:
    found = violations(build(tmp_path, SOUND | {name: code}))
    assert any(expected in line for line in found), found
