"""Model, optimizer and data of one rank, and what one step does with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringspan.attention import ContextParallel
from ringspan.geometry import parse_mask
from ringspan.training.batches import Pass, cut_into_passes, rows_of
from ringspan.training.checkpoint import MODEL, OPTIMIZER, STATE, Snapshot, TrainingState, load_tensors, read_state
from ringspan.training.config import BYTES
from ringspan.training.flops import count_flops, peak_flops
from ringspan.training.guard import Guard
from ringspan.training.lora import ADAPTER, add_adapters, by_peft_name, weights_digest
from ringspan.training.measure import Cost, Meter
from ringspan.training.metrics import StepRecord
from ringspan.training.model import build_model, cast_parameters, rebuild_model
from ringspan.training.optimizer import Optimizer, learning_rate_at
from ringspan.training.plan import Plan
from ringspan.training.ranks import Ranks
from ringspan.training.sample import sample
from ringspan.training.saver import Saver
from ringspan.training.tokenizer import load_tokenizer
from ringspan.training.tokens import Windows, validation_starts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPT_TOKENS = 256


class Trainer:
    """Model, optimizer and data of one rank, and what a step does with them."""

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        self.plan, self.config, self.ranks = plan, plan.config, ranks
        config = plan.config
        self.tokenizer = load_tokenizer(config.tokenizer or BYTES)
        self.tokens = plan.tokens.open()
        self.mask = parse_mask(config.mask)
        self.windows = Windows(
            num_tokens=plan.split.num_training,
            context=config.context,
            batch_size=config.batch_size * config.accumulate,
            seed=config.seed,
        )
        self.step = plan.first_step
        self.guard = Guard(
            on_nan=config.on_nan,
            on_spike=config.on_spike,
            spike_factor=config.spike_factor,
            spike_window=config.spike_window,
            out=config.out,
        )
        self._adapter, self._base_digest = None, None
        self.model, self.optimizer = self._model_and_optimizer()
        self.cp = ContextParallel(strategy=config.strategy, layout=config.layout, kernel=config.kernel)
        self.cp.broadcast_parameters(self.model)
        self.meter = Meter(ranks)
        self.meter.watch(self.model, self.cp)
        self.saver = Saver(plan.files.checkpoints, keep=config.keep_checkpoints)
        self.flops = count_flops(self.model, self.model.config)
        self.device_name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
        self.peak_flops = peak_flops(self.device_name, config.dtype)

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
        if plan.checkpoint is None or config.lora_rank:
            vocabulary_size = self.tokenizer.vocabulary_size
            model = build_model(
                config.model,
                vocabulary_size=vocabulary_size,
                context=config.context,
                seed=config.seed,
                rope_scaling=config.rope_scaling,
                rope_factor=config.rope_factor,
            )
        else:
            model = rebuild_model(Path(plan.checkpoint) / MODEL)
        # Programs that serve models look for the class there; transformers itself would write it with the weights.
        model.config.architectures = [type(model).__name__]
        torch.nn.Module.to(model, self.ranks.device)
        if config.lora_rank:
            self._adapter = add_adapters(
                model,
                base=config.model,
                rank=config.lora_rank,
                alpha=config.lora_alpha or 2 * config.lora_rank,
                targets=config.lora_targets,
                seed=config.seed,
            )
            self._base_digest = weights_digest(Path(config.model)) if self.ranks.is_first else None
        cast_parameters(model, getattr(torch, config.dtype))
        optimizer = Optimizer(model, weight_decay=config.weight_decay, gradient_clip=config.gradient_clip, kind=config.optimizer)
        if plan.checkpoint is not None:
            folder = Path(plan.checkpoint)
            state = read_state(folder / STATE)
            if config.lora_rank:
                load_tensors(folder / ADAPTER, by_peft_name(optimizer.masters))
            else:
                load_tensors(folder / MODEL, optimizer.masters)
            moments = optimizer.moments()
            load_tensors(folder / OPTIMIZER, moments)
            optimizer.restore(moments, plan.first_step if state.updates is None else state.updates)
            self.guard.restore(state.recent_losses, state.skips_in_a_row)
        model.train()
        return model, optimizer

    def notes(self) -> list[str]:
        """What is expected of a run, on GPUs in part, and will not be measured, with the reason."""
        notes = [] if self.meter.blind is None else [f"shares of the time are not logged: {self.meter.blind}"]
        if self.ranks.device.type != "cuda":
            return notes
        if self.flops is None:
            notes.append("model FLOP/s and MFU are not logged: which weights a token passes cannot be told from this model's layers")
        elif self.peak_flops is None:
            notes.append(f"MFU is not logged: no peak is known for {self.device_name} in {self.config.dtype}")
        if not self.meter.counts_energy:
            notes.append("joules per token are not logged: NVML does not answer (it needs the package nvidia-ml-py)")
        return notes

    def take_step(self) -> StepRecord:
        """One optimizer step; the record's loss is the unsplit model's on every rank.

        Raises:
            RingspanError: on every rank, where `--on-nan` or `--on-spike` ends the run; the update has not been made then.
        """
        self.meter.start()
        config, self.step = self.config, self.step + 1
        passes = self._passes(self.windows.starts(self.step))
        loss = torch.zeros((), device=self.ranks.device)
        for each in passes:
            share = self._loss(each) * each.weight
            share.backward()
            self.optimizer.collect()
            loss += share.detach()
        self.cp.sum_gradients(self.optimizer.masters.values())  # type: ignore[arg-type]  # in float32, whatever the model's dtype
        value, norm = loss.item(), float(self.optimizer.gradient_norm())
        rate = learning_rate_at(
            self.step,
            peak=config.learning_rate or 0.0,
            warmup_steps=config.warmup_steps,
            steps=config.steps,
            schedule=config.schedule,
            final_rate=config.final_rate,
        )
        skipped = self.guard.judge(self.step, value, norm)
        if skipped is None:
            self.optimizer.step(rate)
        else:
            self.optimizer.discard()
        return self._record(passes, value, norm, rate, skipped, self.meter.stop())

    def _record(self, passes: list[Pass], loss: float, norm: float, rate: float, skipped: str | None, cost: Cost) -> StepRecord:
        config, num_ranks = self.config, self.ranks.num_ranks
        tokens = config.batch_size * config.accumulate * config.context
        flops = self.flops and self.flops.of_rows([(each.mask, len(each.ids)) for each in passes], config.context) / cost.seconds
        return StepRecord(
            step=self.step,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=self.step * tokens,
            tokens_per_second=tokens / cost.seconds,
            seconds=cost.seconds,
            ranks=num_ranks,
            skipped=skipped,
            model_tflops_per_second=None if flops is None else flops / 1e12,
            mfu=None if flops is None or self.peak_flops is None else flops / (num_ranks * self.peak_flops),
            peak_memory_bytes=cost.peak_memory_bytes,
            reserved_memory_bytes=cost.reserved_memory_bytes,
            joules_per_token=None if cost.joules is None else cost.joules / tokens,
            attention_share=cost.shares and cost.shares.attention,
            feed_forward_share=cost.shares and cost.shares.feed_forward,
            communication_share=cost.shares and cost.shares.communication,
        )

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the held-out windows, the same on every rank and for every number of ranks."""
        self.model.eval()
        starts = validation_starts(self.plan.split, self.config.context, self.config.validation_tokens)
        loss = sum(self._loss(each).item() * each.weight for each in self._passes(starts, batch_size=1))
        self.model.train()
        return loss

    def _passes(self, starts: list[int], batch_size: int | None = None) -> list[Pass]:
        rows = rows_of(starts, self.tokens, self.config.context).to(self.ranks.device)
        return cut_into_passes(rows, batch_size=batch_size or self.config.batch_size, mask=self.mask, separator=self.separator)

    @property
    def separator(self) -> int | None:
        """The token that ends a document, where documents are kept apart."""
        return self.plan.tokens.separator if self.config.documents == "packed" else None

    def _loss(self, whole: Pass) -> Tensor:
        sequence = self.cp.sequence(self.config.context, mask=whole.mask)
        batch = sequence.shard_batch(whole.tensors())
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "ringspan_sequence")}
        logits = self.model(**inputs, use_cache=False).logits
        return sequence.loss(logits, batch["labels"])

    def begin_save(self) -> None:
        """Begins to write a checkpoint from rank 0, while every rank trains on; awaits the one before.

        Raises:
            RingspanError: on every rank, where the one before could not be written, or where the ranks' weights differ, since then none
                of them is the unsplit model's.
        """
        self.ranks.require_equal(sum(float(master.detach().double().sum()) for master in self.optimizer.masters.values()), "weights")
        self.ranks.on_first(lambda: self.saver.begin(self._snapshot()))

    def finish_save(self) -> None:
        """Returns once the last checkpoint is whole.

        Raises:
            RingspanError: on every rank, what kept it from being written.
        """
        self.ranks.on_first(self.saver.finish)

    def _snapshot(self) -> Snapshot:
        state = TrainingState(
            step=self.step,
            tokens_digest=self.plan.tokens.digest,
            updates=self.optimizer.updates,
            recent_losses=self.guard.losses,
            skips_in_a_row=self.guard.skips_in_a_row,
            base_digest=self._base_digest,
        )
        return Snapshot(
            state=state,
            config=self.model.config,
            weights=self.optimizer.masters,
            moments=self.optimizer.moments(),
            extra_files=self.tokenizer.files(),
            adapter=self._adapter,
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
