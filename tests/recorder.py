"""A plugin of nbdkit's Python: an image, and a log of every write to it in order of arrival (image=FILE log=FILE).

The log is one record after the other: offset (8 bytes, little-endian), length (4), the bytes.
"""

import io
import os
import struct

import nbdkit

API_VERSION = 2
RECORD = struct.Struct("<QI")

_files: dict[str, io.FileIO] = {}


def config(key: str, value: str) -> None:
    """`image` is written in place, `log` is added to."""
    _files[key] = io.FileIO(value, "r+" if key == "image" else "a")


def thread_model() -> int:
    """One request at a time, so that there is an order."""
    return int(nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS)


def open(readonly: bool) -> int:
    """There is one disk."""
    return 1


def get_size(handle: int) -> int:
    """In bytes."""
    return os.fstat(_files["image"].fileno()).st_size


def pread(handle: int, buffer: bytearray, offset: int, flags: int) -> None:
    """From the image."""
    os.preadv(_files["image"].fileno(), [buffer], offset)


def pwrite(handle: int, buffer: memoryview, offset: int, flags: int) -> None:
    """To both."""
    data = bytes(buffer)
    os.pwrite(_files["image"].fileno(), data, offset)
    _files["log"].write(RECORD.pack(offset, len(data)) + data)


def flush(handle: int, flags: int) -> None:
    """Every write is in the log already."""
