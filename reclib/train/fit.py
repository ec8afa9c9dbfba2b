"""A training run: the loop, evaluation on validation, early stopping, checkpoints, the best weights.

`fit` trains a new model and `fine_tune` an existing one. Both build a `Trainer` and call `_run`: resume,
train (`_train`), load the best weights. All choices are made on validation; the caller scores the test split.

Further below are run files, the command line, and trackers of training curves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from reclib import hardware, system
from reclib.config import (
    SIZE_NAMES,
    DataConfig,
    InputError,
    ModelConfig,
    TrainConfig,
    as_dict,
    divided,
    model_config,
    nearest,
    respelt,
    typed,
    validated,
)
from reclib.cost.work import demand_room
from reclib.data import splits
from reclib.data.dataset import Dataset, Evaluation
from reclib.data.prepare import prepare
from reclib.data.splits import SPLIT_TITLES, Split, leave_one_out
from reclib.evaluate import metrics
from reclib.evaluate.baselines import CountPrior
from reclib.hardware import Device, resolve
from reclib.model.bert4rec import Bert4Rec
from reclib.system import Parser
from reclib.train import distributed, saving
from reclib.train.saving import Recommender, load_unique, refuse_other, unique_tensors
from reclib.train.trainer import CHECK_EVERY, M, StepStats, Trainer

PRIOR_WEIGHTS = (1.0, 1.5, 2.0, 3.0, 4.0)  # candidates for a factor of the learned scale of a prior

SELECT = "ndcg@10"  # the metric on validation by which the best epoch is chosen


@dataclass
class Options:
    """Options for monitoring a run; training steps do not depend on them."""

    progress_bar: bool = False
    on_step: Callable[[StepStats], None] | None = None
    on_evaluation: Callable[[dict[str, float]], None] | None = None


def fit(
    model: ModelConfig,
    dataset: Dataset,
    config: TrainConfig,
    device: Device,
    folder: Path | None = None,
    options: Options | None = None,
    split: Split | None = None,
) -> Trainer[Bert4Rec]:
    """Train a new model and return its trainer, with the weights that were best on validation.

    `split` None is leave-one-out. With a `folder` the run writes checkpoints there and resumes from them.
    Raises `InputError` if it does not fit into memory or diverges, and for a checkpoint that is damaged or of
    another run.
    """
    split = _demand_targets(split or leave_one_out(dataset))
    demand_room(model, config, split.train, device, None, distributed.ranks().count)
    torch.manual_seed(config.seed)  # weights and dropout; batches have generators of their own
    network = Bert4Rec(model)
    if config.prior == "counts":
        before = None if folder is None else saving.latest(folder)
        saved = {} if before is None else saving.prior_tensors(saving.load_checkpoint(before)[0], "model.")
        network.prior = CountPrior(saved) if saved else CountPrior.chosen(split, model.num_items)
    trainer = Trainer(network, split.train, config, device, data_identity(dataset, split))
    return _run(trainer, split.valid, folder, options or Options())


def fine_tune(
    model: M,
    dataset: Dataset,
    config: TrainConfig,
    device: Device,
    folder: Path | None = None,
    options: Options | None = None,
    split: Split | None = None,
) -> Trainer[M]:
    """Train an existing model further: all or some weights, or its active adapter. Otherwise as `fit`.

    Parameters that require a gradient are trained and written to checkpoints: for an adapted model, the
    adapter and its gate. A run can be resumed only from the same initial weights and adapter settings.
    """
    origin = model.origin()
    torch.manual_seed(config.seed)
    split = _demand_targets(split or leave_one_out(dataset))
    trainer = Trainer(model, split.train, config, device, data_identity(dataset, split), origin)
    return _run(trainer, split.valid, folder, options or Options())


def _demand_targets(split: Split) -> Split:
    """Return the split; raise `InputError` if it has no validation targets."""
    if not len(split.valid.targets):
        raise InputError(
            f"the split ({split.name}) leaves no validation targets: leave-one-out needs a user with three "
            "interactions"
        )
    return split


def data_identity(dataset: Dataset, split: Split) -> str:
    """Return an identifier of the data of a run: the dataset and, unless leave-one-out, the split."""
    if split.name == "leave-one-out":
        return dataset.fingerprint
    rule = hashlib.sha256(json.dumps(split.about, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return f"{dataset.fingerprint} {split.name} {rule}"


def rank_targets(trainer: Trainer, part: Evaluation, *, with_losses: bool = False) -> metrics.Ranking:
    """Rank the targets of `part`, seen items removed, with the trainer's model in its precision.

    Users are divided over processes.
    """

    def rank(part: Evaluation) -> metrics.Ranking:
        with trainer.autocast():
            scores = metrics.model_scores(trainer.model, part, trainer.where)
            return metrics.rank(scores, part, remove_seen=True, with_losses=with_losses)

    return trainer.ranks.ranking(part, rank)


def _run(trainer: Trainer[M], valid: Evaluation, folder: Path | None, options: Options) -> Trainer[M]:
    """Resume from the newest checkpoint in `folder`, if any, train to the end, and load the best weights."""
    if folder is not None:
        trainer.resume(folder)
        trainer.ranks.demand_same(trainer.progress.step, folder)
    best: dict[str, Tensor] = {}
    if not trainer.progress.done:
        best = _train(trainer, valid, folder, options)
    if not best and folder is not None:  # the best weights are from before the run was interrupted
        best, state = saving.load_checkpoint(folder / "best")
        with saving.whole_checkpoint(folder / "best"):
            refuse_other(state["identity"], trainer.identity(), folder)
    load_unique(trainer.model, best)
    if trainer.model.prior is not None and trainer.model.prior.scale.requires_grad:
        _weigh_prior(trainer, valid)
    return trainer


def _weigh_prior(trainer: Trainer, valid: Evaluation) -> None:
    """Multiply the scale of the model's prior by the factor that ranks validation best.

    Training maximises the likelihood of all positions, which gives a smaller scale.
    """
    scale = trainer.model.prior.scale
    learned = float(scale.detach())
    values = {}
    for weight in PRIOR_WEIGHTS:
        with torch.no_grad():
            scale.fill_(learned * weight)
        values[weight] = metrics.summary(rank_targets(trainer, valid).ranks)[SELECT]
    with torch.no_grad():
        scale.fill_(learned * max(values, key=values.__getitem__))


def fit_recommender(
    dataset: Dataset,
    size: str = "tiny",
    *,
    model: Recommender | Bert4Rec | Any = None,  # or an adapted model
    gpu: str = "auto",
    folder: str | Path | None = None,
    **settings: Any,
) -> Recommender:
    """Train on a prepared dataset and return a model that recommends: `fit(dataset, "small", epochs=20)`.

    Trains a new model of a named `size`, or `model` further (the active adapter of an adapted model).
    `settings` are fields of TrainConfig and, for a new model, of ModelConfig. With a `folder` a killed run is
    resumed, and `load(folder)` loads the trained model; for an adapter see `saving.save_adapter`.
    """
    shape, train = divided(settings)
    device, place = resolve(gpu), None if folder is None else Path(folder)
    options = Options(progress_bar=sys.stderr.isatty())
    if model is None:
        setup = Setup(DataConfig(), validated(TrainConfig, train), size, shape)
        trainer = fit(setup.model(dataset.num_items), dataset, setup.train, device, place, options)
    else:
        if shape:
            raise InputError(f"{', '.join(shape)} cannot be set: the model that is trained further has them")
        module: Any = model.model if isinstance(model, Recommender) else model
        trainer = fine_tune(module, dataset, validated(TrainConfig, train), device, place, options)
    if place is not None and isinstance(trainer.model, Bert4Rec):
        keep(trainer, dataset, place)
    trainer.model.eval()
    return Recommender.from_dataset(trainer.model, dataset, best_of(trainer))


def best_of(trainer: Trainer) -> dict[str, Any]:
    """Return the best value on validation, and when it was reached."""
    progress = trainer.progress
    return {SELECT: progress.best_value, "epoch": progress.best_epoch, "step": progress.step}


def keep(trainer: Trainer, dataset: Dataset, folder: Path) -> Path:
    """Write the trained model of a run into the folder of its checkpoints, for `saving.load_model`."""
    place = folder.resolve() / saving.MODEL
    return saving.save_model(trainer.model, trainer.config, dataset, place, best_of(trainer))


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder is finished, according to its newest checkpoint."""
    newest = saving.latest(folder)
    if newest is None:
        return False
    try:
        return bool(json.loads((newest / saving.STATE).read_text())["progress"]["done"])
    except (OSError, ValueError, KeyError):
        return False


def _train(trainer: Trainer, valid: Evaluation, folder: Path | None, options: Options) -> dict[str, Tensor]:
    """Train to the end or an early stop; return the best weights of this call, if any.

    The first process writes files and shows progress. All processes decide by its validation row.
    """
    progress, config = trainer.progress, trainer.config
    folder = folder if trainer.ranks.first else None
    best: dict[str, Tensor] = {}
    last_save = time.monotonic()
    pending: list[StepStats] = []  # losses not read yet, since reading waits for the device
    visible = options.progress_bar and trainer.ranks.first
    with tqdm(
        total=trainer.total_steps,
        initial=progress.step,
        unit="step",
        mininterval=1,
        leave=False,
        disable=not visible,
    ) as bar:
        # Evaluate and save at the end of an epoch, and save in between if epochs take long. For resuming, the
        # best weights must be saved before the checkpoint whose progress refers to them.
        for stats in trainer.steps():
            bar.update()
            pending.append(stats)
            if options.on_step is not None:
                options.on_step(stats)
            last = stats.step == trainer.total_steps
            epoch_done = stats.step % trainer.steps_per_epoch == 0
            due = last or (epoch_done and (stats.epoch + 1) % config.eval_every == 0)
            if due:
                _absorb(trainer, pending)
                row = _evaluate(trainer, valid, stats.learning_rate, options)
                if row[SELECT] > progress.best_value:
                    progress.best_value, progress.best_epoch = row[SELECT], stats.epoch
                    progress.stale_evaluations = 0
                    best = {k: v.clone() for k, v in unique_tensors(trainer.model, frozen=False).items()}
                    if folder is not None:
                        state = {"identity": trainer.identity(), "validation": row}
                        saving.save_checkpoint(folder, "best", best, state)
                else:
                    progress.stale_evaluations += 1
                progress.done = last or 0 < config.patience <= progress.stale_evaluations
                bar.set_postfix(loss=f"{row['train_loss']:.3f}", ndcg10=f"{row[SELECT]:.4f}")
            if folder is not None and (due or time.monotonic() - last_save >= config.checkpoint_seconds):
                _absorb(trainer, pending)
                trainer.save(folder)
                last_save = time.monotonic()
            if progress.done:
                break
    return best


def _absorb(trainer: Trainer, pending: list[StepStats]) -> None:
    """Add the losses of `pending` steps to the run's sums, and clear the list.

    Every loss is checked here before anything is saved; on CUDA the loop checks every `CHECK_EVERY`-th one.
    """
    for stats in pending:
        if stats.skipped:
            continue
        values = {"loss": stats.loss, "gradient norm": stats.grad_norm}
        if wrong := {k: v for k, v in values.items() if v is not None and not math.isfinite(v)}:
            raise trainer.diverged(stats.step, wrong)
        trainer.progress.loss_sum += stats.loss * stats.num_targets
        trainer.progress.loss_targets += stats.num_targets
    pending.clear()


def _evaluate(
    trainer: Trainer, valid: Evaluation, learning_rate: float, options: Options
) -> dict[str, float]:
    """Score validation and add a row to the history."""
    progress = trainer.progress
    started = time.perf_counter()
    ranking = rank_targets(trainer, valid, with_losses=True)
    assert ranking.losses is not None
    trainer.model.train()
    row = {
        "step": progress.step,
        "epoch": progress.step / trainer.steps_per_epoch,
        "train_loss": progress.loss_sum / progress.loss_targets,
        "learning_rate": learning_rate,
        "train_seconds": progress.train_seconds,
        "tokens": progress.tokens,
        "valid_loss": float(ranking.losses.mean(dtype=np.float64)),
        **metrics.summary(ranking.ranks),
        "eval_seconds": time.perf_counter() - started,
    }
    row = trainer.ranks.of_first(row)
    progress.loss_sum, progress.loss_targets = 0.0, 0
    progress.history.append(row)
    if options.on_evaluation is not None:
        options.on_evaluation(row)
    system.report_progress(_progress_line(trainer, row))
    return row


def _progress_line(trainer: Trainer, row: Mapping[str, float]) -> str:
    """Return the progress of a run in one line: its epoch, validation, and remaining time."""
    name = "causal twin" if trainer.config.objective == "next_item" else "BERT4Rec"
    spent = row["train_seconds"] + sum(past["eval_seconds"] for past in trainer.progress.history)
    minutes, seconds = divmod(round(spent * (trainer.total_steps / row["step"] - 1)), 60)
    epochs = trainer.total_steps / trainer.steps_per_epoch
    text = f"epoch {row['epoch']:.0f}/{epochs:.0f}  NDCG@10 {row[SELECT]:.3f}  {minutes}:{seconds:02} left"
    return f"{name}  {text}"


# -- run files and the command line --------------------------------------------------------------------------
#
# A run file is a training run as JSON, which a notebook passes to processes. It has the name of the split;
# `identity` identifies the resulting data.


@dataclass(frozen=True)
class Setup:
    """The configuration of a training run: data, training and model."""

    data: DataConfig
    train: TrainConfig
    size: str | None  # a name of config.SIZES; None: the shape has all fields
    shape: dict[str, Any]  # fields of ModelConfig that override those of the size
    split: str = "leave-one-out"  # a name of SPLIT_TITLES
    identity: str | None = None  # required `data_identity`; None: any
    group: str = "fit"  # in a tracker
    title: str | None = None  # in a tracker; None: the folder's name

    def __post_init__(self) -> None:
        if self.split not in SPLIT_TITLES:
            raise InputError(f"unknown split {self.split!r}; known: {', '.join(SPLIT_TITLES)}")
        self.model(1)

    def model(self, num_items: int) -> ModelConfig:
        """Return the model for a catalogue of `num_items`, which the shape may override."""
        if self.size is None:
            return validated(ModelConfig, self.shape)
        causal = self.train.objective == "next_item"
        return model_config(self.size, **{"num_items": num_items, "causal": causal} | self.shape)


def of_options(dataset: str, size: str, values: Mapping[str, Any]) -> Setup:
    """Return the setup of the command line: fields of TrainConfig, and `model.<field of ModelConfig>`."""
    train, shape = dict[str, Any](), dict[str, Any]()
    for name, value in values.items():
        prefix, _, field = name.rpartition(".")
        if prefix not in ("", "model"):
            raise InputError(f"unknown parameter {name!r}: expected a field of TrainConfig or model.<field>")
        (shape if prefix else train)[field] = value
    config = validated(TrainConfig, respelt(TrainConfig, train))
    return Setup(validated(DataConfig, {"dataset": dataset}), config, size, respelt(ModelConfig, shape))


def read_setup(file: Path) -> Setup:
    """Return the setup of a file; raise `InputError` with its name if it is not valid."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        data, train = validated(DataConfig, document["data"]), validated(TrainConfig, document["train"])
        return Setup(**(document | {"data": data, "train": train}))
    except OSError as error:
        raise InputError(f"cannot read the run file {file.name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file.name} is no run file: {error}") from None


def fit_setup(setup: Setup, claimed: str, folder: Path, kind: str = "none") -> Trainer:
    """Train a setup on the device of a gpu label, in one or several processes; see `fit`.

    `kind` is the tracker for the curves of the first process.
    """
    device = resolve(claimed)
    distributed.divide_threads(device.label)
    dataset = prepare(setup.data)
    split = splits.SPLIT_TITLES[setup.split](dataset)
    model, identity = setup.model(dataset.num_items), data_identity(dataset, split)
    if setup.identity not in (None, identity):
        raise InputError(f"the data of the run are {identity}, not {setup.identity}")
    settings = {"model": as_dict(model), "train": asdict(setup.train)}
    first = distributed.ranks().first
    with start_tracker(kind if first else "none", setup.group, setup.title or folder.name, settings) as track:
        curves = Curves(track, device)
        options = Options(sys.stderr.isatty(), curves.step, curves.evaluation) if first else Options()
        return fit(model, dataset, setup.train, device, folder, options, split)


def fit_main(argv: list[str] | None = None) -> int:
    """Train from the command line; print validation's best as one JSON line."""
    system.hold()
    arguments = sys.argv[1:] if argv is None else argv
    description = "Train one model; the same command goes on where a killed run was."
    parser = Parser(prog="python -m reclib fit", description=description)
    trackers, field = ", ".join(TRACKERS), "a field of TrainConfig, or model.<field of ModelConfig>"
    parser.add_argument("--dataset", default="ml-100k", help="ml-100k, synthetic or a file (ml-100k)")
    parser.add_argument("--size", default="tiny", help=f"one of {SIZE_NAMES} (tiny)")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--gpu", default="auto", help="auto, cpu or a gpu label (auto)")
    parser.add_argument("--tracker", default="none", help=f"curves under runs/: {trackers} (none)")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help=field)
    parser.add_argument("--run", type=Path, help="a run file of a notebook, instead of dataset, size and -p")
    parser.add_argument("--nproc", type=int, default=1, help="processes here that train together (1)")
    options = parser.parse_args(arguments)
    try:
        values = {name: typed(value) for name, value in options.p}
        setup = read_setup(options.run) if options.run else of_options(options.dataset, options.size, values)
        if options.nproc != 1 and not distributed.in_run():
            distributed.place(options.nproc, options.gpu)
            prepare(setup.data)  # once, and its errors are printed once
            return distributed.launch(arguments, options.nproc, options.gpu)
        with distributed.joined(options.gpu):
            trainer = fit_setup(setup, options.gpu, options.out, options.tracker)
    except InputError as error:
        distributed.report(error)
        return distributed.leave(2)
    except KeyboardInterrupt:
        if not distributed.in_run():  # otherwise printed by the parent process
            print(f"interrupted; {system.AGAIN}", file=sys.stderr)
        return distributed.leave(128 + signal.SIGINT)
    if trainer.ranks.first:
        print(json.dumps(best_of(trainer)))
        if options.run is None:
            dataset = prepare(setup.data)
            keep(trainer, dataset, options.out)
            items = " ".join(shlex.quote(str(key)) for key in dataset.item_keys[1:4])
            print(
                f"next: python -m reclib recommend {shlex.quote(str(options.out))} {items}", file=sys.stderr
            )
    return distributed.leave(0)


# -- curves and trackers -------------------------------------------------------------------------------------
#
# Weights & Biases or TensorBoard, off by default; records do not depend on them. Files are under `runs/`,
# which git ignores, and contain no host, user or command line.

TRACKERS = ("none", "wandb-offline", "wandb-online", "tensorboard")
_WANDB_MODES = ("disabled", "offline", "online")  # of the variable WANDB_MODE
_RUN = ("epoch", "tokens", "train_seconds", "eval_seconds")  # columns of the history that are no metrics


class Tracker:
    """Receives the curves of a training run. This base class ignores them."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log named numbers at an optimiser step; steps do not go backwards."""

    def close(self, failed: bool) -> None:
        """End the run."""


class Wandb(Tracker):
    """A run of Weights & Biases: one folder under `runs/wandb`, which `wandb sync` uploads later."""

    def __init__(self, mode: str, group: str, name: str, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # no banners with run ids and paths
        import wandb

        if mode == "online":
            try:
                logged_in = bool(wandb.login(prompt=False, verify=False))
            except wandb.errors.UsageError:
                logged_in = False
            if not logged_in:
                raise InputError(
                    "tracker='wandb-online' needs a login: run `wandb login` once, or use "
                    "tracker='wandb-offline'"
                )
        system.runs().mkdir(parents=True, exist_ok=True)  # wandb makes a folder `wandb` in it
        quiet: dict[str, Any] = {"silent": True, "console": "off", "disable_code": True, "disable_git": True}
        # Hide host, user and command line.
        quiet |= {"x_disable_meta": True, "host": "hidden", "username": "hidden"}
        self._run = wandb.init(
            project="reclib",
            group=group,
            name=name,
            config=dict(config),
            mode=mode,  # type: ignore[arg-type]
            dir=str(system.runs()),
            reinit="create_new",  # several runs, one per seed, in one notebook
            settings=wandb.Settings(**quiet),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log named numbers at an optimiser step."""
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """Finish the run and mark a failed one."""
        self._run.finish(exit_code=1 if failed else 0)


class TensorBoard(Tracker):
    """A file of events under `runs/tensorboard/<group>/<name>`, created on the first write.

    A resumed run writes another file, whose first event makes TensorBoard discard later steps of the killed
    run.
    """

    def __init__(self, group: str, name: str, config: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise InputError(
                "tracker='tensorboard' needs its package: pip install tensorboard, or use another tracker"
            ) from None
        self._config, self._folder = dict(config), system.runs() / "tensorboard" / group / name
        self._new = SummaryWriter
        self._writer: Any = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write named numbers at an optimiser step."""
        if self._writer is None:
            with mock.patch("socket.gethostname", return_value="reclib"):  # part of the file's name
                self._writer = self._new(self._folder, purge_step=step)
            text = json.dumps(self._config, indent=2, default=str)
            self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), step)
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the file; TensorBoard cannot mark failed runs."""
        if self._writer is not None:
            self._writer.close()


def used(tracker: str) -> str:
    """Return the tracker to use: for wandb, the environment's `WANDB_MODE` overrides the mode.

    Raises `InputError` for an unknown tracker or mode.
    """
    if tracker not in TRACKERS:
        raise InputError(
            f"unknown tracker {tracker!r}{nearest(tracker, TRACKERS)}; allowed: {', '.join(TRACKERS)}"
        )
    mode = os.environ.get("WANDB_MODE")
    if not mode or not tracker.startswith("wandb"):
        return tracker
    if mode not in _WANDB_MODES:
        raise InputError(f"WANDB_MODE is {mode!r}; allowed: {', '.join(_WANDB_MODES)}")
    return "none" if mode == "disabled" else f"wandb-{mode}"


@contextmanager
def start_tracker(tracker: str, group: str, name: str, config: Mapping[str, Any]) -> Iterator[Tracker]:
    """Track one run: `group` is the notebook, `name` the run in it, `config` its parameters.

    Never prompts. Raises `InputError` for an unknown tracker, a missing login or a missing package. A run
    whose block raises is closed as failed.
    """
    kind, _, mode = used(tracker).partition("-")
    run = Tracker()
    if kind != "none":
        run = Wandb(mode, group, name, config) if kind == "wandb" else TensorBoard(group, name, config)
    try:
        yield run
    except BaseException:
        run.close(failed=True)
        raise
    run.close(failed=False)


class Curves:
    """The callbacks of one training run for `Options`: loss, rates, norm, memory and validation.

    On CUDA a loss is read only at steps at which the loop synchronises anyway.
    """

    def __init__(self, track: Tracker, device: Device) -> None:
        self._track, self._where = track, device.torch_device
        self._window: list[StepStats] = []  # since the last log
        self._begun: float | None = None  # start of the window; None: it did not start synchronised
        self._sequences = 0  # since the last evaluation
        self._before: tuple[float, float] | None = None  # (tokens, train_seconds) at the last evaluation

    def step(self, stats: StepStats) -> None:
        """Add one step; log the mean of each window of `CHECK_EVERY`."""
        if stats.step == 1:
            self._before = (0.0, 0.0)
        self._window.append(stats)
        self._sequences += stats.num_sequences
        if stats.step % CHECK_EVERY:
            return
        window, values = self._window, self._losses()  # waits for the device
        now = time.perf_counter()
        if self._begun is not None:
            tokens, sequences = (sum(getattr(s, n) for s in window) for n in ("num_tokens", "num_sequences"))
            values |= _rates(tokens, sequences, now - self._begun)
        self._log(values, stats.step)
        self._begun = now

    def evaluation(self, row: Mapping[str, float]) -> None:
        """Log a row of the history, on a CPU with the rates since the last one."""
        values = self._losses() if self._window else {}
        if self._before is not None and self._where.type == "cpu":
            tokens, seconds = row["tokens"] - self._before[0], row["train_seconds"] - self._before[1]
            values |= _rates(tokens, self._sequences, seconds)
        for name, value in row.items():
            if name == "train_loss":
                values["train/epoch_loss"] = value
            elif name not in ("step", "learning_rate"):
                values[f"run/{name}" if name in _RUN else f"valid/{name.removeprefix('valid_')}"] = value
        self._log(values, int(row["step"]))
        self._before, self._sequences, self._begun = (row["tokens"], row["train_seconds"]), 0, None

    def _losses(self) -> dict[str, float]:
        """Return the window's mean loss over targets, its last gradient norm and learning rate."""
        counted = [stats for stats in self._window if not stats.skipped]
        targets = sum(stats.num_targets for stats in counted)
        values = {"train/learning_rate": self._window[-1].learning_rate}
        if targets:
            values["train/loss"] = sum(stats.loss * stats.num_targets for stats in counted) / targets
            if (norm := counted[-1].grad_norm) is not None:
                values["train/gradient_norm"] = norm
        return values

    def _log(self, values: dict[str, float], step: int) -> None:
        self._window = []
        self._track.log(values | {"run/peak_memory_bytes": hardware.peak_memory_bytes(self._where)}, step)


def _rates(tokens: float, sequences: float, seconds: float) -> dict[str, float]:
    return {
        "train/tokens_per_second": tokens / seconds,
        "train/sequences_per_second": sequences / seconds,
    }
