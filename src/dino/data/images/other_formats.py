"""Files that are no images for us: what they are, and what to do with them."""

from __future__ import annotations

from dino.data.images.pixel_format import Stream

_UNPACK = "unpack it and give the folder"
_SLICES = "write its slices as .npy, such as with nibabel"
_OME = "export it as OME-TIFF, such as with bioformats2raw or Fiji"

_MAGIC = (  # place, bytes, format, remedy
    (0, b"PK\x03\x04", "a zip archive", _UNPACK),
    (0, b"\x1f\x8b", "gzip", "unpack it"),
    (0, b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", "give it as --data FILE.tar, or unpack it"),
    (344, b"n+1\0", "NIfTI", _SLICES),
    (344, b"ni1\0", "NIfTI", _SLICES),
    (0, b"\x89HDF", "HDF5", "write its images as .npy, such as with h5py"),
    (0, b"CDF", "NetCDF", "write its images as .npy, such as with xarray"),
    (0, b"PAR1", "Parquet", "give it as --data FILE.parquet"),
    (0, b"ZISRAWFILE", "CZI of a microscope", _OME),
    (0, b"\xda\xce\xbe\x0a", "ND2 of a microscope", _OME),
    (0, b"%PDF", "PDF", "write its pages as PNG, such as with pdftoppm"),
    (0, b"\xff\x0a", "JPEG XL", "convert it to PNG, such as with djxl"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL", "convert it to PNG, such as with djxl"),
    (0, b"version https://git-lfs", "a pointer of Git LFS", "fetch the file: git lfs pull"),
    (0, b"<svg", "SVG", "draw it as PNG, such as with rsvg-convert"),
    (0, b"<?xml", "XML", "it holds no pixels"),
    (0, b"<!DOCTYPE", "a web page", "download the image again"),
    (0, b"<html", "a web page", "download the image again"),
    (4, b"ftyp", "a film", "write its frames as images, such as with ffmpeg"),
    (0, b"\x1aE\xdf\xa3", "a film", "write its frames as images, such as with ffmpeg"),
)

REMEDIES = {
    **dict.fromkeys((".zip", ".7z", ".rar"), _UNPACK),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst"), "unpack it"),
    **dict.fromkeys((".nii", ".nii.gz", ".mha", ".nrrd"), _SLICES),
    **dict.fromkeys((".czi", ".nd2", ".lif", ".lsm", ".oib", ".oif", ".vsi"), _OME),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv"), "write its frames, such as with ffmpeg"),
    **dict.fromkeys((".h5", ".hdf5", ".nc"), "write its images as .npy"),
    ".tar": "give it as --data FILE.tar",
    ".parquet": "give it as --data FILE.parquet",
    ".pdf": "write its pages as PNG, such as with pdftoppm",
}
"""What to do with files that are left out, by their ending."""


def recognized(stream: Stream, known: str | None = None) -> str:
    """Such as "it is a zip archive: unpack it", in no format of images or a `known` one."""
    stream.seek(0)
    start = stream.read(400)
    for place, magic, name, remedy in _MAGIC:
        if start.startswith(magic, place):
            return f"it is {name}: {remedy}"
    return f"it is {known}: write it as PNG" if known else "its bytes are in no known image format"
