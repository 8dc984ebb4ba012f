"""Hugging Face's Trainer with its context split over the ranks.

    torchrun --nproc-per-node 2 examples/hf_trainer.py --model DIR --data FILE --context 4096 --out DIR --save-every 50
    torchrun --nproc-per-node 3 examples/hf_trainer.py … --resume

Three things differ from a script without ringspan: the collator hands each rank its shard of the batch, every rank reads the same batches,
and the model's attention is ringspan's. The Trainer does the rest right by itself: it counts the labels of all shards and of all
accumulated batches, and the gradients that it averages over the ranks are then those of the unsplit model. What it would do to a shard as
if that were a sequence is refused below. A run that goes on, on as many ranks or others, reads what it would have read.
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler
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

    def __init__(self, **given):
        super().__init__(**given)
        # A shard's neighbours are not the sequence's, and its labels are shifted already.
        refused = {
            "label_smoothing_factor": self.args.label_smoothing_factor,
            "neftune_noise_alpha": self.args.neftune_noise_alpha,
            "compute_metrics": self.compute_metrics,
        }
        for name, asked in refused.items():
            if asked:
                raise ValueError(f"{name}={asked!r}: the Trainer would compute it of each shard by itself; leave it out")

    def get_train_dataloader(self):
        return self.same_on_all_ranks(self.train_dataset, self.args.train_batch_size, Order(self))

    def get_eval_dataloader(self, eval_dataset=None):
        return self.same_on_all_ranks(self.eval_dataset if eval_dataset is None else eval_dataset, self.args.eval_batch_size, None)

    def same_on_all_ranks(self, rows, batch_size, order):
        return DataLoader(rows, batch_size, sampler=order, drop_last=order is not None, collate_fn=self.data_collator)


class Order(Sampler):
    """All rows in an order that depends on the seed and the epoch alone, also where a run goes on in the middle of one."""

    def __init__(self, trainer):
        self.trainer = trainer

    def __len__(self):
        return len(self.trainer.train_dataset)

    def __iter__(self):
        arguments = self.trainer.args
        batches = len(self) // arguments.train_batch_size
        steps = max(1, -(-batches // arguments.gradient_accumulation_steps))
        epoch = self.trainer.state.global_step // steps
        yield from torch.randperm(len(self), generator=torch.Generator().manual_seed(arguments.seed + epoch)).tolist()


def main():
    parser = argparse.ArgumentParser()
    for name in ("--model", "--data", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=0, help="steps between checkpoints; 0 for none")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
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
        save_strategy="steps" if given.save_every else "no",
        save_steps=given.save_every or 1,
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
    trainer.train(resume_from_checkpoint=given.resume)
    trainer.save_model()


if __name__ == "__main__":
    main()
    # The Trainer goes first: its DDP holds the process group and, were it the last to let go, could wait for ever for gloo's threads, which
    # wait for Python. A group that nobody destroys is no better: a thread of gloo that meets the end of Python aborts the process.
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
