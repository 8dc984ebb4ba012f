"""A loop in torchtitan's manner: dimensions of a mesh, a function that parallelises the model, a Trainer that saves and loads itself.

    torchrun --nproc-per-node 8 examples/torchtitan_style.py --model DIR --data FILE --context 131072 --dp-shard 2 --out DIR

`parallelize_fn` stands where torchtitan's does and takes what its own does apart (context parallelism, activation checkpointing, FSDP) in
one call. What is left of the mesh after `--dp-replicate` and `--dp-shard` is `cp`: its ranks share every sequence, and read the same rows.
A run goes on from the last checkpoint in `--out`, on any number of ranks and any mesh.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import ringspan


@dataclass(frozen=True)
class ParallelDims:
    """How many ranks each dimension has; `cp` is what the others leave."""

    dp_replicate: int
    dp_shard: int
    world_size: int

    @property
    def cp(self):
        return self.world_size // (self.dp_replicate * self.dp_shard)

    @property
    def num_replicas(self):
        """Different sequences at a time."""
        return self.dp_replicate * self.dp_shard

    def build_mesh(self, device_type):
        if self.num_replicas * self.cp != self.world_size:
            raise SystemExit(f"--dp-replicate {self.dp_replicate} times --dp-shard {self.dp_shard} does not divide {self.world_size} ranks")
        shape = (self.dp_replicate, self.dp_shard, self.cp)
        return init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard", "cp"))


def parallelize_fn(model, mesh, given):
    """Attention over `cp`, parameters over dp_shard and cp; feed-forward and loss by chunks, layers computed again but for attention."""
    return ringspan.parallelize(
        model,
        mesh,
        context="cp",
        shard="dp_shard",
        replicate="dp_replicate",
        strategy=given.strategy,
        # Masters stay in float32, which is what the optimizer steps.
        compute_dtype=torch.bfloat16 if mesh.device_type == "cuda" else None,
    )


class Trainer(Stateful):
    """Everything that a checkpoint holds, and what a step does with it."""

    def __init__(self, given, ids, dims, device):
        self.given, self.dims, self.device, self.step = given, dims, device, 0
        mesh = dims.build_mesh(device.type)
        self.replica = mesh.get_local_rank("dp_replicate") * dims.dp_shard + mesh.get_local_rank("dp_shard")
        if given.global_batch_size % dims.num_replicas:
            raise SystemExit(f"--global-batch-size {given.global_batch_size} is not divided by {dims.num_replicas} replicas")
        self.model = AutoModelForCausalLM.from_pretrained(given.model).to(device).train()
        self.parallel = parallelize_fn(self.model, mesh, given)
        # After the parameters have been sharded.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / given.warmup_steps))
        self.rows = [row for row in ids.split(given.context) if len(row) == given.context]
        self.order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(0)).tolist()  # the same on every rank

    def micro_batches(self):
        """This replica's rows of a step, whole, the same on all ranks of its `cp`."""
        first = self.step * self.given.global_batch_size
        for number in range(first + self.replica, first + self.given.global_batch_size, self.dims.num_replicas):
            row = self.rows[self.order[number % len(self.rows)]].unsqueeze(0).to(self.device)
            yield {"input_ids": row, "labels": row}

    def train_step(self):
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        # The parts know how many labels the whole step has: shares add up, whatever the number of micro-batches and replicas.
        for part in self.parallel.shard_batches(list(self.micro_batches())):
            share = self.parallel.loss(part)
            share.backward()
            loss += share.detach()
        self.parallel.sum_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.given.max_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return loss.item(), (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict(), "step": self.step}

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]

    def train(self):
        checkpoints = Path(self.given.out) / "checkpoints"
        # Its metadata is written last: a checkpoint that has it is whole.
        whole = sorted(path.parent for path in checkpoints.glob("step-*/.metadata"))
        if whole:
            dcp.load({"trainer": self}, checkpoint_id=whole[-1])
        while self.step < self.given.steps:
            loss, norm = self.train_step()
            if dist.get_rank() == 0:
                print(f"step {self.step}  loss {loss:.6f}  gradient norm {norm:.4f}", flush=True)
            if self.step % self.given.checkpoint_every == 0 or self.step == self.given.steps:
                dcp.save({"trainer": self}, checkpoint_id=checkpoints / f"step-{self.step:08d}")

    def export(self):
        """A folder that plain transformers loads."""
        weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            self.model.save_pretrained(self.given.out, state_dict=weights)


def main():
    parser = argparse.ArgumentParser()
    for name in ("--model", "--data", "--out"):
        parser.add_argument(name, required=True)
    for name, default in {
        "--context": 4096, "--steps": 100, "--global-batch-size": 2, "--warmup-steps": 2, "--checkpoint-every": 50,
        "--dp-replicate": 1, "--dp-shard": 1,
    }.items():  # fmt: skip
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--strategy", default="ring")
    parser.add_argument("--max-norm", type=float, default=1.0)
    given = parser.parse_args()
    ids = AutoTokenizer.from_pretrained(given.model)(Path(given.data).read_text(), return_tensors="pt").input_ids[0]
    if len(ids) < given.context:
        parser.error(f"--context {given.context}: {given.data} has {len(ids)} tokens; take more text, or --context {len(ids)}")

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Checkpoints are planned over gloo.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    trainer = Trainer(given, ids, ParallelDims(given.dp_replicate, given.dp_shard, dist.get_world_size()), device)
    trainer.train()
    trainer.export()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
