"""Model, optimizer and data of one rank, and what one step does with them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringspan.attention import ContextParallel
from ringspan.geometry import parse_mask
from ringspan.training.checkpoint import MODEL, OPTIMIZER, TrainingState, load_tensors, save_checkpoint
from ringspan.training.config import BYTES
from ringspan.training.metrics import StepRecord
from ringspan.training.model import build_model, cast_parameters, rebuild_model
from ringspan.training.optimizer import Optimizer, learning_rate_at
from ringspan.training.plan import Plan
from ringspan.training.ranks import Ranks
from ringspan.training.sample import sample
from ringspan.training.tokenizer import load_tokenizer
from ringspan.training.tokens import Windows, read_windows, validation_starts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPT_TOKENS = 256


class Trainer:
    """Model, optimizer and data of one rank, and what a step does with them."""

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        self.plan, self.config, self.ranks = plan, plan.config, ranks
        self.tokenizer = load_tokenizer(self.config.tokenizer or BYTES)
        self.tokens = plan.tokens.open()
        self.windows = Windows(
            num_tokens=plan.split.num_training, context=self.config.context, batch_size=self.config.batch_size, seed=self.config.seed
        )
        self.step = plan.first_step
        self.model, self.optimizer = self._model_and_optimizer()
        self.cp = ContextParallel(strategy=self.config.strategy, layout=self.config.layout, kernel=self.config.kernel)
        self.cp.broadcast_parameters(self.model)
        self.sequence = self.cp.sequence(self.config.context, mask=parse_mask(self.config.mask))

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def is_finished(self) -> bool:
        """Whether every step has been taken."""
        return self.step >= self.config.steps

    def _model_and_optimizer(self) -> tuple[PreTrainedModel, Optimizer]:
        plan, config = self.plan, self.config
        if plan.checkpoint is None:
            vocabulary_size = self.tokenizer.vocabulary_size
            model = build_model(config.model, vocabulary_size=vocabulary_size, context=config.context, seed=config.seed)
        else:
            model = rebuild_model(Path(plan.checkpoint) / MODEL)
        torch.nn.Module.to(model, self.ranks.device)
        cast_parameters(model, getattr(torch, config.dtype))
        optimizer = Optimizer(model, weight_decay=config.weight_decay, gradient_clip=config.gradient_clip)
        if plan.checkpoint is not None:
            load_tensors(Path(plan.checkpoint) / MODEL, dict(optimizer.masters))
            moments = optimizer.moments()
            load_tensors(Path(plan.checkpoint) / OPTIMIZER, moments)
            optimizer.restore(moments, plan.first_step)
        model.train()
        return model, optimizer

    def take_step(self) -> StepRecord:
        """One optimizer step; the record's loss is the unsplit model's on every rank."""
        started = time.perf_counter()
        config, self.step = self.config, self.step + 1
        loss = self._loss(self.windows.starts(self.step))
        loss.backward()
        self.cp.sum_gradients(self.model)
        rate = learning_rate_at(self.step, peak=config.learning_rate or 0.0, warmup_steps=config.warmup_steps, steps=config.steps)
        norm = self.optimizer.step(rate)
        value, seconds = loss.item(), time.perf_counter() - started
        tokens = config.batch_size * config.context
        return StepRecord(
            step=self.step,
            loss=value,
            learning_rate=rate,
            gradient_norm=float(norm),
            tokens=self.step * tokens,
            tokens_per_second=tokens / seconds,
            seconds=seconds,
            ranks=self.ranks.num_ranks,
        )

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the held-out windows, the same on every rank and for every number of ranks."""
        self.model.eval()
        starts = validation_starts(self.plan.split, self.config.context, self.config.validation_tokens)
        losses = [self._loss([start]).item() for start in starts]
        self.model.train()
        return sum(losses) / len(losses)

    def _loss(self, starts: list[int]) -> Tensor:
        ids = read_windows(self.tokens, starts, self.config.context).to(self.ranks.device)
        batch = self.sequence.shard_batch({"input_ids": ids, "labels": ids})
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "ringspan_sequence")}
        logits = self.model(**inputs, use_cache=False).logits
        return self.sequence.loss(logits, batch["labels"])

    def save(self) -> Path:
        """Writes a checkpoint from rank 0; every rank returns once it is there, or raises what kept it from being.

        Raises:
            RingspanError: also where the ranks' weights differ, since then none of them is the unsplit model's.
        """
        self.ranks.require_equal(sum(float(master.detach().double().sum()) for master in self.optimizer.masters.values()), "weights")
        return self.ranks.on_first(self._save)

    def _save(self) -> Path:
        return save_checkpoint(
            self.plan.files.checkpoints,
            TrainingState(step=self.step, tokens_digest=self.plan.tokens.digest),
            model=self.model,
            weights=self.optimizer.masters,
            moments=self.optimizer.moments(),
            extra_files=self.tokenizer.files(),
            keep=self.config.keep_checkpoints,
        )

    def write_sample(self) -> tuple[str, str]:
        """A prompt and what the model makes of it; the prompt is from the held-out text's beginning unless the user gave one."""
        config = self.config
        prompt = self.tokenizer.encode(config.prompt or self._held_out_lines())
        ids = sample(self.model, prompt, num_tokens=config.sample_tokens, temperature=config.temperature, seed=config.seed + self.step)
        return self.tokenizer.decode(prompt), self.tokenizer.decode(ids)

    def _held_out_lines(self) -> str:
        """From the first line that begins in the held-out text to some place in a later one, so that there is something to go on with."""
        start = self.plan.split.num_training
        text = self.tokenizer.decode([int(token) for token in self.tokens[start : start + _PROMPT_TOKENS]])
        return text[text.find("\n") + 1 :] or text
