"""The data as one memory-mapped run of token ids, and the windows that training and validation read from it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import torch
from jaxtyping import Int
from torch import Tensor

from ringspan.errors import RingspanError
from ringspan.training.manifest import write_whole
from ringspan.training.text import find_text
from ringspan.training.text_dataset import find_dataset, is_dataset
from ringspan.training.token_files import find_ids, is_token_file
from ringspan.training.tokenizer import Tokenizer, load_tokenizer

HELD_OUT_FRACTION = 0.05


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """A finished token file: `num_tokens` ids of `token_bytes` each in `path`, where they came from, and the id that ends a document."""

    path: str
    data: str
    tokenizer: str
    num_tokens: int
    token_bytes: int
    source_digest: str
    digest: str
    separator: int | None = None

    def open(self) -> Int[Tensor, " tokens"]:
        """The ids, memory-mapped: nothing is read before it is used."""
        dtype = {1: torch.uint8, 2: torch.uint16, 4: torch.int32}[self.token_bytes]
        return torch.from_file(self.path, shared=False, size=self.num_tokens, dtype=dtype)

    def is_whole(self) -> bool:
        """Whether the file still holds what was written."""
        path = Path(self.path)
        if not path.is_file() or path.stat().st_size != self.num_tokens * self.token_bytes:
            return False
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == self.digest


def ensure_tokens(
    folder: Path, data: str, tokenizer_name: str, *, token_dtype: str = "uint16", text_column: str = "text", separator: int | None = None
) -> TokenFile:
    """The token file of `data` in `folder`, written unless it is there already and still matches its source.

    Args:
        data: text, as `find_text` takes it; a file of ids (`ringspan.training.token_files`); or a folder of Hugging Face datasets.
        token_dtype: of a `.bin` file of ids.
        text_column: of a dataset.
        separator: the id that ends a document; None is the tokenizer's own.

    Raises:
        RingspanError: where the data or the tokenizer cannot be had.
    """
    tokenizer = load_tokenizer(tokenizer_name)
    separator = tokenizer.separator if separator is None else separator
    source = _find(data, tokenizer, separator, token_dtype, text_column)
    source_digest = hashlib.sha256(f"{source.digest} {tokenizer.digest} {separator}".encode()).hexdigest()
    known = load_tokens(folder)
    if known is not None and known.source_digest == source_digest and known.is_whole():
        return known
    folder.mkdir(parents=True, exist_ok=True)
    return _write(folder, source, tokenizer, source_digest, separator)


@dataclass(frozen=True)
class _Source:
    """What is written: pieces of ids of `token_bytes` each."""

    name: str
    digest: str
    token_bytes: int
    pieces: Callable[[], Iterator[bytes]]


def _find(data: str, tokenizer: Tokenizer, separator: int | None, token_dtype: str, text_column: str) -> _Source:
    if is_token_file(data):
        ids = find_ids(data, token_dtype)
        return _Source(str(ids), ids.digest(), ids.width, lambda: ids.pieces(tokenizer.vocabulary_size))
    ending = b"" if separator is None else separator.to_bytes(tokenizer.token_bytes, "little")
    if is_dataset(data):
        rows = find_dataset(data, text_column)
        streams: Callable[[], Iterable[BinaryIO]] = lambda: (io.BytesIO(text.encode()) for text in rows.documents())  # noqa: E731
        return _Source(str(rows), rows.digest(), tokenizer.token_bytes, lambda: _encoded(streams(), tokenizer, ending))
    text = find_text(data)
    return _Source(str(text), text.digest, tokenizer.token_bytes, lambda: _encoded(map(_opened, text.files), tokenizer, ending))


def _opened(file: Path) -> BinaryIO:
    return file.open("rb")


def _encoded(streams: Iterable[BinaryIO], tokenizer: Tokenizer, separator: bytes) -> Iterator[bytes]:
    """The ids of all documents, with a separator between two."""
    first = True
    for opened in streams:
        with opened as stream:
            if not first:
                yield separator
            for piece in tokenizer.encode_stream(stream):
                first = first and not piece
                yield piece


def load_tokens(folder: Path) -> TokenFile | None:
    """The description of the token file in `folder`, None where there is none."""
    try:
        return TokenFile(**json.loads((folder / "tokens.json").read_text()) | {"path": str(folder / "tokens.bin")})
    except (OSError, ValueError, TypeError):
        return None


def _write(folder: Path, source: _Source, tokenizer: Tokenizer, source_digest: str, separator: int | None) -> TokenFile:
    digest = hashlib.sha256()
    size = 0
    partial = folder / "tokens.bin.partial"
    with partial.open("wb") as target:
        for piece in source.pieces():
            target.write(piece)
            digest.update(piece)
            size += len(piece)
    tokens = TokenFile(
        path=str(folder / "tokens.bin"),
        data=source.name,
        tokenizer=tokenizer.name,
        num_tokens=size // source.token_bytes,
        token_bytes=source.token_bytes,
        source_digest=source_digest,
        digest=digest.hexdigest(),
        separator=separator,
    )
    partial.replace(folder / "tokens.bin")
    write_whole(folder / "tokens.json", json.dumps(asdict(tokens), indent=2) + "\n")
    return tokens


@dataclass(frozen=True, kw_only=True)
class Split:
    """Where training ends and the held-out text begins: the last twentieth of the tokens, and at least one context."""

    num_training: int
    num_held_out: int

    @staticmethod
    def of(tokens: TokenFile, context: int) -> Split:
        """The split of a token file.

        Raises:
            RingspanError: for a context that does not fit once into each part.
        """
        held_out = max(context, round(HELD_OUT_FRACTION * tokens.num_tokens))
        if tokens.num_tokens < context + held_out:
            raise RingspanError(
                f"--context {context}",
                f"{tokens.data} has {tokens.num_tokens} tokens",
                "The text must hold one context to train on and another to validate on",
                f"--context {tokens.num_tokens // 2}, or more text" if tokens.num_tokens >= 4 else "more text",
            )
        return Split(num_training=tokens.num_tokens - held_out, num_held_out=held_out)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Which tokens a step reads: a pure function of (seed, step, row), so that every number of ranks sees the same batches.

    Within an epoch every window is read once, in a shuffled order; each epoch cuts the text at another offset.
    """

    num_tokens: int
    context: int
    batch_size: int
    seed: int

    def starts(self, step: int) -> list[int]:
        """First token of each row of the batch of `step` (counted from 1)."""
        return [self._start((step - 1) * self.batch_size + row) for row in range(self.batch_size)]

    @property
    def num_offsets(self) -> int:
        """In how many places the first window of an epoch may begin."""
        return min(self.context, self.num_tokens - self.context + 1)

    @property
    def windows_per_epoch(self) -> int:
        """As many as fit behind the last offset, so that every epoch has the same number; at least one."""
        return (self.num_tokens - self.num_offsets + 1) // self.context

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self.windows_per_epoch)
        return int(_epoch(self, epoch)[place])


@lru_cache(maxsize=8)
def _epoch(windows: Windows, epoch: int) -> Int[Tensor, " windows"]:
    # Two seeds in one number: the epoch's place is far above any number of epochs, and manual_seed takes 64 bits.
    generator = torch.Generator().manual_seed((windows.seed * 1_000_003 + epoch) % 2**63)
    offset = int(torch.randint(windows.num_offsets, (1,), generator=generator))
    return offset + windows.context * torch.randperm(windows.windows_per_epoch, generator=generator)


def validation_starts(split: Split, context: int, validation_tokens: int) -> list[int]:
    """First tokens of the held-out windows: evenly spread, none overlapping, the same in every validation."""
    fitting = split.num_held_out // context
    count = min(fitting, max(1, validation_tokens // context))
    return [split.num_training + context * (i * fitting // count) for i in range(count)]


def position_edges(context: int) -> list[int]:
    """Ranges of positions that double: the first 1/64 of the context, at least 16, then as much again, and so on to its end."""
    edges, edge = [0], max(16, 1 << max(0, (context // 64).bit_length() - 1))
    while edge < context:
        edges.append(edge)
        edge *= 2
    return [*edges, context]
