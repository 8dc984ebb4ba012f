"""A training loop of your own with Hugging Face's accelerate, its context split over the ranks.

    torchrun --nproc-per-node 2 examples/accelerate_loop.py --model DIR --data FILE --context 4096 --out DIR

The model and the optimizer are prepared as ever, so that DDP, mixed precision and clipping are accelerate's; data are not, since every
rank reads the same batches. A micro-batch's loss is this rank's share of the step's: the shares of all ranks and micro-batches add up,
whereas DDP takes the mean over ranks and accelerate that over micro-batches, which is made up for.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import ringspan


def main():
    parser = argparse.ArgumentParser()
    for name in ("--model", "--data", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    given = parser.parse_args()
    ids = AutoTokenizer.from_pretrained(given.model)(Path(given.data).read_text(), return_tensors="pt").input_ids[0]
    if len(ids) < given.context:
        parser.error(f"--context {given.context}: {given.data} has {len(ids)} tokens; take more text, or --context {len(ids)}")

    # This joins the process group, where torchrun has started several ranks.
    accelerator = Accelerator(
        gradient_accumulation_steps=given.accumulate, mixed_precision=given.mixed_precision, cpu=not torch.cuda.is_available()
    )
    # A group of its own: DDP's gradients are on their way while attention still sends.
    sequence = ringspan.ContextParallel(dist.new_group() if dist.is_initialized() else None).sequence(given.context)
    ringspan.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(given.model, attn_implementation="ringspan").train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    rows = [row for row in ids.split(given.context) if len(row) == given.context]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()  # the same on every rank

    for step in range(given.steps):
        batches = []
        for number in range(step * given.accumulate, (step + 1) * given.accumulate):
            row = rows[order[number % len(rows)]].unsqueeze(0).to(accelerator.device)
            batches.append(sequence.shard_batch({"input_ids": row, "labels": row}))
        labelled = sum(batch.pop("num_items_in_batch") for batch in batches)
        total = torch.zeros((), device=accelerator.device)
        for batch in batches:
            with accelerator.accumulate(model):
                share = model(**batch, num_items_in_batch=labelled, use_cache=False).loss
                accelerator.backward(share * accelerator.num_processes * given.accumulate)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()  # once a step, like the next
                optimizer.zero_grad()
            total += share.detach()
        total = accelerator.reduce(total, "sum")
        accelerator.print(f"step {step + 1}  loss {total.item():.6f}", flush=True)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(given.out)


if __name__ == "__main__":
    main()
    # DDP goes before its process group does, see hf_trainer.py.
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
