"""A text that is encoded piece by piece has the ids that it has as a whole, wherever it is cut."""

from __future__ import annotations

import io
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ringspan.training import tokenizer as tokenizer_room
from ringspan.training.encode_pieces import encode_pieces
from ringspan.training.tokenizer import FileTokenizer

PROSE = "\n\n".join(topics.values())[:40_000]
TEXT = "".join(
    [
        PROSE[:8000],
        *(str(7**power) for power in range(100, 116)),
        PROSE[8000:10010].replace("\n", "\r\n"),
        " " * 1777 + "\t\t\n" * 300,
        PROSE[10010:15000].replace("e", "e\N{COMBINING ACUTE ACCENT}"),
        "\N{FACE WITH TEARS OF JOY}\N{ZERO WIDTH JOINER}" * 200,
        PROSE[15000:20000].replace(". ", ".<|endoftext|> "),
        "a" * 3001,
        PROSE[20000:24000].upper(),
        "\N{CJK UNIFIED IDEOGRAPH-6587}\N{CJK UNIFIED IDEOGRAPH-5B57}" * 500,
        "0x" + "c0ffee" * 300,
        PROSE[24000:26000],
    ]
)
GPT4 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
ENDING = [AddedToken("<|endoftext|>", special=True)]


def trained(kind: str) -> Tokenizer:
    """A small tokenizer, built as those of a family are."""
    sizes = {"vocab_size": 900, "show_progress": False}
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(special_tokens=["[UNK]"], **sizes)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"], **sizes)
    elif kind == "llama2":
        # No pattern at all: merges go over the whole text, and a text begins with a blank of its own.
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], **sizes)
        made.train_from_iterator([PROSE], trainer)
        made.pre_tokenizer = None
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        return made
    else:
        made = Tokenizer(models.BPE())
        made.normalizer = normalizers.NFC() if kind == "qwen" else None
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefixed")
        if kind in ("llama3", "qwen"):
            pattern = pre_tokenizers.Split(Regex(GPT4), "isolated")
            made.pre_tokenizer = pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        made.post_processor, made.decoder = processors.ByteLevel(trim_offsets=kind != "gpt2"), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **sizes)
    made.train_from_iterator([PROSE, "123 1234 12345 " * 50], trainer)
    made.add_special_tokens(ENDING)
    return made


def cut(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


@pytest.mark.parametrize("kind", ["gpt2", "prefixed", "llama3", "qwen", "llama2", "unigram", "wordpiece"])
def test_the_ids_of_pieces_are_those_of_the_whole_text(kind: str):
    made = trained(kind)

    def encode(text: str):
        return made.encode(text, add_special_tokens=False)

    expected = encode(TEXT).ids
    for size, overlap in ((1001, 512), (2500, 512), (10_007, 4096)):
        pieces = list(encode_pieces(encode, cut(TEXT, size), overlap))
        assert list(chain(*pieces)) == expected, f"cut every {size} characters"
    assert [each for piece in cut(TEXT, 1001) for each in encode(piece).ids] != expected, "the cuts matter"
    assert max(map(len, encode_pieces(encode, cut(PROSE, 1001), 512))) < 1500, "ids are given out as the text is read"


def test_a_file_longer_than_a_piece_has_the_ids_of_its_text_and_nothing_is_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = trained("llama3")
    made.enable_truncation(100)
    made.enable_padding(length=64)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer("tokenizer", tmp_path / "tokenizer.json")
    monkeypatch.setattr(tokenizer_room, "_CHUNK_BYTES", 10_007)  # within characters of several bytes
    damaged = TEXT.encode() + b"\xff\xf0\x9f half a character at the end \xe6\x96"
    written = list(tokenizer.encode_stream(io.BytesIO(damaged)))
    assert len(written) > 2
    assert memoryview(b"".join(written)).cast("i").tolist() == tokenizer.encode(damaged.decode(errors="replace"))
    assert len(tokenizer.encode(PROSE)) > 10_000
    assert b"".join(tokenizer.encode_stream(io.BytesIO(b""))) == b""
