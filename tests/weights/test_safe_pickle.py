"""Files that want to run something, claim to be large, or are damaged: one sentence, no harm."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch

import dino
from dino.files import UserError
from dino.weights import safe_pickle as pickles
from dino.weights.load import read_checkpoint, read_linear, save
from dino.weights.safe_pickle import Placeholder, attributes, load_pickle

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 1, "heads": 2, "patch_size": 8, "image_size": 16}


def refusal(path: Path) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(UserError) as caught:
        dino.load(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


class Calls:
    """What a pickle runs when it is opened carelessly."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def archive(path: Path, pickled: bytes, records: dict[str, bytes] | None = None) -> Path:
    """A checkpoint as `torch.save` lays it out, with any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
        for name, data in (records or {}).items():
            file.writestr(f"archive/data/{name}", data)
    return path


# ------------------------------------------------------------------------------------ nothing runs
HOSTILE: dict[str, Callable[[Path], Calls]] = {
    f"{os.system.__module__}.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "builtins.eval": lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"),
    "builtins.getattr": lambda mark: Calls(getattr, os.getcwd, "__self__"),
    "subprocess.Popen": lambda mark: Calls(subprocess.Popen, ["touch", str(mark)]),
    "numpy.save": lambda mark: Calls(np.save, str(mark), [1]),
    "torch.serialization.load": lambda mark: Calls(torch.load, str(mark)),
}


@pytest.mark.parametrize("current", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("named", HOSTILE)
def test_a_hostile_pickle_is_refused_and_not_run(named: str, current: bool, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "w.pth"
    content = {"cls_token": torch.zeros(1, 1, 4), "extra": HOSTILE[named](mark)}
    torch.save(content, path, _use_new_zipfile_serialization=current)
    text = refusal(path)
    assert named in text
    assert "nothing was executed" in text
    assert not mark.exists()


def test_a_hostile_pickle_would_have_run(tmp_path: Path) -> None:
    """So that the test above can fail."""
    mark = tmp_path / "mark"
    torch.save({"extra": Calls(os.system, f"touch {mark}")}, tmp_path / "w.pth")
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert mark.exists()


def test_all_ways_to_name_a_class_are_watched(tmp_path: Path) -> None:
    """The operators GLOBAL, STACK_GLOBAL and INST of any protocol."""
    pickled = [pickle.dumps({"x": Calls(os.system, "true")}, protocol) for protocol in range(6)]
    pickled.append(b"(Vtrue\nios\nsystem\n.")
    for index, data in enumerate(pickled):
        assert "system" in refusal(archive(tmp_path / f"{index}.pth", data))


# ------------------------------------------------------------------------------------ what is fine
def test_what_published_checkpoints_hold_is_read(tmp_path: Path) -> None:
    weights = torch.randn(3, 4)
    settings = argparse.Namespace(arch="vit_small", lr=5e-4, scale=(0.4, 1.0), out=Path("/run"))
    content = {
        "teacher": collections.OrderedDict(a=weights, b=torch.nn.Parameter(weights.clone())),
        "half": weights.half(),
        "args": settings,
        "best": np.float64(77.5),
        "epoch": np.int64(3),
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": weights}},
            "param_groups": [{"lr": 0.1}],
        },
    }
    for current in (True, False):
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=current)
        found = load_pickle(tmp_path / "w.pth")
        assert torch.equal(found["teacher"]["a"], weights)
        assert torch.equal(found["teacher"]["b"], weights)
        assert torch.equal(found["half"], weights.half())
        assert attributes(found["args"])["scale"] == (0.4, 1.0)
        assert {type(found[name]) for name in ("best", "epoch")} <= set(
            Placeholder.__subclasses__()
        )


def test_what_other_checkpoints_hold_is_read(tmp_path: Path) -> None:
    """Random states, settings and the like make no file unreadable; nothing of them is built."""
    weights = torch.randn(3, 4)
    content = {
        "a": weights,
        "set": {1, 2},
        "frozenset": frozenset({3}),
        "defaultdict": collections.defaultdict(list, {"k": [1]}),
        "deque": collections.deque([1, 2], maxlen=3),
        "deque of one": collections.deque([1]),
        "random": np.random.RandomState(0).get_state(),
        "array": np.arange(3.0),
        "objects": np.array(["a", None], dtype=object),
        "number": np.int32(3),
        "dtype": torch.int32,
        "numpy_dtype": np.dtype("float32"),
        "shape": torch.Size([3, 4]),
        "device": torch.device("cpu"),
        "args": argparse.Namespace(path=Path("/run"), inner=argparse.Namespace(a=1)),
        "date": datetime.date(2021, 4, 29),
        "name": types.SimpleNamespace(a=1),
    }
    for current in (True, False):
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=current)
        found = load_pickle(tmp_path / "w.pth")
        assert torch.equal(found["a"], weights)
        assert found["defaultdict"] == {"k": [1]}
        assert found["deque"] == [1, 2]
        assert found["deque of one"] == [1]
        assert found["dtype"] == torch.int32
        assert isinstance(found["array"], Placeholder)
        assert attributes(found["args"])["inner"].state == {"a": 1}


def test_settings_of_lightning_and_omegaconf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As solo-learn's checkpoints hold them; neither library is needed to read them."""
    with monkeypatch.context() as there:

        def made(full: str, *bases: type) -> Any:
            module, _, name = full.rpartition(".")
            found = types.ModuleType(module)
            kind = type(name, bases, {"__module__": module})
            setattr(found, name, kind)
            there.setitem(sys.modules, module, found)
            while module := module.rpartition(".")[0]:  # pickle imports the packages, too
                there.setitem(sys.modules, module, types.ModuleType(module))
            return kind

        config = made("omegaconf.dictconfig.DictConfig")()
        config._content = {"lr": made("omegaconf.nodes.AnyNode")()}
        config._metadata = made("omegaconf.base.ContainerMetadata")()
        config._metadata.__dict__ = {"ref_type": Any, "object_type": dict}
        settings = made("lightning.fabric.utilities.data.AttributeDict", dict)(cfg=config, batch=8)
        tensors = dino.create("vit_tiny", **TINY).state_dict()
        content = {"state_dict": tensors, "hyper_parameters": settings, "epoch": 3}
        torch.save(content, tmp_path / "last.ckpt")
    found = load_pickle(tmp_path / "last.ckpt")
    assert found["hyper_parameters"]["batch"] == 8
    assert isinstance(found["hyper_parameters"]["cfg"], Placeholder)
    assert dino.load(tmp_path / "last.ckpt", heads=2).embed_dim == 24


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("paths", [b"pathlib", b"pathlib._local"])
def test_names_of_other_versions(core: bytes, paths: bytes, tmp_path: Path) -> None:
    """Numpy 2 moved its numbers, Python 3.13 its paths."""
    data = pickle.dumps({"best": np.float64(77.5), "out": PurePosixPath("/run")}, 2)
    data = data.replace(b"numpy._core", core).replace(b"cpathlib._local", b"cpathlib")
    data = data.replace(b"cpathlib\nPurePosixPath", b"c" + paths + b"\nPosixPath")
    assert core in data
    assert paths + b"\nPosixPath" in data
    found = load_pickle(archive(tmp_path / "w.pth", data))
    assert all(isinstance(value, Placeholder) for value in found.values())


def test_our_own_writers_leave_no_pickle(tmp_path: Path) -> None:
    save(dino.create("vit_tiny", **TINY), tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_bytes()[8:9] == b"{"


# ------------------------------------------------------------------------------------ damage
def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    good = tmp_path / "good.pth"
    torch.save(dino.create("vit_tiny", **TINY).state_dict(), good)
    data = good.read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    (tmp_path / "tail.pth").write_bytes(data[:-30])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("<html>404: not found</html>")
    (tmp_path / "text.safetensors").write_text("hello, I am no weights")
    (tmp_path / "zeros.bin").write_bytes(bytes(1000))
    (tmp_path / "broken.pth").write_bytes(b"\x80\x02" + bytes(1000))
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as file:
        file.writestr("readme.txt", "a zip, but no checkpoint")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    torch.save({"net": {"a": 3}}, tmp_path / "numbers.pth")
    torch.save({}, tmp_path / "nothing.pth")
    assert "neither safetensors nor a PyTorch checkpoint" in refusal(tmp_path / "cut.pth")
    for name, words in {
        "tail.pth": "neither safetensors nor a PyTorch checkpoint",
        "empty.pth": "neither safetensors nor",
        "text.pth": "neither safetensors nor",
        "text.safetensors": "neither safetensors nor",
        "zeros.bin": "neither safetensors nor",
        "broken.pth": "not a complete PyTorch checkpoint",
        "other.pth": "not a checkpoint that torch.save wrote",
        "list.pth": "holds a list",
        "numbers.pth": "other things than tensors",
        "nothing.pth": "holds no tensors",
    }.items():
        assert words in refusal(tmp_path / name), name


# ------------------------------------------------------------------------------------ memory
def tensor_pickle(count: int, size: tuple[int, ...], stride: tuple[int, ...], *more: Any) -> bytes:
    """The pickle of {"a": tensor} whose storage claims `count` floats."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            if isinstance(item, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", count, *more)
            return None

    class Tensor:
        def __reduce__(self) -> tuple[Any, ...]:
            rebuild = torch._utils._rebuild_tensor_v2
            return rebuild, (Storage(), 0, size, stride, False, collections.OrderedDict())

    data = io.BytesIO()
    Pickler(data, 2).dump({"a": Tensor()})
    return data.getvalue()


def test_tensors_that_claim_more_than_there_is(tmp_path: Path) -> None:
    sound = tensor_pickle(4, (2, 2), (2, 1))
    records = {"0": bytes(16)}
    assert "holds no network" in refusal(archive(tmp_path / "sound.pth", sound, records))
    for name, pickled in {
        "storage": tensor_pickle(10**15, (2, 2), (2, 1)),
        "five": tensor_pickle(5, (2, 2), (2, 1)),
        "shape": tensor_pickle(4, (10**8, 10**8), (1, 1)),
        "expanded": tensor_pickle(4, (10**12,), (0,)),
        "outside": tensor_pickle(4, (2, 2), (10, 1)),
        "negative": tensor_pickle(4, (2, 2), (-1, 1)),
    }.items():
        text = refusal(archive(tmp_path / f"{name}.pth", pickled, records))
        assert "claims" in text or "not a complete PyTorch checkpoint" in text, name
    assert "claims" in refusal(archive(tmp_path / "absent.pth", sound))


def before_zip(path: Path, count: int) -> Path:
    """The same as `torch.save` wrote it before PyTorch 1.6, with four floats."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, machine)]
    parts += [tensor_pickle(count, (2, 2), (2, 1), None), pickle.dumps(["0"], 2)]
    path.write_bytes(b"".join(parts) + struct.pack("<q", 4) + bytes(16))
    return path


def test_old_files_that_claim_more_than_there_is(tmp_path: Path) -> None:
    assert "holds no network" in refusal(before_zip(tmp_path / "sound.pth", 4))
    assert "claims to hold more" in refusal(before_zip(tmp_path / "claims.pth", 10**9))


def test_archives_that_unpack_to_more_than_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", tensor_pickle(2**20, (2**20,), (1,)))
        file.writestr("archive/data/0", bytes(2**22))
    assert "compressed" in refusal(path)
    monkeypatch.setattr(pickles, "PICKLE_LIMIT", 1000)
    long = pickle.dumps([None] * 2000, 2)
    assert "bytes of pickle" in refusal(archive(tmp_path / "long.pth", long))
    (tmp_path / "old.pth").write_bytes(long)
    assert "not a complete PyTorch checkpoint" in refusal(tmp_path / "old.pth")


# ------------------------------------------------------------------------------------ time
def nested(depth: int) -> bytes:
    """A tuple of two tuples of two tuples ...: small, but its hash or text takes 2 ** depth."""
    return b"K\x00\x85q\x00" + b"h\x00\x86q\x00" * depth


PAIRS = b"](" + b"".join(b"]J" + struct.pack("<i", i) + b"aK\x02a" for i in range(9999)) + b"eq\x01"
TEXT = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x01X\x06\x00\x00\x00latin1q\x02"
COLLIDING = [pickle.encode_long(k * (2**61 - 1)) for k in range(1, 99_999)]
SLOW = {
    "a key": b"}" + nested(40) + b"K\x01s.",
    "keys": b"}(" + nested(40) + b"K\x01u.",
    "an item of a set": b"c__builtin__\nset\n]" + nested(40) + b"a\x85R.",
    "a key of pairs": b"ccollections\nOrderedDict\n]]" + nested(40) + b"aK\x01aa\x85R.",
    "the key of a storage": b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    + nested(40)
    + b"X\x03\x00\x00\x00cpuK\x04tQ.",
    "copies": b"](ccollections\nOrderedDict\nq\x03" + PAIRS + b"h\x03h\x01\x85R" * 99_999 + b"e.",
    "bytes": b"](" + TEXT + b"c_codecs\nencode\nq\x03" + b"h\x03h\x01h\x02\x86R" * 99_999 + b"e.",
    "collisions": b"}(" + b"".join(b"\x8a" + bytes([len(k)]) + k + b"N" for k in COLLIDING) + b"u.",
}


@pytest.mark.parametrize("current", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("what", SLOW)
def test_small_files_that_take_for_ever(what: str, current: bool, tmp_path: Path) -> None:
    """Without the survey each of these runs for hours or fills the memory."""
    pickled = b"\x80\x02" + SLOW[what]
    path = archive(tmp_path / "w.pth", pickled)
    if not current:
        machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
        header = (pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, machine))
        path.write_bytes(b"".join(header) + pickled + pickle.dumps([], 2))
    assert "is refused: " in refusal(path)


def test_deep_values_do_no_harm(tmp_path: Path) -> None:
    assert "holds a tuple" in refusal(archive(tmp_path / "t.pth", b"\x80\x02" + nested(40) + b"."))
    value = b"\x80\x02}X\x01\x00\x00\x00a" + nested(40) + b"s."
    assert "other things than tensors (a)" in refusal(archive(tmp_path / "v.pth", value))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A pipe without a writer, and a device without an end."""
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is no regular file" in refusal(tmp_path / "pipe.pth")
    assert "is no regular file" in refusal(Path("/dev/zero"))
    with pytest.raises(UserError, match="is no regular file"):
        read_linear(tmp_path / "pipe.pth")
    for folder, name in (("a", "model.safetensors"), ("b", "config.json"), ("c", "LAST")):
        path = tmp_path / folder
        path.mkdir()
        save(dino.create("vit_tiny", **TINY), path / "model.safetensors")
        save(dino.create("vit_tiny", **TINY), path / "teacher.safetensors")
        (path / name).unlink(missing_ok=True)
        if folder != "c":
            (path / "teacher.safetensors").unlink()
        if folder == "c":
            (path / "checkpoints").mkdir()
            path = path / "checkpoints"
        os.mkfifo(path / name)
        with pytest.raises(UserError, match="is no regular file"):
            read_checkpoint(tmp_path / folder)


def test_a_safetensors_header_of_a_million_keys(tmp_path: Path) -> None:
    keys = ",".join(
        f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(10**6)
    )
    text = f"{{{keys}}}".encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert "has a header of 5" in refusal(tmp_path / "w.safetensors")


# ------------------------------------------------------------------------------------ safetensors
def test_safetensors_headers_with_absurd_sizes(tmp_path: Path) -> None:
    def header(content: Any, length: int | None = None, data: bytes = bytes(16)) -> bytes:
        text = json.dumps(content).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    def tensor(shape: list[int], offsets: list[int]) -> dict[str, Any]:
        return {"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}

    (tmp_path / "sound.safetensors").write_bytes(header(tensor([4], [0, 16])))
    assert "holds no network" in refusal(tmp_path / "sound.safetensors")
    for name, data in {
        "long": header(tensor([4], [0, 16]), 2**62),
        "longer": header(tensor([4], [0, 16]), 99_000_000),
        "shape": header(tensor([2**40, 2**40], [0, 16])),
        "many": header(tensor([2**40], [0, 2**42])),
        "outside": header(tensor([4], [10**15, 10**15 + 16])),
        "cut": header(tensor([4], [0, 16]), data=bytes(15)),
        "deep": struct.pack("<Q", 40_000) + b"{" + b'"a":{' * 7_999 + b"    ",
    }.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        assert "not a complete safetensors file" in refusal(tmp_path / f"{name}.safetensors"), name


MEASURE = """
import resource, sys
import dino.weights.load
from dino.files import UserError
limit = int(sys.argv[1])
for path in sys.argv[2:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        dino.weights.load.load(path)
    except UserError:
        pass
    else:
        raise SystemExit(f"{path} was loaded")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > limit:
        raise SystemExit(f"{path}: {grown} KiB")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts KiB as Linux does")
def test_refusals_take_little_memory(tmp_path: Path) -> None:
    """A file that claims gigabytes, and a pickle whose memo would need them (C's does)."""
    records = {"0": bytes(16)}
    claims = archive(tmp_path / "claims.pth", tensor_pickle(2**33, (2**33,), (1,)), records)
    memo = archive(tmp_path / "memo.pth", b"\x80\x02N" + b"r" + struct.pack("<I", 2**31) + b".")
    string = archive(tmp_path / "string.pth", b"\x80\x04\x8d" + struct.pack("<Q", 2**33) + b"x.")
    (tmp_path / "old.pth").write_bytes(b"\x80\x04\x8d" + struct.pack("<Q", 2**33) + b"x.")
    paths = [str(path) for path in (claims, memo, string, tmp_path / "old.pth")]
    command = [sys.executable, "-c", MEASURE, str(64 * 1024), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
