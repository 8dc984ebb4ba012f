"""Hugging Face's Trainer with its context split over the ranks.

    torchrun --nproc-per-node 2 examples/hf_trainer.py --model DIR --data FILE --context 4096 --out DIR

Three things differ from a script without ringspan: the collator hands each rank its shard of the batch, every rank reads the same batches,
and the model's attention is ringspan's. The Trainer does the rest right by itself: it counts the labels of all shards and of all
accumulated batches, and the gradients that it averages over the ranks are then those of the unsplit model.
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import ringspan


class ShardingCollator:
    """Stacks whole sequences, and keeps this rank's part of them."""

    def __init__(self, sequence):
        self.sequence = sequence

    def __call__(self, rows):
        ids = torch.stack([row["input_ids"] for row in rows])
        part = self.sequence.shard_batch({"input_ids": ids, "labels": ids})
        del part["num_items_in_batch"]  # the Trainer counts, over accumulated batches too
        return part


class ContextParallelTrainer(Trainer):
    """A Trainer whose ranks read the same batches; the usual one would give each rank others."""

    def get_train_dataloader(self):
        order = torch.Generator().manual_seed(self.args.seed)
        return DataLoader(
            self.train_dataset, self.args.train_batch_size, shuffle=True, generator=order, drop_last=True, collate_fn=self.data_collator
        )


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

    # This joins the process group, where torchrun has started several ranks.
    arguments = TrainingArguments(
        output_dir=given.out,
        max_steps=given.steps,
        gradient_accumulation_steps=given.accumulate,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend=("nccl" if torch.cuda.is_available() else "gloo") if "RANK" in os.environ else None,
    )
    # A group of its own: the Trainer's gradients are on their way while attention still sends.
    cp = ringspan.ContextParallel(dist.new_group() if dist.is_initialized() else None)
    ringspan.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(given.model, attn_implementation="ringspan")
    rows = [{"input_ids": row} for row in ids.split(given.context) if len(row) == given.context]
    trainer = ContextParallelTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=ShardingCollator(cp.sequence(given.context))
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
    # The Trainer goes first: its DDP holds the process group and, were it the last to let go, could wait for ever for gloo's threads, which
    # wait for Python. A group that nobody destroys is no better: a thread of gloo that meets the end of Python aborts the process.
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
