"""A whole training run: the loop, evaluation on validation, early stop, checkpoints, the best weights.

Every choice is made on validation; the test split is scored by whoever asks for it, once.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm.auto import tqdm

from reclib import checkpoint, diagnosis, distributed, launch, lifeline, metrics, runfile, tracker
from reclib.adapters import base_hash
from reclib.checkpoint import load_unique, refuse_other, unique_tensors
from reclib.command import Parser, exit_code
from reclib.config import SIZE_NAMES, InputError, ModelConfig, TrainConfig
from reclib.curves import Curves
from reclib.data import Dataset, Evaluation, prepare
from reclib.hardware import Device, resolve
from reclib.headroom import demand_room
from reclib.ilora import AdaptedModel
from reclib.model import Bert4Rec
from reclib.runfile import Setup
from reclib.splits import Split, leave_one_out
from reclib.trainer import StepStats, Trainer

SELECT = "ndcg@10"  # the metric on validation by which the best epoch is chosen


@dataclass
class Options:
    """How a run is watched; nothing here changes its result."""

    remove_seen: bool = True  # leave what a user has had out of the ranking on validation
    progress_bar: bool = False
    on_step: Callable[[StepStats], None] | None = None
    on_evaluation: Callable[[dict[str, float]], None] | None = None


def rank_targets(
    trainer: Trainer, part: Evaluation, remove_seen: bool, top_k: int = 0, with_losses: bool = False
) -> metrics.Ranking:
    """Rank the targets of `part` with the trainer's model, in its precision, each process its users."""

    def rank(part: Evaluation) -> metrics.Ranking:
        with trainer.autocast():
            scores = metrics.model_scores(trainer.model, part, trainer.where)
            return metrics.rank(scores, part, remove_seen, top_k, with_losses)

    return trainer.ranks.ranking(part, rank)


def fit(
    model: ModelConfig,
    dataset: Dataset,
    config: TrainConfig,
    device: Device,
    folder: Path | None = None,
    options: Options | None = None,
    split: Split | None = None,
) -> Trainer:
    """Train a new model and return its trainer, with the weights that were best on validation.

    `split` None is leave-one-out. With a `folder` the run is checkpointed there and goes on there. Raises
    `InputError` where it would not fit or diverges, or a checkpoint is damaged or of another run.
    """
    split = split or leave_one_out(dataset)
    demand_room(model, config, split.train, device, None, distributed.ranks().count)
    torch.manual_seed(config.seed)  # weights and dropout; batches have generators of their own
    trainer = Trainer(Bert4Rec(model), split.train, config, device, data_identity(dataset, split))
    return _carried_through(trainer, split, folder, options or Options())


def fit_setup(setup: Setup, claimed: str, folder: Path, kind: str = "none") -> Trainer:
    """Train what a setup says on the device of a gpu label, beside other processes or alone; see `fit`.

    `kind` is the tracker that gets the curves, of several processes from the first one.
    """
    device = resolve(claimed)
    distributed.divide_threads(device.label)
    dataset = prepare(setup.data)
    split = runfile.SPLITS[setup.split](dataset)
    model, found = setup.model(dataset.num_items), data_identity(dataset, split)
    if setup.identity not in (None, found):
        raise InputError(f"the data of the run are {found}, not {setup.identity}")
    about = {"model": asdict(model), "train": asdict(setup.train)}
    first = distributed.ranks().first
    with tracker.start(kind if first else "none", setup.group, setup.title or folder.name, about) as track:
        curves = Curves(track, device)
        options = Options(True, sys.stderr.isatty(), curves.step, curves.evaluation)
        if not first:
            options = Options()
        return fit(model, dataset, setup.train, device, folder, options, split)


def fine_tune(
    model: Bert4Rec | AdaptedModel,
    dataset: Dataset,
    config: TrainConfig,
    device: Device,
    folder: Path | None = None,
    options: Options | None = None,
    split: Split | None = None,
) -> Trainer:
    """Train a model that is there further, whole, in part or by its active adapter; otherwise as `fit`.

    What is trained is what requires a gradient, and checkpoints hold that alone: of an adapted model the
    adapter and its gate. They belong to the weights that it starts from and to the adapter's settings.
    """
    origin = origin_of(model)
    torch.manual_seed(config.seed)
    split = split or leave_one_out(dataset)
    trainer = Trainer(model, split.train, config, device, data_identity(dataset, split), origin)
    return _carried_through(trainer, split, folder, options or Options())


def origin_of(model: Bert4Rec | AdaptedModel) -> dict[str, Any]:
    """Return what a further training starts from: a hash of the base, and what of it or around it trains."""
    if isinstance(model, AdaptedModel):
        if model.active is None:
            raise InputError("the adapted model has no active adapter: there is nothing to train")
        settings = asdict(model.configs[model.active])
        settings["targets"] = list(settings["targets"])  # as JSON gives it back
        reader = model.reader(model.active)
        read = None if reader is None else base_hash(reader)
        return {"base_sha256": model.base_sha256, "adapter": settings, "reader_sha256": read}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise InputError("all parameters of the model are frozen: there is nothing to train")
    return {"base_sha256": base_hash(model), "trained": trained}


def _carried_through(trainer: Trainer, split: Split, folder: Path | None, options: Options) -> Trainer:
    """Train to the end from the newest checkpoint, if there is one, and load the best weights."""
    if folder is not None:
        trainer.resume(folder)
        trainer.ranks.demand_same(trainer.progress.step, folder)
    best: dict[str, Tensor] = {}
    if not trainer.progress.done:
        best = _train(trainer, split.valid, folder, options)
    if not best and folder is not None:
        best, state = checkpoint.load(folder / "best")
        refuse_other(state["identity"], trainer.identity(), folder)
    load_unique(trainer.model, best)
    return trainer


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder got through, as far as its newest checkpoint says."""
    found = checkpoint.latest(folder)
    try:
        return found is not None and bool(
            json.loads((found / checkpoint.STATE).read_text())["progress"]["done"]
        )
    except (OSError, ValueError, KeyError):
        return False


def data_identity(dataset: Dataset, split: Split) -> str:
    """Return what identifies the data of a run: the dataset, and how it is split unless by leave-one-out."""
    if split.name == "leave-one-out":
        return dataset.fingerprint
    rule = hashlib.sha256(json.dumps(split.about, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return f"{dataset.fingerprint} {split.name} {rule}"


def _train(trainer: Trainer, valid: Evaluation, folder: Path | None, options: Options) -> dict[str, Tensor]:
    """Run the loop to its end or the early stop; return the best weights found on this call, if any.

    Of several processes the first one writes and shows; what is decided by validation is decided by its row.
    """
    progress, config = trainer.progress, trainer.config
    folder = folder if trainer.ranks.first else None
    best: dict[str, Tensor] = {}
    saved_at = time.monotonic()
    pending: list[StepStats] = []  # their losses are read late, since reading waits for the device
    bar = tqdm(
        total=trainer.total_steps,
        initial=progress.step,
        unit="step",
        mininterval=1.0,
        leave=False,
        disable=not (options.progress_bar and trainer.ranks.first),
    )
    with bar:
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
                        checkpoint.save(folder, "best", best, state)
                else:
                    progress.stale_evaluations += 1
                stop = bool(config.patience) and progress.stale_evaluations >= config.patience
                progress.done = last or stop
                bar.set_postfix(loss=f"{row['train_loss']:.3f}", ndcg10=f"{row[SELECT]:.4f}")
            if folder is not None and (due or time.monotonic() - saved_at >= config.checkpoint_seconds):
                _absorb(trainer, pending)
                trainer.save(folder)
                saved_at = time.monotonic()
            if progress.done:
                break
    return best


def _absorb(trainer: Trainer, pending: list[StepStats]) -> None:
    """Add the losses of `pending` steps to the run's sums, and forget the steps.

    On CUDA the loop looks at a loss only now and then: here all are seen, before anything is saved.
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
    ranking = rank_targets(trainer, valid, options.remove_seen, with_losses=True)
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
    return row


def save_model(trainer: Trainer, folder: Path, about: dict[str, Any]) -> Path:
    """Write weights and configuration under `folder`, to be loaded by `load_model`."""
    state = {"model": asdict(trainer.model.config), **about}
    return checkpoint.save(folder.parent, folder.name, unique_tensors(trainer.model), state)


def load_model(folder: Path) -> Bert4Rec:
    """Read a model that `save_model` wrote; raise `InputError` if it is damaged."""
    tensors, state = checkpoint.load(folder)
    if "model" not in state:
        raise InputError(f"{folder.name} holds a training state, not a saved model")
    model = Bert4Rec(ModelConfig(**state["model"]))
    load_unique(model, tensors)
    return model.eval()


def main(argv: list[str] | None = None) -> int:
    """Train from the command line; print validation's best as one JSON line."""
    lifeline.hold()
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        values = {name: yaml.safe_load(value) for name, value in given.p}
    except yaml.YAMLError:
        parser.error(f"-p {' '.join(' '.join(pair) for pair in given.p)}: a value is not valid YAML")
    try:
        if given.run:
            setup = runfile.read(given.run)
        else:
            setup = runfile.of_options(given.dataset, given.size, values)
        if given.nproc != 1 and not distributed.in_run():
            distributed.place(given.nproc, given.gpu)
            prepare(setup.data)  # once, and its errors are told once
            return launch.run(arguments, given.nproc, given.gpu)
        with distributed.joined(given.gpu):
            trainer = fit_setup(setup, given.gpu, given.out, given.tracker)
    except InputError as error:
        launch.report(error)
        return launch.leave(2)
    except KeyboardInterrupt:
        if not distributed.in_run():  # otherwise said once, by the one that started this process
            print(f"interrupted; {diagnosis.AGAIN}", file=sys.stderr)
        return launch.leave(128 + signal.SIGINT)
    progress = trainer.progress
    if trainer.ranks.first:
        print(json.dumps({SELECT: progress.best_value, "epoch": progress.best_epoch, "step": progress.step}))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m reclib.fit",
        description="Train one model; the same command goes on where a killed run was.",
    )
    parser.add_argument("--dataset", default="ml-100k", help="ml-100k, synthetic or a file (ml-100k)")
    parser.add_argument("--size", default="tiny", help=f"one of {SIZE_NAMES} (tiny)")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--gpu", default="auto", help="auto, cpu or a gpu label (auto)")
    trackers = ", ".join(tracker.TRACKERS)
    parser.add_argument("--tracker", default="none", help=f"curves under runs/: {trackers} (none)")
    parser.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a field of TrainConfig, or model.<field of ModelConfig>",
    )
    parser.add_argument("--run", type=Path, help="a run file of a notebook, instead of dataset, size and -p")
    parser.add_argument("--nproc", type=int, default=1, help="processes here that train together (1)")
    return parser


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
