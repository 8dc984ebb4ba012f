"""From text to token ids: raw bytes, or a Hugging Face tokenizer file."""

from __future__ import annotations

import codecs
import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from ringspan.errors import RingspanError
from ringspan.training.config import BYTES
from ringspan.training.encode_pieces import encode_pieces

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as FastTokenizer

_CHUNK_BYTES = 1 << 20
IDS = "ids:"
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
"""What a tokenizer.json may have beside it: special tokens, and how a chat is written."""


class Tokenizer(Protocol):
    """What the training data and the samples need of a tokenizer."""

    @property
    def name(self) -> str:
        """The path or name that `load_tokenizer` takes."""
        ...

    @property
    def unit(self) -> str:
        """What one token is called on axes and in tables."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Ids lie in 0 … vocabulary_size − 1."""
        ...

    @property
    def token_bytes(self) -> int:
        """Width of one id in a token file: 1 or 4."""
        ...

    @property
    def digest(self) -> str:
        """Changes whenever the same text would get other ids."""
        ...

    @property
    def separator(self) -> int | None:
        """The id between two files, None where there is none."""
        ...

    def files(self) -> dict[str, Path]:
        """The files that a model's folder needs for this tokenizer, by their names there."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; what is no text shows as a replacement character."""
        ...

    def encode_stream(self, stream: BinaryIO) -> Iterator[bytes]:
        """The ids of a whole file, piece by piece, as they lie in a token file."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """Every byte is a token; NUL, which text does not hold, stands between files."""

    name: str = BYTES
    unit: str = "byte"
    vocabulary_size: int = 256
    token_bytes: int = 1
    digest: str = BYTES
    separator: int | None = 0

    def files(self) -> dict[str, Path]:
        """None."""
        return {}

    def encode(self, text: str) -> list[int]:
        """UTF-8."""
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """UTF-8, with U+FFFD where the bytes are none."""
        return bytes(ids).decode(errors="replace")

    def encode_stream(self, stream: BinaryIO) -> Iterator[bytes]:
        """The file as it is."""
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


@dataclass(frozen=True)
class FileTokenizer:
    """A `tokenizer.json` of the tokenizers library; the end-of-text token, where it has one, stands between files."""

    name: str
    path: Path
    unit: str = "token"
    token_bytes: int = 4

    @cached_property
    def _fast(self) -> FastTokenizer:
        from tokenizers import Tokenizer

        try:
            fast = Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises a bare Exception for a file that it cannot read
            raise RingspanError(
                f"--tokenizer {self.name}",
                str(error),
                "A tokenizer is a tokenizers JSON file, or a folder with tokenizer.json",
                "--tokenizer bytes",
            ) from None
        # Some files say how long a model's inputs are: a text is longer, and none of it is left out.
        fast.no_truncation()
        fast.no_padding()
        return fast

    @property
    def vocabulary_size(self) -> int:
        """With the added special tokens."""
        return self._fast.get_vocab_size(with_added_tokens=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def separator(self) -> int | None:
        """The id of the end-of-text token that `tokenizer_config.json` names, or of a usual name for it."""
        names = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"]
        described = self.path.parent / "tokenizer_config.json"
        if described.is_file():
            token = json.loads(described.read_text()).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            names = [token, *names] if isinstance(token, str) else names
        return next((id_ for name in names if (id_ := self._fast.token_to_id(name)) is not None), None)

    def files(self) -> dict[str, Path]:
        """The file itself, and what lies beside it about special tokens and chat."""
        beside = {name: self.path.with_name(name) for name in _BESIDE}
        return {"tokenizer.json": self.path} | {name: file for name, file in beside.items() if file.is_file()}

    def encode(self, text: str) -> list[int]:
        """Without special tokens."""
        return self._encoding(text).ids

    def decode(self, ids: list[int]) -> str:
        """With special tokens shown."""
        return self._fast.decode(ids, skip_special_tokens=False)

    def encode_stream(self, stream: BinaryIO) -> Iterator[bytes]:
        """About a megabyte at a time, so that a file need not fit in memory; the ids are the whole text's, see `encode_pieces`."""
        for ids in encode_pieces(self._encoding, _texts(stream)):
            yield array("i", ids).tobytes()

    def _encoding(self, text: str) -> Encoding:
        return self._fast.encode(text, add_special_tokens=False)


def _texts(stream: BinaryIO) -> Iterator[str]:
    """A file's text in pieces; a character that two of them share is the second's."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while chunk := stream.read(_CHUNK_BYTES):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


@dataclass(frozen=True)
class IdTokenizer:
    """No text at all: ids that somebody else has made, shown as numbers."""

    vocabulary_size: int
    unit: str = "token"
    token_bytes: int = 4
    separator: int | None = None

    @property
    def name(self) -> str:
        """As `load_tokenizer` takes it."""
        return f"{IDS}{self.vocabulary_size}"

    @property
    def digest(self) -> str:
        """Its name."""
        return self.name

    def files(self) -> dict[str, Path]:
        """None."""
        return {}

    def encode(self, text: str) -> list[int]:
        """The numbers in `text`.

        Raises:
            RingspanError: where it holds something else, or an id that there is not.
        """
        try:
            ids = [int(word) for word in text.split()]
        except ValueError:
            ids = [-1]
        if not all(0 <= id_ < self.vocabulary_size for id_ in ids):
            raise RingspanError(
                f"{text[:40]!r} under --tokenizer {self.name}",
                "not made of ids",
                f"Ids are 0 … {self.vocabulary_size - 1}",
                "'1 2 3'",
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """As numbers."""
        return " ".join(map(str, ids))

    def encode_stream(self, stream: BinaryIO) -> Iterator[bytes]:
        """The numbers in a text."""
        yield array("i", self.encode(stream.read().decode(errors="replace"))).tobytes()


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name or path.

    Raises:
        RingspanError: for a path that holds none.
    """
    if name == BYTES:
        return ByteTokenizer()
    if name.startswith(IDS):
        size = name.removeprefix(IDS)
        if not size.isdecimal() or not 0 < int(size) <= 2**31:
            raise RingspanError(
                f"--tokenizer {name}", f"{size!r} is no size", "ids:N stands for the ids 0 … N − 1", "--tokenizer ids:50257"
            )
        return IdTokenizer(int(size))
    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise RingspanError(
            f"--tokenizer {name}",
            f"there is no file {path}",
            "A tokenizer is 'bytes', a tokenizers JSON file, a folder with tokenizer.json, or 'ids:N' for a file of ids",
            "--tokenizer bytes",
        )
    tokenizer = FileTokenizer(name, path)
    assert tokenizer.vocabulary_size > 0
    return tokenizer
