"""How fast FlashAttention-4 computes the tiles that a ring makes of a long sequence, beside the whole sequence, on one GPU.

    python benchmarks/tile_shapes.py --length 32768

TFLOP/s of useful work, forward | backward, the median of rounds in which every shape takes its turn, so that all meet the same clocks.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def tensors(queries: int, keys: int, interleaved: bool) -> list[torch.Tensor]:
    """q, k, v and dO."""
    q, dout = (torch.randn(1, queries, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    kv = torch.randn(*((keys, 2) if interleaved else (2, keys)), KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (kv[:, 0], kv[:, 1]) if interleaved else (kv[0], kv[1])
    return [q, k.unsqueeze(0), v.unsqueeze(0), dout]


def milliseconds(work, repeats: int) -> float:
    """Of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def main() -> None:
    """Times every shape."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=32768, help="tokens a rank")
    parser.add_argument("--rounds", type=int, default=7)
    length = parser.parse_args().length
    shapes: dict[str, tuple] = {
        "whole, causal": (2 * length, 2 * length, True, False, {}),
        "own, causal": (length, length, True, False, {}),
        "visitor, half the queries": (length // 2, length, False, False, {}),
        "half the queries, k and v interleaved": (length // 2, length, False, True, {}),
        "visitor, half the keys": (length, length // 2, False, False, {}),
        "half the keys, k and v interleaved": (length, length // 2, False, True, {}),
        "half the queries, no packing of heads": (length // 2, length, False, False, {"pack_gqa": False}),
        "half the queries, heads packed": (length // 2, length, False, False, {"pack_gqa": True}),
        "half the queries, tiles 128 x 176": (length // 2, length, False, False, {"tile_mn": (128, 176)}),
        "half the queries, tiles 128 x 160": (length // 2, length, False, False, {"tile_mn": (128, 160)}),
        "half the queries, tiles 192 x 128": (length // 2, length, False, False, {"tile_mn": (192, 128)}),
        "own, bottom right half": (length // 2, length, True, False, {}),
    }
    works = {}
    for name, (queries, keys, causal, interleaved, options) in shapes.items():
        q, k, v, dout = tensors(queries, keys, interleaved)
        try:
            out, lse, *_ = _flash_attn_fwd(q, k, v, causal=causal, return_lse=True, **options)
            if not options:
                _flash_attn_bwd(q, k, v, out, dout, lse, causal=causal)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:100]}")
            continue
        pairs = queries * keys - (queries * queries / 2 if causal else 0)
        works[name] = (
            pairs * 4 * HEADS * HEAD_DIM,
            lambda q=q, k=k, v=v, causal=causal, options=options: _flash_attn_fwd(q, k, v, causal=causal, return_lse=True, **options),
            None
            if options
            else lambda q=q, k=k, v=v, o=out, d=dout, s=lse, causal=causal: _flash_attn_bwd(q, k, v, o, d, s, causal=causal),
        )
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in works}
    for _ in range(parser.parse_args().rounds):
        for name, (flops, forward, backward) in works.items():
            repeats = max(1, int(2e13 / flops))
            times[name][0].append(flops / milliseconds(forward, repeats) / 1e9)
            if backward is not None:
                times[name][1].append(2.5 * flops / milliseconds(backward, repeats) / 1e9)
    print(f"{torch.cuda.get_device_name()}, {length} tokens a rank, torch {torch.__version__}")
    for name, (forward, backward) in times.items():
        print(f"{name:42} {statistics.median(forward):6.0f} | {statistics.median(backward) if backward else float('nan'):6.0f}")


if __name__ == "__main__":
    main()
