"""The training loop: one, visible, used by notebooks, benchmarks and tuning alike.

`Trainer.steps()` yields one `StepStats` per optimiser step; `fit` drives it. Precision, compilation and other
processes that train along (`distributed`) wrap the model here and do not enter it.

A run killed at any moment goes on from its last checkpoint to the same bits on a CPU: batches depend on
(seed, epoch, step) alone, and a checkpoint holds weights, optimiser, scaler and the generator of dropout.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reclib import checkpoint, distributed, hardware
from reclib.batching import Batch, Epoch, Totals, prefetch
from reclib.checkpoint import load_unique, refuse_other, unique_tensors
from reclib.config import InputError, TrainConfig
from reclib.data import Histories
from reclib.hardware import Device
from reclib.ilora import AdaptedModel
from reclib.model import Bert4Rec
from reclib.objective import batch_loss
from reclib.sinks import attach, detach, sink_of

CHECK_EVERY = 20  # steps between looks at the loss on CUDA, where each look waits for the device


@dataclass(frozen=True)
class StepStats:
    """What one optimiser step did. Reading `loss` or `grad_norm` waits for the device."""

    step: int  # from 1
    epoch: int  # from 0
    learning_rate: float
    loss_tensor: Tensor
    norm_tensor: Tensor | None
    num_sequences: int
    num_tokens: int  # real items
    num_targets: int
    row_tokens: int  # places in this process's rows, used or not
    target_slots: int  # places in its head, used or not
    fetch_seconds: float  # waiting for the batch
    skipped: bool  # fp16 overflow: the scaler left the weights as they were

    @property
    def loss(self) -> float:
        """Mean cross-entropy over the step's targets, nats."""
        return float(self.loss_tensor)

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm before clipping; None without clipping."""
        return None if self.norm_tensor is None else float(self.norm_tensor)


@dataclass
class Progress:
    """What a run has reached; saved with every checkpoint."""

    processes: int = 1  # that train together
    backend: str = ""  # that joins them: gloo or nccl
    step: int = 0
    skipped_steps: int = 0
    train_seconds: float = 0.0
    tokens: int = 0
    loss_sum: float = 0.0  # since the last evaluation, over targets
    loss_targets: int = 0
    best_value: float = -math.inf
    best_epoch: int = -1
    stale_evaluations: int = 0
    done: bool = False
    history: list[dict[str, float]] = field(default_factory=list)  # one row per evaluation


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the rate of step 1..total_steps: linear warm-up, then a cosine to `lr_final_share`."""
    warmup = min(config.lr_warmup_steps, total_steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    share = (step - warmup) / max(1, total_steps - warmup)
    low = config.lr_final_share
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share)))


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; biases and norms are not decayed.

    The gate of an adapted model has a group of its own, with a share of the rate that its adapter states.
    """
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    adapted = model if isinstance(model, AdaptedModel) else None
    gates = [trained.pop(id(p)) for p in adapted.gates.parameters() if p.requires_grad] if adapted else []
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if adapted and adapted.active and gates:
        share = adapted.configs[adapted.active].gate_learning_rate
        groups.append({"params": gates, "weight_decay": config.weight_decay, "rate_share": share})
    fused = config.optimizer == "fused"
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused, foreach=False)


def clip_gradients(
    parameters: Sequence[Tensor],
    max_norm: float,
    divide_later: torch.optim.Optimizer | None = None,
) -> Tensor:
    """Scale gradients to a global norm of at most `max_norm`; return the norm before.

    `divide_later` is a fused optimiser that is to divide them as it reads them, as it does for a gradient
    scaler: on a CPU a pass of its own over the gradients costs as much as their norm.
    """
    grads = [
        p.grad if (sink := sink_of(p)) is None else sink.for_norm() for p in parameters if p.grad is not None
    ]
    norm = torch.nn.utils.get_total_norm(grads)
    if divide_later is not None:
        divide_later.grad_scale = (norm / max_norm).clamp_min(1.0)  # type: ignore[attr-defined]
    else:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class Trainer:
    """A model, its optimiser and where they stand in a run."""

    def __init__(
        self,
        model: Bert4Rec | AdaptedModel,
        histories: Histories,
        config: TrainConfig,
        device: Device,
        fingerprint: str,
        origin: dict[str, Any] | None = None,
    ) -> None:
        """Take what is trained, on what and where; `origin` says what weights it starts from, if not new."""
        if model.config.causal != (config.objective == "next_item"):
            raise InputError(
                f"objective={config.objective!r} does not go with causal={model.config.causal}: "
                "a causal model is trained with objective='next_item', and no other is"
            )
        self.model: Any = model  # of either kind: an adapted model has what is asked of a plain one
        self.histories, self.config, self.device = histories, config, device
        self.where = device.torch_device
        self.precision = hardware.choose_precision(config.precision, device.card)
        hardware.set_matmul_precision(self.precision)
        self.kept_memory = self.where.type == "cpu" and hardware.keep_freed_memory()
        self.compile_mode, self.compile_reason = hardware.compile_choice(
            config.compile_mode, device.card, hardware.has_compiler()
        )
        model.to(self.where)
        self.ranks = distributed.ranks()
        self.ranks.start(model, config)
        self.used: list[bool] = []  # which parameters get a gradient; known after a step of several processes
        self.encode: Callable[..., Tensor] = model.encode
        if self.compile_mode != "off":
            self.encode = torch.compile(model.encode, mode=self.compile_mode, dynamic=True)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        detach(self.parameters)
        self.sunk = attach(self._tables()) if self._can_sink() else []
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.where.type, enabled=self.precision.needs_scaler)
        self.progress = Progress(self.ranks.count, self.ranks.backend)
        self.fingerprint, self.origin = fingerprint, origin
        users = int((histories.ends - histories.starts > int(model.config.causal)).sum())
        self.steps_per_epoch = -(-users // config.batch_size)
        planned = self.steps_per_epoch * config.epochs
        self.total_steps = planned if config.max_steps is None else min(planned, config.max_steps)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context that forward passes run in."""
        dtype = self.precision.autocast_dtype
        return torch.autocast(self.where.type, dtype=dtype, enabled=dtype is not None)

    def batches(self) -> Iterator[tuple[int, list[Batch], Totals]]:
        """Yield (epoch, this process's micro-batches, the whole step's totals) of every step left."""
        step = self.progress.step
        while step < self.total_steps:
            epoch, first = divmod(step, self.steps_per_epoch)
            mine = (self.ranks.rank, self.ranks.count)
            plan = Epoch(self.histories, self.model.config, self.config, epoch, *mine)
            for i in range(first, min(plan.num_steps, first + self.total_steps - step)):
                yield epoch, *plan.counted(i, self.where)
            step = (epoch + 1) * self.steps_per_epoch

    def steps(self) -> Iterator[StepStats]:
        """Train to the end of the schedule, yielding after every optimiser step."""
        self.model.train()
        source = prefetch(self.batches())
        with contextlib.closing(source):
            clock = time.perf_counter()
            for epoch, micros, whole in source:
                fetch_seconds = time.perf_counter() - clock
                stats = self._step(epoch, micros, whole, fetch_seconds)
                self.progress.train_seconds += time.perf_counter() - clock
                yield stats
                clock = time.perf_counter()

    def _step(self, epoch: int, micros: list[Batch], whole: Totals, fetch_seconds: float) -> StepStats:
        """Forward, backward, sum over processes, unscale and clip, step, schedule."""
        self.progress.step += 1
        step, config = self.progress.step, self.config
        rate = learning_rate(step, self.total_steps, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_share", 1.0)
        denominator = whole.num_tokens if config.objective == "seed_focal" else whole.num_targets
        self.ranks.seed_step(config.seed, step)

        total = torch.zeros((), device=self.where)
        self._clear_gradients()
        for micro in micros:
            batch = micro.to(self.where)
            with self.autocast():
                loss = batch_loss(self.model, batch, config, denominator, self.encode)
            self.scaler.scale(loss).backward()
            total += loss.detach()

        for parameter, sink in self.sunk:
            parameter.grad = sink.finish()
        self.ranks.sum_gradients(self.parameters, total, self.used)
        self.scaler.unscale_(self.optimizer)
        norm = None
        if config.clip_norm is not None:
            own_pass = self.scaler.is_enabled() or config.optimizer != "fused"
            norm = clip_gradients(self.parameters, config.clip_norm, None if own_pass else self.optimizer)
        self._check_finite(step, total, norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.is_enabled() and self.scaler.get_scale() < scale
        self.progress.skipped_steps += int(skipped)
        self.progress.tokens += whole.num_tokens
        return StepStats(
            step=step,
            epoch=epoch,
            learning_rate=rate,
            loss_tensor=total,
            norm_tensor=norm,
            num_sequences=whole.num_sequences,
            num_tokens=whole.num_tokens,
            num_targets=whole.num_targets,
            row_tokens=sum(batch.items.numel() for batch in micros),
            target_slots=sum(batch.targets.numel() for batch in micros),
            fetch_seconds=fetch_seconds,
            skipped=skipped,
        )

    def _can_sink(self) -> bool:
        """Whether the tables' gradients can have one place each: eager, full precision, on a CPU."""
        config = self.config
        plain = config.objective != "seed_focal" and config.head_rows == "targets"
        eager = self.where.type == "cpu" and self.compile_mode == "off"
        full = self.precision.autocast_dtype is None
        return plain and eager and full and config.loss in ("auto", "inplace")

    def _tables(self) -> list[torch.nn.Parameter]:
        tables = {id(p) for p in (self.model.item_table.weight, self.model.output_weight)}
        return [p for p in self.parameters if id(p) in tables]

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        for _, sink in self.sunk:
            sink.start()

    def _check_finite(self, step: int, loss: Tensor, norm: Tensor | None) -> None:
        """Stop on a loss or norm that is not finite, before it reaches the weights.

        With fp16 a norm that overflows is the scaler's business, and so is a loss while it still can shrink
        its scale.
        """
        if self.where.type == "cuda" and step % CHECK_EVERY:
            return
        wrong = {} if bool(loss.isfinite()) else {"loss": float(loss)}
        if norm is not None and not bool(norm.isfinite()):
            wrong["gradient norm"] = float(norm)
        if wrong and not (self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            raise self.diverged(step, wrong)

    def diverged(self, step: int, wrong: dict[str, float]) -> InputError:
        """Return the error that says at which step what was not finite."""
        said = ", ".join(f"{name} {value}" for name, value in wrong.items())
        return InputError(
            f"training diverged at step {step}: {said} in {self.precision.name}; the last checkpoint is "
            "kept: lower learning_rate or clip_norm, or train in fp32"
        )

    # -- checkpoints ---------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint must agree on to be continued."""
        train = asdict(self.config)
        train.pop("checkpoint_seconds")
        said = {"model": asdict(self.model.config), "train": train, "data": self.fingerprint}
        return said if self.origin is None else said | {"origin": self.origin}

    def save(self, folder: Path) -> None:
        """Write a checkpoint of the present step and drop all but the newest two."""
        tensors = {f"model.{k}": v for k, v in unique_tensors(self.model, frozen=False).items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.where.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.where)
        state = {"identity": self.identity(), "progress": asdict(self.progress)}
        state["scaler"] = self.scaler.state_dict()
        checkpoint.save(folder, f"step-{self.progress.step}", tensors, state)
        checkpoint.prune(folder)

    def resume(self, folder: Path) -> bool:
        """Go on from the newest checkpoint in `folder`; return whether there was one.

        Raises `InputError` if it is damaged or belongs to another configuration, dataset or, unless it is
        finished, number of processes: sums of gradients and dropout would not be what they were.
        """
        found = checkpoint.latest(folder)
        if found is None:
            return False
        tensors, state = checkpoint.load(found)
        refuse_other(state["identity"], self.identity(), folder)
        progress = Progress(**state["progress"])
        if not progress.done:
            distributed.refuse_other_count(progress.processes, self.ranks.count, folder)
        load_unique(self.model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                optimizer["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.progress = progress
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and self.where.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], self.where)
        return True
