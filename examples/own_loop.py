"""A training loop of your own with its context split over the ranks.

    torchrun --nproc-per-node 2 examples/own_loop.py --model DIR --data FILE --context 4096 --out DIR

Every rank holds the whole model and its shard of each sequence; after `cp.sum_gradients` every rank has the unsplit model's gradients, and
takes the same step.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import ringspan


def main():
    parser = argparse.ArgumentParser()
    for name in ("--model", "--data", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--accumulate", type=int, default=1)
    given = parser.parse_args()
    ids = AutoTokenizer.from_pretrained(given.model)(Path(given.data).read_text(), return_tensors="pt").input_ids[0]
    if len(ids) < given.context:
        parser.error(f"--context {given.context}: {given.data} has {len(ids)} tokens; take more text, or --context {len(ids)}")

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    cp = ringspan.ContextParallel()
    sequence = cp.sequence(given.context)
    ringspan.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(given.model, attn_implementation="ringspan").to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = [row for row in ids.split(given.context) if len(row) == given.context]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()  # the same on every rank

    for step in range(given.steps):
        total = 0.0
        for number in range(step * given.accumulate, (step + 1) * given.accumulate):
            row = rows[order[number % len(rows)]].unsqueeze(0).to(device)
            batch = sequence.shard_batch({"input_ids": row, "labels": row})
            inputs = {name: batch[name] for name in ("input_ids", "position_ids", "ringspan_sequence")}
            # Every row has as many labels, so that their mean is the step's; else weigh each by its num_items_in_batch.
            loss = sequence.loss(model(**inputs, use_cache=False).logits, batch["shift_labels"]) / given.accumulate
            loss.backward()
            total += loss.item()
        cp.sum_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if cp.rank == 0:
            print(f"step {step + 1}  loss {total:.6f}", flush=True)
    if cp.rank == 0:
        model.save_pretrained(given.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
