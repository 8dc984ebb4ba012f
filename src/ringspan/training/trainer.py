"""Model, optimizer and data of one rank, and what one step does with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ringspan.geometry import parse_mask
from ringspan.training.batches import Pass, deal, rows_of
from ringspan.training.checkpoint import MODEL, STATE, TENSORS, Snapshot, TrainingState, generation_config, load_weights, read_state
from ringspan.training.config import BYTES
from ringspan.training.flops import count_flops, peak_flops
from ringspan.training.guard import Guard
from ringspan.training.lora import add_adapters, weights_digest
from ringspan.training.measure import Cost, Meter
from ringspan.training.metrics import StepRecord
from ringspan.training.model import PRESETS, build_model, cast_parameters, empty_model, rebuild_model
from ringspan.training.optimizer import Optimizer, learning_rate_at
from ringspan.training.plan import Plan
from ringspan.training.ranks import Ranks
from ringspan.training.sample import sample
from ringspan.training.saver import Saver
from ringspan.training.spread import make_mesh, num_replicas, part_of, replica_of, shards_parameters, spread
from ringspan.training.tensors import bits_sum, load_tensors, share_tensors
from ringspan.training.tokenizer import load_tokenizer
from ringspan.training.tokens import Windows, validation_starts
from ringspan.training.validation import HeldOut, parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPT_TOKENS = 256


class _Built(NamedTuple):
    """`shared`: by name what rank 0 shares with the others, of which they have none; None where nothing is shared."""

    model: PreTrainedModel
    num_parameters: int
    is_sharded: bool
    shared: dict[str, torch.Tensor] | None


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
        # Read now: the checkpoint that it lies in may be gone when the next is written.
        first = [] if config.model in PRESETS else [Path(config.model)]
        self._generation = generation_config(first if plan.checkpoint is None else [Path(plan.checkpoint) / MODEL, *first])
        self._adapter: Any = None
        self._base_digest: str | None = None
        self.model, self.num_parameters, self.is_sharded, shared = self._build()
        self.flops = count_flops(self.model, self.model.config)
        unrounded: dict[str, torch.Tensor] = {}
        if not self.is_sharded:
            torch.nn.Module.to(self.model, ranks.device)
            if config.dtype != "float32" and plan.checkpoint is None:
                unrounded = {name: each.data for name, each in self.model.named_parameters() if each.requires_grad}
            cast_parameters(self.model, getattr(torch, config.dtype))
        mesh = make_mesh(config, ranks.device)
        self.replica, self._part = replica_of(mesh), part_of(mesh, sharded=self.is_sharded)
        self.parallel = spread(self.model, config, mesh, sharded=self.is_sharded)
        if shared is not None:
            share_tensors(shared, self.model.state_dict(), ranks.device)
        del shared
        self.optimizer = Optimizer(
            self.model,
            weight_decay=config.weight_decay,
            gradient_clip=config.gradient_clip,
            kind=config.optimizer,
            gather=ranks.gather,
            unrounded=unrounded,
        )
        del unrounded
        if plan.checkpoint is not None:
            self._restore(Path(plan.checkpoint))
        self.model.train()
        self.meter = Meter(ranks)
        self.meter.watch(self.model, self.parallel.context)
        self.saver = Saver(plan.files.checkpoints, keep=config.keep_checkpoints, group=ranks.saving)
        self.device_name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
        self.peak_flops = peak_flops(self.device_name, config.dtype)

    @property
    def is_finished(self) -> bool:
        """Whether every step has been taken."""
        return self.step >= self.config.steps

    def _build(self) -> _Built:
        """The model on the CPU. Its first weights are the same on every rank; where a checkpoint has them, or rank 0, any numbers."""
        plan, config, ranks = self.plan, self.config, self.ranks
        if plan.checkpoint is not None and not config.lora_rank:
            return self._built(rebuild_model(Path(plan.checkpoint) / MODEL))
        if config.lora_rank or ranks.num_ranks == 1:
            model = self._first_model()
        else:
            # Rank 0 alone reads what will be sharded: else the host would hold the whole model once a rank.
            read: list[PreTrainedModel] = []
            described = ranks.on_first(lambda: (read.append(self._first_model()), read[0].config)[1])
            built = self._built(read[0] if read else empty_model(described, config.model))
            if built.is_sharded:
                return built._replace(shared=read[0].state_dict() if read else {})
            model = read[0] if read else self._first_model()
        ranks.require_equal(bits_sum(dict(model.named_parameters())), "first weights")
        return self._built(model)

    def _built(self, model: PreTrainedModel) -> _Built:
        size = sum(parameter.numel() for parameter in model.parameters())
        return _Built(model, size, shards_parameters(self.config, size), None)

    def _first_model(self) -> PreTrainedModel:
        """The model with its first weights, and adapters where they are trained."""
        config = self.config
        model = build_model(
            config.model,
            vocabulary_size=self.tokenizer.vocabulary_size,
            context=config.context,
            seed=config.seed,
            rope_scaling=config.rope_scaling,
            rope_factor=config.rope_factor,
        )
        # Programs that serve models look for the class there; transformers itself would write it with the weights.
        model.config.architectures = [type(model).__name__]
        if config.lora_rank:
            self._adapter = add_adapters(
                model,
                base=config.model,
                rank=config.lora_rank,
                alpha=config.lora_alpha or 2 * config.lora_rank,
                targets=config.lora_targets,
                seed=config.seed,
            )
            digest = self.ranks.on_first(lambda: weights_digest(Path(config.model)))
            self._base_digest = digest if self.ranks.is_first else None
        return model

    def _restore(self, checkpoint: Path) -> None:
        state = read_state(checkpoint / STATE)
        load_weights(checkpoint, {**self.optimizer.masters, **self._buffers()})
        moments = self.optimizer.moments()
        load_tensors(checkpoint / TENSORS, moments)
        self.optimizer.restore(moments, self.step if state.updates is None else state.updates)
        self.guard.restore(state.recent_losses, state.skips_in_a_row)

    def spread_notes(self) -> list[str]:
        """How the model is spread, where that is not plain, and why."""
        notes = []
        if self.is_sharded:
            place = "host memory" if self.config.parameters_on_host else "each rank's memory"
            notes.append(f"parameters, gradients and optimizer are sharded, in {place}")
        if (chosen := self.parallel.chosen).rematerialise not in ("none", "selective"):
            notes.append(f"rematerialisation: {chosen.rematerialise}{' with offload' if chosen.offload else ''} ({chosen.reason})")
        if self.config.sample_tokens and self.config.tensor > 1:
            notes.append("no text is sampled: it is written by a model whose layers are whole on a rank")
        return notes

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
        hands = self._deal(self.windows.starts(self.step), config.batch_size)
        loss = torch.zeros((), device=self.ranks.device)
        for part in parts_of(self.parallel, hands[self.replica], self.ranks.device):
            share = self.parallel.loss(part)
            share.backward()
            self.optimizer.collect()
            loss += share.detach()
        self.parallel.sum_gradients(self.optimizer.masters.values())  # type: ignore[arg-type]  # in float32, whatever the model's dtype
        norm = self.optimizer.gradient_norm()
        value = loss.item()
        rate = learning_rate_at(
            self.step,
            peak=config.learning_rate or 0.0,
            warmup_steps=config.warmup_steps,
            steps=config.steps,
            schedule=config.schedule,
            final_rate=config.final_rate,
        )
        skipped = self.guard.judge(self.step, value, float(norm))
        if skipped is None:
            self.optimizer.step(rate, norm)
        else:
            self.optimizer.discard()
        return self._record([each for hand in hands for each in hand], value, float(norm), rate, skipped, self.meter.stop())

    def _record(self, passes: list[Pass], loss: float, norm: float, rate: float, skipped: str | None, cost: Cost) -> StepRecord:
        config, num_ranks = self.config, self.ranks.num_ranks
        tokens = config.batch_size * config.accumulate * config.context
        flops = (
            self.flops
            and self.flops.of_rows([(each.mask, len(each.ids)) for each in passes if not each.is_blank], config.context) / cost.seconds
        )
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

    def validate(self) -> float:
        """Mean loss over the held-out windows, the same on every rank and for every number of ranks."""
        return self._held_out().loss()

    def validate_by_position(self) -> list[tuple[int, int, float]]:
        """The same loss for ranges of positions, see `HeldOut.by_position`."""
        return self._held_out().by_position()

    def validate_by_context(self) -> list[tuple[int, float]] | None:
        """The loss of the same tokens given less or more before them, see `HeldOut.by_context`."""
        return self._held_out().by_context()

    def _held_out(self) -> HeldOut:
        starts = validation_starts(self.plan.split, self.config.context, self.config.validation_tokens)
        return HeldOut(self.parallel, self._deal(starts, batch_size=1)[self.replica], self.ranks.device)

    def _deal(self, starts: list[int], batch_size: int) -> list[list[Pass]]:
        """The passes of every replica over the rows that begin at `starts`."""
        rows, replicas = rows_of(starts, self.tokens, self.config.context), num_replicas(self.config)
        return deal(rows, num_replicas=replicas, batch_size=batch_size, mask=self.mask, separator=self.separator)

    @property
    def separator(self) -> int | None:
        """The token that ends a document, where documents are kept apart."""
        return self.plan.tokens.separator if self.config.documents == "packed" else None

    def begin_save(self) -> None:
        """Begins to write a checkpoint, every rank its part, while all train on; awaits the one before.

        Raises:
            RingspanError: on every rank, where the one before could not be written, or where ranks differ that hold the same weights, since
                then none of them is the unsplit model's.
        """
        self.ranks.require_equal(bits_sum(self.optimizer.masters), "weights", among=self._part)
        self.finish_save()
        self.saver.begin(self._snapshot())

    def finish_save(self) -> None:
        """Returns once the last checkpoint is whole.

        Raises:
            RingspanError: on every rank, what kept it from being written.
        """
        self.ranks.on_first(self.saver.finish)
        self.saver.finish()

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
            weights={**self.optimizer.masters, **self._buffers()},
            moments=self.optimizer.moments(),
            extra_files=self.tokenizer.files(),
            generation=self._generation,
            adapter=self._adapter,
        )

    def _buffers(self) -> dict[str, torch.Tensor]:
        """What the model keeps besides its parameters, such as the biases by which experts are chosen; of adapters the base has it."""
        if self.config.lora_rank:
            return {}
        return {
            f"{path}.{name}".lstrip("."): buffer
            for path, module in self.model.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }

    def write_sample(self) -> tuple[str, str]:
        """A prompt and what the model makes of it, on every rank; the prompt is the held-out text's beginning unless the user gave one."""
        config = self.config
        prompt = self.tokenizer.encode(config.prompt or self._held_out_lines())
        ids = sample(
            self.model,
            prompt,
            num_tokens=config.sample_tokens,
            temperature=config.temperature,
            seed=config.seed + self.step,
            device=self.ranks.device,
        )
        return self.tokenizer.decode(prompt), self.tokenizer.decode(ids)

    def _held_out_lines(self) -> str:
        """From the first line that begins in the held-out text to some place in a later one, so that there is something to go on with."""
        start = self.plan.split.num_training
        text = self.tokenizer.decode([int(token) for token in self.tokens[start : start + _PROMPT_TOKENS]])
        return text[text.find("\n") + 1 :] or text
