"""Control groups: the tightest limit from the own group up to the root, in both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino import cgroups

GIB = 2**30
UNLIMITED = 9223372036854771712  # what version 1 says


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without groups."""
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    return tmp_path


def write(root: Path, group: str, **files: object) -> None:
    folder = root / group
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_there_may_be_no_groups() -> None:
    assert cgroups.memory_left() is None
    assert cgroups.cpu_quota() is None


@pytest.mark.parametrize("tight", ["", "job", "job/step"])
def test_version_2_counts_every_group_above(root: Path, tight: str) -> None:
    write(root, ".", own="0::/job/step/none")
    for group in ("", "job", "job/step"):
        limit = 4 * GIB if group == tight else "max"
        write(root, group, memory__max=limit, memory__current=3 * GIB)
        write(root, group, memory__stat=f"anon 1\ninactive_file {GIB}\nfile 9")
        write(root, group, cpu__max="150000 100000" if group == tight else "max 100000")
    assert cgroups.memory_left() == 2 * GIB
    assert cgroups.cpu_quota() == 2


@pytest.mark.parametrize("tight", ["", "job", "job/step"])
def test_version_1_counts_every_group_above(root: Path, tight: str) -> None:
    write(root, ".", own="5:cpu,cpuacct:/job/step\n4:memory:/job/step\n3:pids:/other\n0::/")
    for group in ("", "job", "job/step"):
        limit = 4 * GIB if group == tight else UNLIMITED
        used = {"memory__usage_in_bytes": 3 * GIB, "memory__limit_in_bytes": limit}
        write(root, f"memory/{group}", memory__stat=f"total_inactive_file {GIB}", **used)
        quota = 5000 if group == tight else -1
        write(root, f"cpu/{group}", cpu__cfs_quota_us=quota, cpu__cfs_period_us=100000)
    assert cgroups.memory_left() == 2 * GIB
    assert cgroups.cpu_quota() == 1


def test_a_container_shows_its_limits_at_the_root(root: Path) -> None:
    write(root, ".", own="0::/../outside")
    write(root, "", memory__max=5, memory__current=3, memory__stat="inactive_file 1")
    assert cgroups.memory_left() == 3
