"""Files of token ids that somebody else's tokenizer has written.

- `.npy`: NumPy's format, version 1 to 3: one dimension, little-endian `uint16` or `uint32`.
- `.bin`: nothing but ids, little-endian, of the width that `--token-dtype` names (`uint16` or `uint32`), no header.

Ids lie below 2³¹. Documents, where they are to be kept apart, end with `--separator`.
"""

from __future__ import annotations

import ast
import hashlib
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ringspan.errors import RingspanError

SUFFIXES = (".bin", ".npy")
_WIDTH = {"uint16": 2, "uint32": 4}
_CHUNK_TOKENS = 1 << 20
_LOOKED_AT_BYTES, _FEWEST_IDS = 1 << 20, 64
_RULE = "A token file is .npy, one dimension of little-endian uint16 or uint32, or .bin, such ids and nothing else"


@dataclass(frozen=True, kw_only=True)
class IdFile:
    """Where the ids lie in a file: `num_tokens` of `width` bytes behind `offset`."""

    path: Path
    offset: int
    width: int
    num_tokens: int

    def __str__(self) -> str:
        return f"{self.path} ({self.num_tokens / 1e6:.1f} million tokens)"

    def _contents(self) -> Iterator[bytes]:
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            while content := stream.read(_CHUNK_TOKENS * self.width):
                yield content

    def _largest(self, content: bytes) -> int:
        return int(torch.frombuffer(bytearray(content), dtype=torch.uint16 if self.width == 2 else torch.uint32).long().max())

    def largest(self) -> int:
        """The largest id, so that a vocabulary can be made that holds it."""
        return max(map(self._largest, self._contents()))

    def pieces(self, vocabulary_size: int) -> Iterator[bytes]:
        """The ids as they lie in a run's token file: two or four bytes each.

        Raises:
            RingspanError: at an id that the vocabulary lacks.
        """
        for content in self._contents():
            largest = self._largest(content)
            if largest >= min(vocabulary_size, 2**31):
                raise RingspanError(
                    f"--data {self.path}",
                    f"it holds the id {largest}, and the vocabulary has {vocabulary_size}",
                    "Every id needs an embedding",
                    "the tokenizer that wrote the file, or the other --token-dtype",
                )
            yield content

    def digest(self) -> str:
        """SHA-256 of the file and of how it is read."""
        with self.path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        return hashlib.sha256(f"{content} {self.offset} {self.width}".encode()).hexdigest()


def is_token_file(data: str) -> bool:
    """Whether `--data` names a file of ids, by its name."""
    return Path(data).suffix in SUFFIXES and Path(data).is_file()


def find_ids(data: str, token_dtype: str) -> IdFile:
    """The ids in a `.npy` or `.bin` file.

    Raises:
        RingspanError: where the file is not of the form that its name says, or looks as if its ids were of 4 bytes and not of 2.
    """
    path = Path(data)
    offset, width = _numpy_header(path) if path.suffix == ".npy" else (0, _WIDTH[token_dtype])
    size = path.stat().st_size - offset
    if size == 0 or size % width:
        raise RingspanError(
            f"--data {data}",
            f"{size} bytes of ids are no whole number of {width}-byte ids" if size else "there are no ids in it",
            _RULE,
            "--token-dtype uint16" if width == 4 and size and not size % 2 and path.suffix == ".bin" else "another file",
        )
    if width == 2 and path.suffix == ".bin" and size % 4 == 0 and _are_wide(path):
        raise RingspanError(
            f"--data {data} --token-dtype uint16",
            "every second id is next to nothing, as where ids of 4 bytes are read two bytes at a time",
            _RULE,
            "--token-dtype uint32; or a .npy file, which says itself how wide its ids are",
        )
    return IdFile(path=path, offset=offset, width=width, num_tokens=size // width)


def _are_wide(path: Path) -> bool:
    """Whether the first ids of two bytes look like ids of four: of these the upper halves are below 4 up to a vocabulary of 262,144."""
    with path.open("rb") as stream:
        ids = array("H", stream.read(_LOOKED_AT_BYTES))
    return len(ids) >= _FEWEST_IDS and max(ids[1::2]) < 4 <= max(ids[::2])


def _numpy_header(path: Path) -> tuple[int, int]:
    """Where the ids begin, and how wide they are. (NumPy itself is no dependency of ringspan.)"""

    def refused(found: str) -> RingspanError:
        return RingspanError(f"--data {path}", found, _RULE, "numpy.save(path, ids.astype('<u4'))")

    with path.open("rb") as stream:
        magic = stream.read(8)
        if magic[:6] != b"\x93NUMPY" or len(magic) < 8:
            raise refused("it does not begin as a .npy file does")
        form = "<H" if magic[6] == 1 else "<I"
        try:
            (length,) = struct.unpack(form, stream.read(struct.calcsize(form)))
            header = ast.literal_eval(stream.read(length).decode("utf-8"))
            kind, order, shape = header["descr"], header["fortran_order"], header["shape"]
        except (struct.error, ValueError, SyntaxError, KeyError, TypeError):
            raise refused("its header cannot be read") from None
        offset = stream.tell()
    if kind not in ("<u2", "<u4") or len(shape) != 1:
        raise refused(f"it holds {kind!r} of shape {shape}")
    del order  # one dimension has only one
    width = int(kind[2])
    if path.stat().st_size - offset != shape[0] * width:
        raise refused(f"{path.stat().st_size - offset} bytes of ids where its header says {shape[0]} of {width} bytes")
    return offset, width
