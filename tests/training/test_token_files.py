"""Files of ids are read as their format says, and refused where they are not of it."""

from __future__ import annotations

import struct
from array import array
from pathlib import Path

import numpy
import pytest

from ringspan.errors import RingspanError
from ringspan.training.prepare import prepare
from ringspan.training.token_files import find_ids
from ringspan.training.tokenizer import load_tokenizer
from ringspan.training.tokens import ensure_tokens

IDS = [5, 0, 65_000, 7, 7, 1] * 40


def write(path: Path, form: str) -> Path:
    """The ids as numpy or a plain file has them."""
    if path.suffix == ".npy":
        numpy.save(path, numpy.array(IDS, dtype=form))
    else:
        path.write_bytes(struct.pack(f"<{len(IDS)}{'H' if form == '<u2' else 'I'}", *IDS))
    return path


@pytest.mark.parametrize("name", ["ids.bin", "ids.npy"])
@pytest.mark.parametrize(("form", "dtype"), [("<u2", "uint16"), ("<u4", "uint32")])
def test_ids_come_out_as_they_went_in(tmp_path: Path, name: str, form: str, dtype: str):
    file = write(tmp_path / name, form)
    tokens = ensure_tokens(tmp_path / "out", str(file), "ids:65001", token_dtype=dtype, separator=7)
    assert tokens.open()[:].long().tolist() == IDS
    assert (tokens.token_bytes, tokens.num_tokens, tokens.separator) == (int(form[2]), len(IDS), 7)
    assert find_ids(str(file), dtype).largest() == 65_000
    assert ensure_tokens(tmp_path / "out", str(file), "ids:65001", token_dtype=dtype, separator=7) == tokens
    with pytest.raises(RingspanError, match="it holds the id 65000, and the vocabulary has 65000"):
        ensure_tokens(tmp_path / "other", str(file), "ids:65000", token_dtype=dtype)


def other_shape(path: Path) -> str:
    numpy.save(path, numpy.zeros((4, 4), dtype="<u2"))
    return r"of shape \(4, 4\)"


def other_dtype(path: Path) -> str:
    numpy.save(path, numpy.zeros(4, dtype="<i8"))
    return "it holds '<i8'"


def other_order(path: Path) -> str:
    numpy.save(path, numpy.zeros(4, dtype=">u2"))
    return "it holds '>u2'"


def cut_short(path: Path) -> str:
    numpy.save(path, numpy.zeros(40, dtype="<u2"))
    path.write_bytes(path.read_bytes()[:-2])
    return "78 bytes of ids where its header says 40 of 2 bytes"


def no_header(path: Path) -> str:
    path.write_bytes(b"\x93NUMPY\x01\x00\xff\xff{")
    return "its header cannot be read"


def no_numpy(path: Path) -> str:
    path.write_bytes(b"hello, world")
    return "does not begin as a .npy file does"


def empty(path: Path) -> str:
    numpy.save(path, numpy.zeros(0, dtype="<u2"))
    return "there are no ids in it"


@pytest.mark.parametrize("spoil", [other_shape, other_dtype, other_order, cut_short, no_header, no_numpy, empty])
def test_a_npy_file_of_another_form_is_refused(tmp_path: Path, spoil):
    found = spoil(tmp_path / "ids.npy")
    with pytest.raises(RingspanError, match=found):
        find_ids(str(tmp_path / "ids.npy"), "uint16")


def test_a_bin_file_of_another_width_is_refused(tmp_path: Path):
    (tmp_path / "ids.bin").write_bytes(b"\0" * 6)
    assert find_ids(str(tmp_path / "ids.bin"), "uint16").num_tokens == 3
    with pytest.raises(RingspanError, match=r"6 bytes of ids are no whole number of 4-byte ids.*Try: --token-dtype uint16"):
        find_ids(str(tmp_path / "ids.bin"), "uint32")
    for dtype in ("uint16", "uint32"):
        (tmp_path / "ids.bin").write_bytes(b"\0" * 7)
        with pytest.raises(RingspanError, match=r"7 bytes of ids are no whole number.*Try: another file"):
            find_ids(str(tmp_path / "ids.bin"), dtype)


@pytest.mark.parametrize("vocabulary", [260, 50_000, 128_000, 262_144])
def test_ids_of_four_bytes_that_are_read_two_at_a_time_are_told_by_their_upper_halves(tmp_path: Path, vocabulary: int):
    ids, file = array("I", [number * 7919 % vocabulary for number in range(64)]), tmp_path / "ids.bin"
    file.write_bytes(ids.tobytes())
    with pytest.raises(RingspanError, match=r"every second id is next to nothing.*Try: --token-dtype uint32"):
        find_ids(str(file), "uint16")
    assert find_ids(str(file), "uint32").num_tokens == 64
    # Neither few ids nor those of a tiny vocabulary tell anything.
    for content in (ids[:16].tobytes(), array("H", [number % 3 for number in range(128)]).tobytes()):
        file.write_bytes(content)
        assert find_ids(str(file), "uint16").num_tokens == len(content) // 2


def test_a_preset_on_a_file_of_ids_gets_a_vocabulary_that_holds_them(tmp_path: Path):
    file = write(tmp_path / "ids.bin", "<u2")
    plan = prepare({"data": str(file), "model": "pico", "context": 20, "out": str(tmp_path / "run"), "separator": 7}, resume=False)
    assert plan.config.tokenizer == "ids:65001"
    assert (plan.tokens.token_bytes, plan.tokens.separator) == (2, 7)


@pytest.mark.parametrize("name", ["ids:", "ids:0", "ids:x", "ids:-3"])
def test_a_vocabulary_without_a_size_is_refused(name: str):
    with pytest.raises(RingspanError, match=f"--tokenizer {name}"):
        load_tokenizer(name)


def test_ids_are_shown_and_given_as_numbers():
    tokenizer = load_tokenizer("ids:10")
    assert tokenizer.decode([1, 2, 9]) == "1 2 9"
    assert tokenizer.encode("1 2\n9") == [1, 2, 9]
    for text in ("1 10", "a", "-1"):
        with pytest.raises(RingspanError, match="not made of ids"):
            tokenizer.encode(text)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"documents": "packed"}, "--documents packed: tokenizer ids:65001 names no end of a text"),
        ({"separator": 65_001}, "--separator 65001: the vocabulary has 65001 ids"),
        ({"separator": -1}, "--separator -1"),
        ({"documents": "apart"}, "--documents is one of joined, packed"),
        ({"token_dtype": "int8"}, "--token-dtype is one of uint16, uint32"),
    ],
)
def test_documents_that_cannot_be_told_apart_are_refused(tmp_path: Path, given: dict, expected: str):
    file = write(tmp_path / "ids.bin", "<u2")
    with pytest.raises(RingspanError, match=expected):
        prepare({"data": str(file), "model": "pico", "context": 20, "out": str(tmp_path / "run"), **given}, resume=False)
