"""Files that are no images for us: what they are, and what to do with them."""

from __future__ import annotations

from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import Stream

_UNPACK = "unpack it and give the folder"
_SLICES = "write its slices as .npy, such as with nibabel"
_OME = "export it as OME-TIFF, such as with bioformats2raw or Fiji"

_TILES = "cut it into tiles, such as with vips dzsave"

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
    **dict.fromkeys((".svs", ".ndpi", ".scn", ".mrxs", ".bif", ".vms"), _TILES),
    **dict.fromkeys((".czi", ".nd2", ".lif", ".lsm", ".oib", ".oif", ".vsi"), _OME),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv"), "write its frames, such as with ffmpeg"),
    **dict.fromkeys((".h5", ".hdf5", ".nc"), "write its images as .npy"),
    ".tar": "give it as --data FILE.tar",
    ".parquet": "give it as --data FILE.parquet",
    ".pdf": "write its pages as PNG, such as with pdftoppm",
}
"""What to do with files that are left out, by their ending."""


_PICTURES = (  # place, bytes, format
    (0, b"\x89PNG", "PNG"),
    (0, b"\xff\xd8", "JPEG"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (8, b"WEBP", "WebP"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"ftypavi", "AVIF"),
    (0, b"8BPS", "PSD"),
    (0, b"DDS ", "DDS"),
    (0, b"PF", "colour PFM"),
    (0, b"P7", "PAM"),
)
_CONVERT = "convert it to PNG or TIFF, such as with ImageMagick"


def unidentified(stream: Stream, name: str) -> ImageError:
    """The error of a file that no library takes for an image, by its first bytes."""
    stream.seek(0)
    start = stream.read(2**16)
    for place, magic, form in _PICTURES:
        if start.startswith(magic, place):
            if kind := _jpeg_kind(start) if form == "JPEG" else form if magic[:1] == b"P" else "":
                return ImageError(name, f"it is {kind}: {_CONVERT}", "misfit")
            return ImageError(name, f"it begins as {form}, but its header is damaged", "damaged")
    return ImageError(name, recognized(stream), "not an image")


def _jpeg_kind(start: bytes) -> str:
    """Which JPEG that Pillow does not read; "" for others."""
    place = 2
    while place + 5 <= len(start) and start[place] == 0xFF:
        marker, length = start[place + 1], int.from_bytes(start[place + 2 : place + 4], "big")
        if marker == 0xF7:
            return "JPEG-LS"
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits = start[place + 4]
            lossless = "lossless " * (marker in (0xC3, 0xC7, 0xCB, 0xCF))
            return f"{lossless}JPEG of {bits} bits" if lossless or bits != 8 else ""
        place += 2 + length
    return ""


def recognized(stream: Stream, known: str | None = None) -> str:
    """Such as "it is a zip archive: unpack it", in no format of images or a `known` one."""
    stream.seek(0)
    start = stream.read(400)
    for place, magic, name, remedy in _MAGIC:
        if start.startswith(magic, place):
            return f"it is {name}: {remedy}"
    return f"it is {known}: write it as PNG" if known else "its bytes are in no known image format"
