"""The training loop, used by notebooks, benchmarks and tuning.

`Trainer.steps()` yields one `StepStats` per optimiser step; `fit` drives it. Precision, compilation and data
parallelism (`distributed`) are handled here, outside of the model. So are whole steps as CUDA graphs
(`StepGraphs`), which launch fewer operators on a GPU.

A killed run resumes from its last checkpoint with the same bits on a CPU: batches depend on (seed, epoch,
step) alone, and a checkpoint holds weights, optimiser, scaler and the state of the random generator.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from reclib import hardware
from reclib.config import InputError, ModelConfig, TrainConfig, as_dict
from reclib.cost import work
from reclib.data.batches import Batch, Epoch, Totals, prefetch
from reclib.data.dataset import Histories
from reclib.hardware import Device
from reclib.model.bert4rec import Sink
from reclib.model.ilora import SequenceModel
from reclib.train import distributed, losses, saving
from reclib.train.losses import Route, batch_loss
from reclib.train.saving import load_unique, refuse_other, unique_tensors

M = TypeVar("M", bound=SequenceModel)

CHECK_EVERY = 20  # steps between checks of the loss on CUDA, where each check waits for the device
MOST_GRAPHS = 64  # CUDA graphs of a run, one per shape of batches; steps of further shapes run without

# (batch, targets of the step) -> loss, norm
Compute = Callable[[Batch, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class StepStats:
    """Statistics of one optimiser step. Reading `loss`, `grad_norm` or `skipped` waits for the device."""

    step: int  # from 1
    epoch: int  # from 0
    learning_rate: float
    loss_tensor: Tensor
    norm_tensor: Tensor | None
    num_sequences: int
    num_tokens: int  # real items
    num_targets: int
    row_tokens: int  # places in this process's rows, padding included
    target_slots: int  # places in its head, padding included
    fetch_seconds: float  # waiting for the batch
    skip_tensor: Tensor | None = None  # fp16 only

    @property
    def skipped(self) -> bool:
        """Whether fp16 overflowed and the scaler skipped the update."""
        return self.skip_tensor is not None and bool(self.skip_tensor)

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
    """The progress of a run; saved with every checkpoint."""

    processes: int = 1  # number of data-parallel processes
    backend: str = ""  # of their communication: gloo or nccl
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


class Several:
    """Several optimisers with disjoint parameters as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Step each part."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all parameters, numbered across parts."""
        states: dict[int, Any] = {}
        for first, part in self._numbered():
            states |= {first + index: state for index, state in part.state_dict()["state"].items()}
        return {"state": states}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load the states that `state_dict` returned."""
        for first, part in self._numbered():
            state = part.state_dict()
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            state["state"] = {n: saved["state"][first + n] for n in numbers if first + n in saved["state"]}
            part.load_state_dict(state)

    def _numbered(self) -> Iterator[tuple[int, torch.optim.Optimizer]]:
        first = 0
        for part in self.parts:
            yield first, part
            first += sum(len(group["params"]) for group in part.param_groups)


def make_optimizer(model: SequenceModel, config: TrainConfig) -> Any:
    """Return AdamW over the trained parameters; biases and norms are not decayed.

    With optimizer=muon the encoder's matrices use Muon instead (Jordan et al. 2024), with steps scaled to the
    size of AdamW's, so that both share a learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2). Item
    tables, positions, biases and norms use AdamW.
    """
    (main, _), *others = model.parameter_groups()
    decay, matrices = config.weight_decay, []
    if config.optimizer == "muon":
        if not model.plain:
            raise InputError("optimizer='muon' is for a model that is trained whole, not for an adapted one")
        parts = ("blocks.", "transform.linear.")
        named = [p for name, p in model.named_parameters() if name.startswith(parts)]
        matrices = [p for p in named if p.requires_grad and p.dim() == 2]
        matrix_ids = {id(p) for p in matrices}
        main = [p for p in main if id(p) not in matrix_ids]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in main if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in main if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups += [{"params": part, "weight_decay": decay, "rate_share": share} for part, share in others]
    rate = config.learning_rate
    adam = torch.optim.AdamW(groups, lr=rate, fused=config.optimizer != "loop", foreach=False)
    if not matrices:
        return adam
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return Several(adam, muon)


def clip_gradients(
    parameters: Sequence[torch.nn.Parameter],
    max_norm: float,
    divide_later: torch.optim.Optimizer | None = None,
    sinks: Mapping[torch.nn.Parameter, Sink] | None = None,
) -> Tensor:
    """Scale gradients to a global norm of at most `max_norm`; return the norm before clipping.

    `divide_later` is a fused optimiser that divides the gradients when it reads them.
    """
    sinks = sinks or {}
    grads = [sinks[p].for_norm() if p in sinks else p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if divide_later is not None:
        # The attribute that torch's GradScaler sets for a fused optimiser. On a CPU a separate pass over the
        # gradients would cost as much as their norm.
        divide_later.grad_scale = (norm / max_norm).clamp_min(1.0)  # type: ignore[attr-defined]
    else:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def captured(compute: Callable[[], Any], pool: Any) -> Callable[[], Any]:
    """Capture `compute` as a CUDA graph; return a function that replays it and returns its results."""
    graph = torch.cuda.CUDAGraph()
    # thread_local, since the thread that prepares batches pins memory at the same time
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        results = compute()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


class StepGraphs:
    """Optimiser steps as CUDA graphs: one launch for all operators of a step, instead of some hundreds.

    A graph belongs to one shape of batches. The first batch of a shape runs eagerly, which also initialises
    kernels and the optimiser's state; the second is captured; later ones are copied to the inputs of the
    graph. Graphs share a memory pool, since only one runs at a time and nothing in it outlives a step. Use
    few `bucket_steps` to get few shapes.
    """

    def __init__(self, compute: Compute, where: torch.device, capture: Callable[..., Any] = captured) -> None:
        self.compute, self.where, self.capture = compute, where, capture
        self.graphs: dict[tuple[Any, ...], tuple[list[Tensor], Callable[[], Any]] | None] = {}
        self.pool = torch.cuda.graph_pool_handle() if where.type == "cuda" else None

    def run(self, batch: Batch, targets: float) -> tuple[Tensor, Tensor | None]:
        """Run the step of a batch on the host; return loss and norm."""
        batch = batch.to(self.where)
        inputs = [*batch.tensors().values(), torch.full((), float(targets), device=self.where)]
        key = tuple(value.shape for value in inputs)
        if key not in self.graphs:
            if len(self.graphs) < MOST_GRAPHS:
                self.graphs[key] = None
            return self.compute(batch, inputs[-1])
        if self.graphs[key] is None:
            self.graphs[key] = self._recorded(batch, inputs)
        buffers, replay = self.graphs[key]  # type: ignore[misc]
        for place, value in zip(buffers, inputs, strict=True):
            place.copy_(value)
        loss, norm = replay()
        return loss.clone(), None if norm is None else norm.clone()  # the next graph overwrites them

    def _recorded(self, batch: Batch, inputs: list[Tensor]) -> tuple[list[Tensor], Callable[[], Any]]:
        buffers = [value.clone() for value in inputs]
        tensors: dict[str, Any] = dict(zip(batch.tensors(), buffers, strict=False))  # the last one is no part
        fixed = batch._replace(**tensors)
        return buffers, self.capture(lambda: self.compute(fixed, buffers[-1]), self.pool)


def refuse_graphs(config: TrainConfig, precision: str, processes: int, adapted: bool) -> None:
    """Raise `InputError` if a whole step cannot be one CUDA graph."""
    wrong = {
        "precision=fp16, whose scaler may skip a step": precision == "fp16",
        f"optimizer={config.optimizer!r}": config.optimizer != "fused",
        "objective='seed_focal'": config.objective == "seed_focal",
        # On an H200 with torch 2.11 the compiler's first call for a shape broke the capture.
        "loss='fused'": config.loss == "fused",
        "micro-batches": config.micro_batch_size not in (None, config.batch_size),
        f"{processes} processes": processes > 1,
        "an adapted model": adapted,
    }
    if refused := " and no ".join(name for name, applies in wrong.items() if applies):
        raise InputError(f"compile_mode='graph' captures a whole step, which allows no {refused}")


def chosen_route(
    config: TrainConfig, model: ModelConfig, histories: Histories, card: hardware.Card, compiled: bool
) -> Route:
    """Return the route of a run's loss on a card, by its largest batch.

    With loss=auto the loss is compiled if the encoder is (`compiled`). `fused` is `plain` without a compiler.
    """
    slots = 0.0
    if config.loss == "auto" and card.type == "cuda":
        lengths = histories.lengths
        slots = work.largest_shapes(model, config, lengths[lengths > int(model.causal)]).slots
    how = losses.route(config.loss, card.type, int(slots), model.num_items, card.memory_bytes)
    if config.loss == "auto" and how == "plain" and compiled:
        return "fused"
    no_compiler = hardware.compile_choice("default", card, hardware.has_compiler())[0] == "off"
    return "plain" if how == "fused" and no_compiler else how


def compiled_encode(encode: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    """Return `encode` compiled with dynamic numbers of rows and queries; all other sizes are constants."""
    inner = torch.compile(encode, mode=mode)

    def call(
        items: Tensor, segment_ids: Tensor, positions: Tensor, query_index: Tensor | None = None
    ) -> Tensor:
        rows = (items, segment_ids, positions)
        for tensor in rows:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if query_index is not None:
            torch._dynamo.maybe_mark_dynamic(query_index, (0, 1))
        return inner(*rows, query_index)

    return call


class Trainer(Generic[M]):
    """A model, its optimiser and the progress of a run."""

    def __init__(
        self,
        model: M,
        histories: Histories,
        config: TrainConfig,
        device: Device,
        fingerprint: str,
        origin: dict[str, Any] | None = None,
    ) -> None:
        """Set up the training of `model` on a device; `origin` identifies the initial weights, if not new."""
        if model.config.causal != (config.objective == "next_item"):
            raise InputError(
                f"objective={config.objective!r} does not go with causal={model.config.causal}: "
                "a causal model is trained with objective='next_item', and no other is"
            )
        self.model = model
        self.histories, self.config, self.device = histories, config, device
        self.where = device.torch_device
        self.precision = hardware.choose_precision(config.precision, device.card)
        hardware.set_matmul_precision(self.precision)
        if self.where.type == "cpu":
            hardware.keep_freed_memory()
        self.compile_mode, self.compile_reason = hardware.compile_choice(
            config.compile_mode, device.card, hardware.has_compiler()
        )
        model.to(self.where)
        self.ranks = distributed.ranks()
        self.ranks.start(model, config)
        self.used: list[bool] = []  # which parameters get a gradient; set by the first data-parallel step
        graph, compiled = self.compile_mode == "graph", self.compile_mode not in ("off", "graph")
        if graph:
            refuse_graphs(config, self.precision.name, self.ranks.count, not model.plain)
        self.encode: Callable[..., Tensor] = model.encode
        if compiled:
            self.encode = compiled_encode(model.encode, self.compile_mode)
        self.route = chosen_route(config, model.config, histories, device.card, compiled)
        self.compiles = compiled or self.route == "fused"  # whether torch.compile makes any part of a step
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.sinks = model.use_sinks(self._can_sink())  # replaces those of an earlier run
        self.optimizer = make_optimizer(model, config)
        self.graphs = StepGraphs(self._captured_step, self.where) if graph else None
        for group in self.optimizer.param_groups if graph else ():
            group["lr"] = torch.tensor(config.learning_rate, device=self.where)  # read by the graph
            group["capturable"] = True
        self.skips = torch.zeros((), dtype=torch.int64, device=self.where)  # not in `progress` yet
        self.scaler = torch.amp.GradScaler(self.where.type, enabled=self.precision.needs_scaler)
        self.progress = Progress(self.ranks.count, self.ranks.backend)
        self.fingerprint, self.origin = fingerprint, origin
        users = int((histories.lengths > int(model.config.causal)).sum())
        self.steps_per_epoch = -(-users // config.batch_size)
        planned = self.steps_per_epoch * config.epochs
        self.total_steps = planned if config.max_steps is None else min(planned, config.max_steps)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context of forward passes."""
        dtype = self.precision.autocast_dtype
        return torch.autocast(self.where.type, dtype=dtype, enabled=dtype is not None)

    def batches(self) -> Iterator[tuple[int, list[Batch], Totals]]:
        """Yield (epoch, this process's micro-batches, the whole step's totals) of every remaining step."""
        step = self.progress.step
        while step < self.total_steps:
            epoch, first = divmod(step, self.steps_per_epoch)
            part = (self.ranks.rank, self.ranks.count)
            plan = Epoch(self.histories, self.model.config, self.config, epoch, *part, self.model.prior)
            for i in range(first, min(plan.num_steps, first + self.total_steps - step)):
                yield epoch, *plan.counted(i, self.where)
            step = (epoch + 1) * self.steps_per_epoch

    def steps(self) -> Iterator[StepStats]:
        """Train to the end of the schedule, yielding after every optimiser step."""
        self.model.train()
        source = prefetch(self.batches())
        with contextlib.closing(source):
            clock = time.perf_counter()
            for epoch, micros, totals in source:
                fetch_seconds = time.perf_counter() - clock
                stats = self._step(epoch, micros, totals, fetch_seconds)
                self.progress.train_seconds += time.perf_counter() - clock
                yield stats
                clock = time.perf_counter()
        self._count_skips()

    def _step(self, epoch: int, micros: list[Batch], totals: Totals, fetch_seconds: float) -> StepStats:
        """Forward, backward, sum over processes, unscale and clip, step, schedule."""
        self.progress.step += 1
        step, config = self.progress.step, self.config
        rate = learning_rate(step, self.total_steps, config)
        for group in self.optimizer.param_groups:
            group_rate = rate * group.get("rate_share", 1.0)  # an adapter's gate has its own share
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(group_rate)
            else:
                group["lr"] = group_rate
        # The targets of the whole step, so that the losses of micro-batches add up.
        denominator = totals.num_tokens if config.objective == "seed_focal" else totals.num_targets
        self.ranks.seed_step(config.seed, step)

        skipped = None
        if self.graphs is not None:
            total, norm = self.graphs.run(micros[0], denominator)
            self._check_finite(step, total, norm)
        else:
            total, norm = self._gradients((micro.to(self.where) for micro in micros), denominator)
            self._check_finite(step, total, norm)
            skipped = self._update()
        if self.where.type == "cpu" or step % CHECK_EVERY == 0:
            self._count_skips()
        self.progress.tokens += totals.num_tokens
        return StepStats(
            step=step,
            epoch=epoch,
            learning_rate=rate,
            loss_tensor=total,
            norm_tensor=norm,
            num_sequences=totals.num_sequences,
            num_tokens=totals.num_tokens,
            num_targets=totals.num_targets,
            row_tokens=sum(batch.items.numel() for batch in micros),
            target_slots=sum(batch.targets.numel() for batch in micros),
            fetch_seconds=fetch_seconds,
            skip_tensor=skipped,
        )

    def _gradients(
        self, batches: Iterable[Batch], denominator: float | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the step's gradients, summed over processes and clipped; return its loss and their norm."""
        config = self.config
        total = torch.zeros((), device=self.where)
        held: list[Tensor] = []
        for parameter in self.parameters:
            parameter.grad = None
        for sink in self.sinks.values():
            sink.start()
        for batch in batches:
            with self.autocast():
                loss = batch_loss(self.model, batch, config, denominator, self.encode, self.route, held)
            self.scaler.scale(loss).backward()
            held.clear()
            total += loss.detach()  # stays on the device

        for parameter, sink in self.sinks.items():
            parameter.grad = sink.finish()  # the same tensor in every step
        # Sum scaled gradients: all processes then see, and skip, an overflow in any of them.
        self.ranks.sum_gradients(self.parameters, total, self.used, self.sinks)
        self.scaler.unscale_(self.optimizer)
        norm = None
        if config.clip_norm is not None:
            # The scaler itself uses the divisor of the fused optimiser.
            separate_pass = self.scaler.is_enabled() or config.optimizer != "fused"
            divide_later = None if separate_pass else self.optimizer
            norm = clip_gradients(self.parameters, config.clip_norm, divide_later, self.sinks)
        return total, norm

    def _update(self) -> Tensor | None:
        """Step the optimiser; return for fp16 whether the step was skipped, as a tensor on the device."""
        if not self.scaler.is_enabled():
            self.optimizer.step()
            return None
        assert self.scaler._scale is not None
        before = self.scaler._scale.clone()  # `get_scale` would wait for the device
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler._scale < before
        self.skips += skipped.squeeze()
        return skipped

    def _captured_step(self, batch: Batch, denominator: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run gradients and update of one batch."""
        loss, norm = self._gradients([batch], denominator)
        self.optimizer.step()
        return loss, norm

    def _count_skips(self) -> None:
        """Add the steps skipped since the last call to the progress; waits for the device."""
        if self.scaler.is_enabled():
            self.progress.skipped_steps += int(self.skips)
            self.skips.zero_()

    def _can_sink(self) -> bool:
        """Whether gradient sinks can be used: eager, in full precision, on a CPU."""
        config = self.config
        plain = config.objective != "seed_focal" and config.head_rows == "targets"
        eager = self.where.type == "cpu" and self.compile_mode == "off"
        full = self.precision.autocast_dtype is None
        return plain and eager and full and config.loss in ("auto", "inplace")

    def _check_finite(self, step: int, loss: Tensor, norm: Tensor | None) -> None:
        """Raise `InputError` for a loss or norm that is not finite, before the update.

        With fp16 the scaler handles overflows as long as it can reduce its scale.
        """
        if self.where.type == "cuda" and step % CHECK_EVERY:
            return
        wrong = {} if bool(loss.isfinite()) else {"loss": float(loss)}
        if norm is not None and not bool(norm.isfinite()):
            wrong["gradient norm"] = float(norm)
        if wrong and not (self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            raise self.diverged(step, wrong)

    def diverged(self, step: int, wrong: dict[str, float]) -> InputError:
        """Return the error for values that are not finite."""
        values = ", ".join(f"{name} {value}" for name, value in wrong.items())
        return InputError(
            f"training diverged at step {step}: {values} in {self.precision.name}; the last checkpoint is "
            "kept: lower learning_rate or clip_norm, or train in fp32"
        )

    # -- checkpoints ---------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Return the configuration and data that a checkpoint must have to be resumed."""
        train = as_dict(self.config)
        train.pop("checkpoint_seconds")
        identity = {"model": as_dict(self.model.config), "train": train, "data": self.fingerprint}
        return identity if self.origin is None else identity | {"origin": self.origin}

    def save(self, folder: Path) -> None:
        """Write a checkpoint of the current step and delete all but the newest two."""
        self._count_skips()
        tensors = {f"model.{k}": v for k, v in unique_tensors(self.model, frozen=False).items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.where.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.where)
        state = {"identity": self.identity(), "progress": asdict(self.progress)}
        state["scaler"] = self.scaler.state_dict()
        saving.save_checkpoint(folder, f"step-{self.progress.step}", tensors, state)
        saving.prune(folder)

    def resume(self, folder: Path) -> None:
        """Resume from the newest checkpoint in `folder`, if there is one.

        Raises `InputError` if it is damaged or of another configuration, dataset or, for an unfinished run,
        number of processes, with which sums of gradients and dropout would differ.
        """
        newest = saving.latest(folder)
        if newest is None:
            return
        with saving.whole_checkpoint(newest):
            tensors, state = saving.load_checkpoint(newest)
            refuse_other(state["identity"], self.identity(), folder)
            progress = Progress(**state["progress"])
            if not progress.done and (saved := progress.processes) != self.ranks.count:
                raise InputError(
                    f"the run in {folder.name} was begun with nproc={saved}, and here nproc is "
                    f"{self.ranks.count}: go on with nproc={saved}, or start anew in another folder"
                )
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
