"""Token ids for `ringspan train --data` whose held-out rows begin every so many tokens: loss by position then compares the same text.

    python3 benchmarks/every_position.py --model SmolLM2-135M --data TEXT --context 65536 --every 8192 --out ids.npy

Training holds out the last twentieth and reads it in rows that do not overlap, so that each position has other text. Here the last
twentieth is laid down row after row, each beginning `--every` tokens after the one before, so that what is not near its ends lies at as
many positions as that goes into a row. Before it comes the rest of the text, again and again, to nineteen times the rows' length: what is
trained on.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from ringspan.training.tokens import HELD_OUT_FRACTION, ensure_tokens


def laid_down(ids: np.ndarray, context: int, every: int) -> tuple[np.ndarray, int]:
    """What is trained on and then the rows, and how many rows there are.

    Args:
        ids: `[tokens]`.
        context: tokens of a row.
        every: tokens from the beginning of a row to that of the next one.
    """
    held_out = round(HELD_OUT_FRACTION * len(ids))
    training, rest = ids[:-held_out], ids[-held_out:]
    starts = range(0, held_out - context + 1, every)
    if not starts:
        raise SystemExit(f"--context {context}: the last twentieth of the text has {held_out} tokens; more text, or a shorter context")
    rows = np.concatenate([rest[start : start + context] for start in starts])
    trained = round(len(rows) * (1 / HELD_OUT_FRACTION - 1))
    return np.concatenate([np.resize(training, trained), rows]), len(starts)


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder of the model whose tokenizer it is")
    parser.add_argument("--data", required=True)
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--every", type=int, default=8192)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokens = ensure_tokens(Path(folder), arguments.data, arguments.model)
        ids = np.fromfile(tokens.path, dtype=np.uint16 if tokens.token_bytes == 2 else np.uint32)
    laid, rows = laid_down(ids, arguments.context, arguments.every)
    np.save(arguments.out, laid)
    print(f"{len(ids)} tokens; held out: {rows} rows of {arguments.context}, --validation-tokens {rows * arguments.context}")


if __name__ == "__main__":
    main()
