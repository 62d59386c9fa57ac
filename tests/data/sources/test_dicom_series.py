"""Slices of a DICOM series in a folder: in the order of their positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from helpers.dicoms import dicom
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dino.data.sources.folder import Folder

AXIAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]


def scan(path: Path, series: str, **fields: Any) -> None:
    dicom(path, np.zeros((4, 5), np.uint16), SeriesInstanceUID=series, **fields)


def names(root: Path) -> list[str]:
    source = Folder(root)
    return [Path(source.path(index)).relative_to(root).as_posix() for index in range(len(source))]


@pytest.mark.parametrize("implicit", [False, True])
def test_slices_are_ordered_by_position(tmp_path: Path, implicit: bool) -> None:
    heights = [30.5, -7, 1e2, 4, -12.25]
    for number, height in enumerate(heights):
        path = tmp_path / f"IM{number}"
        scan(path, "1.2", ImagePositionPatient=[9, 9, height], ImageOrientationPatient=AXIAL)
        if implicit:
            data = pydicom.dcmread(path)
            data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
            data.save_as(path, implicit_vr=True, little_endian=True)
    assert names(tmp_path) == [f"IM{number}" for number in np.argsort(heights)]


def test_positions_are_along_the_normal(tmp_path: Path) -> None:
    """The normal of these sagittal slices points against the first axis."""
    for number in range(4):
        where = {"ImagePositionPatient": [number, -number, 5], "ImageOrientationPatient": SAGITTAL}
        scan(tmp_path / f"{number}.dcm", "1.2", **where)
    assert names(tmp_path) == ["3.dcm", "2.dcm", "1.dcm", "0.dcm"]


def test_instance_numbers_count_where_a_position_is_missing(tmp_path: Path) -> None:
    scan(tmp_path / "a.dcm", "1.2", InstanceNumber=10)
    scan(tmp_path / "b.dcm", "1.2", InstanceNumber=9)
    scan(tmp_path / "c.dcm", "1.2", ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=AXIAL)
    assert names(tmp_path) == ["b.dcm", "a.dcm", "c.dcm"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(data=st.data())
def test_series_keep_their_places_and_other_files_stay(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("series")
    for folder in ("a", "b"):
        (root / folder).mkdir()
        for number in range(6):
            kind = data.draw(st.sampled_from(["1.2", "1.3", "no series", "picture", "damaged"]))
            path = root / f"{folder}/{number}.dcm"
            if kind == "picture":
                Image.new("RGB", (5, 4)).save(path.with_suffix(".png"))
            elif kind == "damaged":
                path.write_bytes(bytes(128) + b"DICM" + bytes(20))
            else:
                place = [0, 0, data.draw(st.integers(-9, 9))]
                where = {"ImagePositionPatient": place, "ImageOrientationPatient": AXIAL}
                scan(path, "" if kind == "no series" else kind, **where)
    plain = sorted(path.relative_to(root).as_posix() for path in root.glob("*/*"))
    found = names(root)
    assert sorted(found) == plain

    def slice_of(name: str) -> tuple[str, str, float] | None:
        if not name.endswith(".dcm") or b"DICM" + bytes(20) in (root / name).read_bytes():
            return None
        header = pydicom.dcmread(root / name)
        series = str(header.SeriesInstanceUID)
        return (name[0], series, float(header.ImagePositionPatient[2])) if series else None

    for before, after in zip(map(slice_of, plain), map(slice_of, found), strict=True):
        assert (before and before[:2]) == (after and after[:2])
    slices = [one for one in map(slice_of, found) if one]
    for key in {one[:2] for one in slices}:
        heights = [height for *place, height in slices if tuple(place) == key]
        assert heights == sorted(heights)
