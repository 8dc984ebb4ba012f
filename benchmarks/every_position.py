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

from ringspan.errors import RingspanError
from ringspan.training.tokens import HELD_OUT_FRACTION, Split, ensure_tokens


def laid_down(ids: np.ndarray, num_training: int, context: int, every: int) -> tuple[np.ndarray, int]:
    """What is trained on and then the rows, and how many rows there are.

    Args:
        ids: `[tokens]`.
        num_training: of them, those that are not held out.
        context: tokens of a row.
        every: tokens from the beginning of a row to that of the next one.
    """
    starts = range(num_training, len(ids) - context + 1, every)
    rows = np.concatenate([ids[start : start + context] for start in starts])
    trained = round(len(rows) * (1 / HELD_OUT_FRACTION - 1))
    return np.concatenate([np.resize(ids[:num_training], trained), rows]), len(starts)


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder of the model whose tokenizer it is")
    parser.add_argument("--data", required=True)
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--every", type=int, default=8192)
    parser.add_argument("--out", type=Path, required=True, help="a file that ends in .npy, as `ringspan train` knows them")
    arguments = parser.parse_args()
    if min(arguments.context, arguments.every) < 1 or arguments.out.suffix != ".npy" or not arguments.out.parent.is_dir():
        parser.error("--context and --every are 1 or more, and --out names an .npy in a folder that there is")
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokens = ensure_tokens(Path(folder), arguments.data, arguments.model)
            split = Split.of(tokens, arguments.context)
        except RingspanError as error:
            parser.error(str(error))
        laid, rows = laid_down(tokens.open().numpy(), split.num_training, arguments.context, arguments.every)
    np.save(arguments.out, laid.astype(np.uint32 if laid.itemsize == 4 else np.uint16))
    print(f"{tokens.num_tokens} tokens; held out: {rows} rows of {arguments.context}, --validation-tokens {rows * arguments.context}")


if __name__ == "__main__":
    main()
