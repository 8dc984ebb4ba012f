"""What a step reads is a pure function of the seed and the step, from a token file that is the text."""

from __future__ import annotations

import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ringspan.errors import RingspanError
from ringspan.training.batches import rows_of
from ringspan.training.text import find_text
from ringspan.training.tokenizer import ByteTokenizer, load_tokenizer
from ringspan.training.tokens import Split, TokenFile, Windows, ensure_tokens, load_tokens, position_edges, validation_starts


def token_file(num_tokens: int) -> TokenFile:
    return TokenFile(path="", data="text", tokenizer="bytes", num_tokens=num_tokens, token_bytes=1, source_digest="", digest="")


def test_the_standard_library_is_read_in_sorted_order_without_its_tests():
    text = find_text("stdlib")
    names = [file.relative_to(sysconfig.get_paths()["stdlib"]).as_posix() for file in text.files]
    assert names == sorted(names)
    assert "json/decoder.py" in names
    assert not [name for name in names if "/test/" in f"/{name}" or "site-packages" in name]
    assert text.num_bytes > 5_000_000


def test_a_folder_is_read_in_sorted_order_without_hidden_and_binary_files(tmp_path: Path):
    for name, content in {"b.txt": b"two", "a/z.md": b"one", ".git/x": b"no", "c.bin": b"\0\1", "d.txt": b""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    tokens = ensure_tokens(tmp_path / ".out", str(tmp_path), "bytes")
    assert bytes(tokens.open().tolist()) == b"one\0two\0"


@pytest.mark.parametrize("content", [None, b"", b"text\0with a hole"])
def test_data_that_holds_no_text_is_refused(tmp_path: Path, content: bytes | None):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RingspanError, match=f"--data {file}"):
        find_text(str(file))


def test_a_folder_without_text_is_refused(tmp_path: Path):
    with pytest.raises(RingspanError, match="no text file in it"):
        find_text(str(tmp_path))


def test_a_token_file_is_reused_until_the_text_changes_or_the_file_is_damaged(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("some words")
    first = ensure_tokens(tmp_path / "out", str(text), "bytes")
    written = Path(first.path).stat().st_mtime_ns
    assert ensure_tokens(tmp_path / "out", str(text), "bytes") == first
    assert Path(first.path).stat().st_mtime_ns == written
    Path(first.path).write_bytes(b"some w0rds")
    assert not first.is_whole()
    assert ensure_tokens(tmp_path / "out", str(text), "bytes").is_whole()
    text.write_text("other words")
    second = ensure_tokens(tmp_path / "out", str(text), "bytes")
    assert second.digest != first.digest
    assert bytes(second.open().tolist()) == b"other words"
    assert load_tokens(tmp_path / "out") == second


def test_a_tokenizer_file_writes_the_ids_that_it_says(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("a rose is a rose is a rose\n" * 50)
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel()
    fast.train([str(text)], trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False))
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    tokens = ensure_tokens(tmp_path / ".out", str(text), str(tmp_path))
    assert tokens.open().tolist() == tokenizer.encode(text.read_text())
    assert tokens.open().dtype == torch.int32
    assert tokenizer.separator == 0
    assert tokenizer.vocabulary_size == fast.get_vocab_size()


@pytest.mark.parametrize("content", [None, "", "{}", "no json"])
def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(RingspanError, match="--tokenizer"):
        load_tokenizer(str(tmp_path))


def test_bytes_decode_to_the_text_that_they_encode():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("naïve ∑ text\n")) == "naïve ∑ text\n"
    assert tokenizer.decode([0xFF, 65]) == "\N{REPLACEMENT CHARACTER}A"


@pytest.mark.parametrize(("num_tokens", "context", "batch_size"), [(1000, 10, 1), (997, 13, 3), (50, 50, 1), (101, 50, 4)])
def test_an_epoch_reads_every_window_once(num_tokens: int, context: int, batch_size: int):
    windows = Windows(num_tokens=num_tokens, context=context, batch_size=batch_size, seed=5)
    count = windows.windows_per_epoch
    assert num_tokens // context - 1 <= count <= num_tokens // context
    starts = [start for step in range(1, 3 * count + 1) for start in windows.starts(step)]
    assert all(0 <= start <= num_tokens - context for start in starts)
    for first in (0, count, 2 * count):
        epoch = sorted(starts[first : first + count])
        assert epoch == [epoch[0] + context * i for i in range(count)]


def test_a_late_step_of_many_epochs_is_found_at_once():
    windows = Windows(num_tokens=50, context=50, batch_size=1, seed=5)
    assert windows.starts(10**12) == [0]


def test_a_step_reads_the_same_whatever_was_read_before():
    def windows(seed: int = 1) -> Windows:
        return Windows(num_tokens=5000, context=17, batch_size=2, seed=seed)

    in_order = [windows().starts(step) for step in range(1, 400)]
    assert [windows().starts(step) for step in (399, 7, 200)] == [in_order[398], in_order[6], in_order[199]]
    assert [windows(seed=2).starts(step) for step in range(1, 400)] != in_order


@pytest.mark.parametrize(("num_tokens", "context"), [(2, 1), (100, 50), (101, 50), (100_000, 64)])
def test_held_out_windows_lie_behind_the_training_text_and_do_not_overlap(num_tokens: int, context: int):
    split = Split.of(token_file(num_tokens), context)
    assert split.num_training >= context
    assert split.num_training + split.num_held_out == num_tokens
    starts = validation_starts(split, context, 640)
    assert starts[0] >= split.num_training
    assert all(after - before >= context for before, after in pairwise(starts))
    assert starts[-1] + context <= num_tokens
    assert len(starts) == min(split.num_held_out // context, max(1, 640 // context))


@pytest.mark.parametrize(("num_tokens", "context", "nearest"), [(100, 51, "--context 50"), (3, 2, "more text"), (1, 64, "more text")])
def test_a_context_longer_than_the_data_is_refused_with_the_longest_that_fits(num_tokens: int, context: int, nearest: str):
    with pytest.raises(RingspanError, match=f"--context {context}: text has {num_tokens} tokens.* Try: {nearest}"):
        Split.of(token_file(num_tokens), context)


def test_windows_are_read_as_ids():
    tokens = torch.arange(100, dtype=torch.uint8)
    assert rows_of([3, 50], tokens, 4).tolist() == [[3, 4, 5, 6], [50, 51, 52, 53]]


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (9, [0, 9]),
        (61, [0, 16, 32, 61]),
        (64, [0, 16, 32, 64]),
        (65536, [0, 1024, 2048, 4096, 8192, 16384, 32768, 65536]),
        (100000, [0, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 100000]),
    ],
)
def test_ranges_of_positions_double_up_to_the_context(context: int, expected: list[int]):
    assert position_edges(context) == expected
