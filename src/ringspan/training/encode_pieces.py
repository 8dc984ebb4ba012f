"""A long text encoded piece by piece, to the ids that it has as a whole.

Near a cut a tokenizer's ids are others than the whole text's: it may end a word there, group digits from there on, or begin with a space
of its own. So a piece begins before the last one ended, and the two are joined in the middle of what both hold:

    piece       ……………………|      low     middle     high     end
    next piece           start   low     middle     high      |……………………

From `low` to `high` both must have the same tokens, of the same characters and words, though the end of the one is a quarter of the overlap
away and the beginning of the other is too: neither cut is felt there. The ids are the first piece's up to the middle and the next one's
from there on. Where they differ the overlap is made longer, up to the whole piece, and where they still do, both are encoded as one.

What is taken for granted: where two encodings agree over half of the overlap, what lies before it makes no difference behind it, nor the
other way round. So it is where words are found by a pattern that is matched from left to right, and a word's tokens depend on it alone
(byte-level BPE of GPT-2, Llama 3, Qwen and SmolLM; WordPiece); and where neighbours are merged whatever is far away (BPE over whole texts,
as in Llama 2). Unigram (T5) weighs words as a whole: in a word of more than a million characters another division can be as good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Encoding

OVERLAP = 1 << 12
"""Characters that two pieces share at first."""


def encode_pieces(encode: Callable[[str], Encoding], texts: Iterable[str], overlap: int = OVERLAP) -> Iterator[list[int]]:
    """The ids of the joined `texts`: those of one text come when the next is read, so that two are in memory at a time.

    Args:
        encode: a tokenizer's, without what it truncates or adds.
        texts: each longer than the overlap; shorter ones are gathered until they are.
        overlap: characters, at least 4.
    """
    piece, encoding, given = "", encode(""), 0
    for text in filter(None, texts):
        for start in _starts(encoding, len(piece), overlap):
            following = encode(piece[start:] + text)
            joint = _joint(encoding, following, start, len(piece))
            if joint is not None and joint[0] >= given:
                yield encoding.ids[given : joint[0]]
                piece, encoding, given = piece[start:] + text, following, joint[1]
                break
        else:
            piece += text
            encoding = encode(piece)
    yield encoding.ids[given:]


def _starts(encoding: Encoding, length: int, overlap: int) -> Iterator[int]:
    """Where the next piece may begin, the shortest overlap first: at a token, so that digits that are grouped are grouped alike."""
    while overlap < length:
        token = encoding.char_to_token(length - overlap)
        span = None if token is None else encoding.token_to_chars(token)
        yield length - overlap if span is None else span[0]
        overlap *= 4


def _joint(before: Encoding, after: Encoding, start: int, end: int) -> tuple[int, int] | None:
    """The first token from the middle of [start, end) on, by its number in each encoding; None where they differ around it.

    Args:
        before: of a text that ends at `end`.
        after: of a text that begins at `start`.
    """
    quarter = (end - start) // 4
    low, middle, high = (_token_from(before, start + count * quarter, quarter) for count in (1, 2, 3))
    other_low, other_middle, other_high = (_token_from(after, count * quarter, quarter) for count in (1, 2, 3))
    if min(low, other_low) < 0 or not low < middle < high or middle - low != other_middle - other_low:
        return None
    same = _tokens(before, low, high, start) == _tokens(after, other_low, other_high, 0)
    return (middle, other_middle) if same else None


def _token_from(encoding: Encoding, position: int, within: int) -> int:
    """The first token of a character at or behind `position`, since some tokenizers leave blanks to none; −1 where there is none."""
    found = (encoding.char_to_token(each) for each in range(position, position + within))
    return next((token for token in found if token is not None), -1)


def _tokens(encoding: Encoding, first: int, last: int, start: int) -> list[tuple]:
    """Ids, characters from `start` on and words from the first one's on."""
    ids, word = encoding.ids, encoding.token_to_word(first) or 0
    found = []
    for token in range(first, last):
        characters = [each - start for each in encoding.token_to_chars(token) or ()]
        found.append((ids[token], characters, (encoding.token_to_word(token) or word) - word))
    return found
