"""What each notebook may be asked: one frozen dataclass of validated parameters for each.

`parameters` reads them from a notebook's cell and from the profiles. To add a notebook: a dataclass in
`NOTEBOOKS`, and a section in `params/smoke.yaml` that equals its parameters cell (the other profiles state
only what differs from smoke).
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from reclib import system
from reclib.config import (
    SIZE_NAMES,
    SIZES,
    STRICT,
    CompileMode,
    Controls,
    DataConfig,
    GpuLabel,
    InputError,
    Loss,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Precision,
    Probability,
    Share,
    nearest,
    respelt,
    validated,
)

# ------------------------------------------------------------------------------------------------
# Names in a notebook that are no parameters: papermill injects a misspelt name like a right one.

_SHELL = frozenset({"In", "Out", "exit", "quit", "open", "get_ipython"})  # IPython's own names


def strangers(namespace: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    """Return the simple values in a notebook's globals that are none of the `known` parameters.

    When a cell is run again in JupyterLab, later cells have left names of their own; therefore,
    where there is a history, only names from cells of plain assignments count: the parameters cell
    and papermill's injected one.
    """
    history = [source for source in namespace.get("In", []) if source]
    assigned = {name for source in history for name in assigned_names(source)}
    return {
        name: value
        for name, value in namespace.items()
        if not (name in known or name in _SHELL or name.startswith("_"))
        and isinstance(value, bool | int | float | str | list | tuple | dict | None)
        and (not history or name in assigned)
    }


def assigned_names(source: str) -> list[str]:
    """Return the names that a cell assigns if it does nothing but assign literals, else nothing."""
    try:
        return [_literal_assignment(statement) for statement in ast.parse(source).body]
    except (SyntaxError, ValueError):  # a magic, a call, an import
        return []


def _literal_assignment(statement: ast.stmt) -> str:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            pass
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            pass
        case _:
            raise ValueError("not an assignment to a name")
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "float"):  # float('nan')
        ast.literal_eval(value)
    return name


# ------------------------------------------------------------------------------------------------

T = TypeVar("T")


def _known_size(name: str) -> str:
    if name not in SIZES:
        raise ValueError(f"unknown size{nearest(name, SIZES)}; allowed: {SIZE_NAMES}")
    return name


def _distinct(values: list[T]) -> list[T]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} is listed twice")
    return values


def _pairs(text: str) -> str:
    if text and any(len(pair.split("=")) != 2 for pair in text.split(",")):
        raise ValueError("expected pairs of name and column: user=A,item=B,time=C")
    return text


Name = Annotated[str, Field(min_length=1)]

Columns = Annotated[str, AfterValidator(_pairs)]  # written as on the command line

Size = Annotated[str, AfterValidator(_known_size)]

Seeds = Annotated[list[NonNegative], Field(min_length=1), AfterValidator(_distinct)]

Precisions = Annotated[list[Precision], Field(min_length=1), AfterValidator(_distinct)]

CompileModes = Annotated[list[CompileMode], Field(min_length=1), AfterValidator(_distinct)]

Sizes = Annotated[list[Size], Field(min_length=1), AfterValidator(_distinct)]

BatchSizes = Annotated[list[Positive], Field(min_length=1), AfterValidator(_distinct)]

Models = Annotated[list[Literal["bert4rec", "causal"]], Field(min_length=1), AfterValidator(_distinct)]

OtherSplits = Annotated[list[Literal["global_time", "random_users"]], AfterValidator(_distinct)]

Tracker = Literal["none", "wandb-offline", "wandb-online", "tensorboard"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataPrep:
    """Parameters of `01_data_prep`."""

    gpu: GpuLabel  # device label, a claim to be checked; auto: what is here
    dataset: Name  # a name that `reclib.data` knows, a file, or a prepared folder
    format: Name  # of a file, a name of `formats.FORMATS`; auto: detected, never guessed
    columns: Columns  # of an own table, user=A,item=B,time=C; empty: by its header
    min_user: Positive  # k-core: interactions that a user must have
    min_item: Positive  # k-core: interactions that an item must have
    core: Literal["fixed_point", "single_pass"]  # k-core until nothing changes, or the seed study's pass
    duplicates: Literal["keep", "exact", "first", "last"]  # which of repeated (user, item) pairs stay
    strict: bool  # stop at the first bad line instead of counting it
    max_rejected_share: Share  # share of bad lines above which reading stops
    memory_limit_mb: Positive  # of the database that prepares the data
    seed: NonNegative  # of the users shown as examples, and of the splits that draw

    def data_config(self) -> DataConfig:
        """Return which interactions are asked for, and how they are read and filtered."""
        asked = dataclasses.asdict(self)
        del asked["gpu"], asked["seed"]
        columns = dict(pair.split("=", 1) for pair in self.columns.split(",") if pair)
        return validated(DataConfig, asked | {"columns": columns or None})


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Baseline:
    """Parameters of `02_baseline`."""

    gpu: GpuLabel  # device label, a claim to be checked; auto: what is here
    dataset: Name  # name of a data set that `reclib.data` knows
    min_user: Positive  # k-core: interactions that a user must have
    min_item: Positive  # k-core: interactions that an item must have
    models: Models  # bert4rec, causal (the twin that predicts the next item)
    other_splits: OtherSplits  # further trainings of the first model: global_time, random_users
    size: Size  # named model size, one of `config.SIZES`
    seeds: Seeds  # one training run each
    epochs: Positive  # passes over the users
    batch_size: Positive  # sequences per optimiser step
    micro_batch_size: Positive | None  # sequences per forward pass; None: from the device file
    learning_rate: PositiveFloat  # peak of the schedule
    dropout: Probability  # 0 <= dropout < 1
    mask_prob: Annotated[float, Field(gt=0.0, lt=1.0)]  # share of positions that are cloze targets
    last_item_share: Share  # share of samples whose only target is the last item
    window: Literal["last", "random"]  # which max_len items of a longer history train
    max_len: Positive  # positions per packed row and longest history
    norm: Literal["pre", "post"]  # LayerNorm before or after each residual branch
    tied: bool  # the output table is the input table
    output_bias: bool  # a learned bias for each item
    loss: Loss  # full cross-entropy (auto, plain, chunked, inplace) or sampled_softmax or gbce
    eval_every: Positive  # epochs between evaluations on validation
    patience: NonNegative  # evaluations without a better NDCG@10 before stopping; 0: never
    precision: Precision | None  # None: from the device file
    compile_mode: CompileMode | None  # None: from the device file
    bootstrap_samples: Positive  # resamples of the users behind each confidence interval
    nproc: Positive  # processes that train each model together; 1: the notebook itself
    tracker: Tracker  # curves: none, files of wandb, wandb itself (needs a login), files of TensorBoard

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> Baseline:
        _divides(self.batch_size, self.micro_batch_size)
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Scaling:
    """Parameters of `03_scaling`."""

    gpu: GpuLabel  # device label, a claim to be checked; auto: what is here
    dataset: Name  # a name that `reclib.data` knows, a file, or a prepared folder
    min_user: Positive  # k-core: interactions that a user must have
    min_item: Positive  # k-core: interactions that an item must have
    sizes: Sizes  # trained here, one run for each seed
    seeds: Seeds  # of each size
    epochs: Positive  # passes over the users, the same for every size: fixed data and tokens
    batch_size: Positive  # sequences per optimiser step
    micro_batch_size: Positive | None  # sequences per forward pass; None: from the device file
    base_rate: PositiveFloat  # peak learning rate at a width of 128; others by the rule of `scaling`
    dropout: Probability  # 0 <= dropout < 1, the same for every size
    mask_prob: Annotated[float, Field(gt=0.0, lt=1.0)]  # share of positions that are cloze targets
    last_item_share: Share  # share of samples whose only target is the last item
    max_len: Positive  # positions per packed row and longest history
    eval_every: Positive  # epochs between evaluations on validation
    tuned: bool  # take what `scaling` chose for a size on this dataset, where it did
    precision: Precision | None  # None: from the device file
    compile_mode: CompileMode | None  # None: from the device file
    nproc: Positive  # processes that train each model together; 1: the notebook itself
    tracker: Tracker  # curves: none, files of wandb, wandb itself (needs a login), files of TensorBoard

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> Scaling:
        _divides(self.batch_size, self.micro_batch_size)
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AmpCompile:
    """Parameters of `04_amp_compile`."""

    gpu: GpuLabel  # device label, a claim to be checked; auto: what is here
    dataset: Name  # a data set that `reclib.data` knows, or "synthetic" of the sizes below
    synthetic_users: Positive  # synthetic histories
    synthetic_items: Positive  # catalogue of the synthetic histories
    synthetic_mean_len: PositiveFloat  # interactions per user of the synthetic histories
    size: Size  # named model size, one of `config.SIZES`
    max_len: Positive  # positions per packed row and longest history
    precisions: Precisions  # fp32, tf32, bf16, fp16 or auto, each once
    compile_modes: CompileModes  # off, default, reduce-overhead or max-autotune, each once
    batch_sizes: BatchSizes  # sequences per optimiser step, each once
    steps: Positive  # timed steps of a variant in a round
    warmup_steps: Positive  # steps of a variant before the first timed one
    repeats: Positive  # rounds, in which the variants take turns
    seed: NonNegative  # of weights, masks and order


Adapted = Literal["none", "full", "lora", "ilora", "gated", "head", "bias"]

Arms = Annotated[list[Literal[Adapted, Controls]], Field(min_length=2), AfterValidator(_distinct)]

Tasks = Annotated[list[Literal["next_period", "segment"]], Field(min_length=1), AfterValidator(_distinct)]

Rates = Annotated[list[PositiveFloat], Field(min_length=1), AfterValidator(_distinct)]

Inside = Annotated[float, Field(gt=0.0, lt=1.0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ILora:
    """Parameters of `05_ilora`."""

    gpu: GpuLabel  # device label, a claim to be checked; auto: what is here
    dataset: Name  # name of a data set that `reclib.data` knows, with times
    min_user: Positive  # k-core: interactions that a user must have
    min_item: Positive  # k-core: interactions that an item must have
    past_share: Inside  # of the interactions, in time order: what a base learns from
    adaptation_share: Inside  # the next ones: what it is adapted to
    valid_share: Inside  # the next ones: what everything is chosen on; the rest is the test
    targets_per_user: Positive  # random targets of a user in a window
    tasks: Tasks  # next_period: all its users; segment: past far from popular items
    segment_share: Inside  # of the adaptation's users with a past that are it
    arms: Arms  # of `adaptation`; none, ilora always
    size: Size  # named model size, one of `config.SIZES`
    max_len: Positive  # positions per packed row and longest history
    dropout: Probability  # 0 <= dropout < 1, of base and adaptation
    seeds: Seeds  # each trains a base of its own and adapts it by every arm
    base_epochs: Positive  # passes over the past
    base_learning_rate: PositiveFloat  # peak of the base's schedule
    epochs: Positive  # passes of every arm over the adaptation's histories
    learning_rates: Rates  # peaks of an arm's schedule; the first seed's validation chooses
    batch_size: Positive  # sequences per optimiser step
    mask_prob: Inside  # share of positions that are cloze targets
    last_item_share: Share  # share of samples whose only target is the last item
    evaluations: Positive  # on validation in a run, evenly spread; the best epoch counts
    rank: Positive  # r of every adapter
    alpha: PositiveFloat  # lora's factor is alpha / rank
    num_experts: Positive  # K of ilora; divides rank
    adapter_dropout: Probability  # on an adapter's input
    representation: Literal["mean_embedding", "base_state", "causal_state"]  # what the gate looks at
    temperature: PositiveFloat  # of the gate's softmax
    gate_learning_rate: PositiveFloat  # of the gate, in units of the adapter's
    precisions: Precisions  # of timed steps, of fp32, tf32, bf16, fp16, auto; other arms: the first
    compile_modes: CompileModes  # of timed steps of ilora; other arms: the first
    rounds: Positive  # timed steps of each variant, which take turns
    warmup_steps: Positive  # steps of a variant before the first timed one
    bootstrap_samples: Positive  # resamples of the users behind each confidence interval

    @model_validator(mode="after")
    def _goes_together(self) -> ILora:
        if self.rank % self.num_experts:
            raise ValueError(f"rank={self.rank} must be divisible by num_experts={self.num_experts}")
        if missing := {"none", "ilora"} - set(self.arms):
            raise ValueError(f"arms lacks {', '.join(sorted(missing))}: all others are compared with them")
        if self.past_share + self.adaptation_share + self.valid_share >= 1:
            raise ValueError("past_share, adaptation_share and valid_share leave nothing for the test")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Hardware:
    """Parameters of `06_hardware`."""

    gpu: GpuLabel  # device label, a claim to be checked; auto: what is here
    devices: Annotated[list[Name], Field(min_length=1), AfterValidator(_distinct)]  # that plans are made for
    sizes: Annotated[list[Size], Field(min_length=1), AfterValidator(_distinct)]  # that plans are made for
    measured_sizes: Annotated[list[Size], AfterValidator(_distinct)]  # that are timed here
    batch_size: Positive  # sequences per optimiser step
    max_len: Positive  # positions per packed row and longest history
    mean_len: Annotated[float, Field(ge=5.0)]  # interactions per user
    epoch_users: Positive  # histories of an epoch, for its time and cost
    users: Positive  # synthetic histories of what is timed here
    prices: list[Name]  # device=price of an hour, in any currency; none: no cost
    steps: Positive  # timed steps of a size
    warmup_steps: Positive  # steps before the first timed one
    seed: NonNegative  # of weights, masks and order


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Explore:
    """Parameters of `07_explore`: with what its three panels begin."""

    gpu: GpuLabel  # device label, a claim to be checked; auto: what is here
    plan_device: Name  # what would it cost: a device of params/devices.yaml, or a CPU that was measured
    plan_size: Size  # named model size, one of `config.SIZES`
    plan_items: Positive | None  # catalogue; None: the size's own
    plan_mean_len: Annotated[float, Field(ge=5.0)]  # interactions per user
    plan_max_len: Positive  # positions per packed row and longest history
    plan_batch_size: Positive  # sequences per optimiser step
    plan_precision: Precision  # auto: what suits the device
    plan_adapter: Literal["none", "lora", "rslora", "gated", "ilora"]  # none: all weights are trained
    plan_rank: Positive  # of that adapter
    plan_tied: bool  # the output table is the input table
    plan_users: Positive  # histories of an epoch
    plan_price: NonNegativeFloat | None  # of an hour of the device, in any currency; None: no cost
    result: Name  # results: which kind of records, by name
    x: Name  # the number that goes across
    y: Name  # the number that goes upwards
    color: Name  # what colours tell apart
    labels: list[Name]  # device labels; none: all
    dataset: Name  # recommend: a data set that `reclib.data` knows, with times
    min_user: Positive  # k-core: interactions that a user must have
    min_item: Positive  # k-core: interactions that an item must have
    kept_model: Name  # a folder of models/; auto: the newest of this dataset, else none; none: train
    size: Size  # of the base that is trained where none is kept
    max_len: Positive  # positions per packed row and longest history of that base
    dropout: Probability  # of base and adapters, on embeddings and residual branches
    epochs: Positive  # passes of that base over the past
    learning_rate: PositiveFloat  # peak of its schedule
    batch_size: Positive  # sequences per optimiser step
    adapter_epochs: Positive  # passes of an adapter over what came after the past
    adapter_learning_rate: PositiveFloat  # peak of an adapter's schedule
    rank: Positive  # r of both adapters
    num_experts: Positive  # K of ilora; divides rank
    seed: NonNegative  # of weights, masks and order
    user: str  # raw id of the user to begin with; empty: the first that there is
    history: list[Name]  # raw ids of items, oldest first, in place of the user's; none: the user's
    history_items: Positive  # last items of a user's history to begin with
    top_k: Positive  # recommendations of a list

    @model_validator(mode="after")
    def _experts_divide(self) -> Explore:
        if self.rank % self.num_experts:
            raise ValueError(f"rank={self.rank} must be divisible by num_experts={self.num_experts}")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Audit:
    """Parameters of `08_audit`."""

    gpu: GpuLabel  # device label, a claim to be checked; auto: what is here
    dataset: Name  # name of a data set that `reclib.data` knows
    min_user: Positive  # k-core: interactions that a user must have
    min_item: Positive  # k-core: interactions that an item must have
    size: Size  # named model size, one of `config.SIZES`
    seeds: Seeds  # one training of each loss for each
    epochs: Positive  # passes over the users
    batch_size: Positive  # sequences per optimiser step
    learning_rate: PositiveFloat  # peak of the schedule
    dropout: Probability  # 0 <= dropout < 1
    mask_prob: Annotated[float, Field(gt=0.0, lt=1.0)]  # share of positions that are masked
    last_item_share: Share  # share of samples that mask the last item alone
    max_len: Positive  # positions per row and longest history
    eval_every: Positive  # epochs between evaluations on validation
    mask_draws: Annotated[int, Field(ge=2)]  # evaluations of one model with masks drawn anew
    bootstrap_samples: Positive  # resamples of the users behind each confidence interval


def _divides(batch_size: int, micro_batch_size: int | None) -> None:
    if micro_batch_size is not None and batch_size % micro_batch_size:
        raise ValueError(f"batch_size={batch_size} must be a multiple of micro_batch_size={micro_batch_size}")


NOTEBOOKS: dict[str, type] = {
    "01_data_prep": DataPrep,
    "02_baseline": Baseline,
    "03_scaling": Scaling,
    "04_amp_compile": AmpCompile,
    "05_ilora": ILora,
    "06_hardware": Hardware,
    "07_explore": Explore,
    "08_audit": Audit,
}


# ------------------------------------------------------------------------------------------------
# The parameters of each notebook: from its cell, through profiles, to a validated value.
#
# A notebook states its parameters in one cell tagged `parameters`, which papermill may override, and
# makes a frozen dataclass of them in the next: `p = params.read("02_baseline", globals())`. What each
# may be asked is in `parameters`.

PROFILES = ("smoke", "quick", "lease", "full")  # the more work, the later

# Who runs it, where and how often is not how much work one run is: a profile's name ignores these.
_NOT_WORK = frozenset({"gpu", "seed", "seeds", "nproc", "tracker"})


def kind(notebook: str) -> type:
    """Return the dataclass of a notebook's parameters; `InputError` for an unknown notebook."""
    if notebook not in NOTEBOOKS:
        close = nearest(notebook, NOTEBOOKS)
        raise InputError(f"unknown notebook {notebook!r}{close}; known: {', '.join(NOTEBOOKS)}")
    return NOTEBOOKS[notebook]


def names(notebook: str) -> list[str]:
    """Return the names of a notebook's parameters, in order."""
    return [field.name for field in dataclasses.fields(kind(notebook))]


def read(notebook: str, namespace: Mapping[str, Any]) -> Any:
    """Build a notebook's parameters from its global names: `read("02_baseline", globals())`.

    A name that is no parameter, a wrong type and an impossible value are an `InputError`.
    """
    known = names(notebook)
    given = {name: namespace[name] for name in known if name in namespace}
    return build(notebook, given | strangers(namespace, known))


def build(notebook: str, values: Mapping[str, Any]) -> Any:
    """Validate `values` into the notebook's dataclass; undone misspellings are printed."""
    return validated(kind(notebook), respelt(kind(notebook), values))


def fill(p: T, label: str) -> T:
    """Return `p` with what is None filled from `params/gpu/<label>.yaml`, if there is one.

    `label` is that of the device that is really there. A value that was given is never replaced.
    """
    file = system.params() / "gpu" / f"{label}.yaml"
    if not file.is_file():
        print(f"no device file for {label!r}: what depends on the device keeps its general default")
        return p
    own = values(p)
    device = _mapping(file)
    return validated(type(p), {k: device.get(k) if v is None else v for k, v in own.items()})


def values(p: Any) -> dict[str, Any]:
    """Return parameters as a dict of plain values."""
    return dataclasses.asdict(p)


def profile(notebook: str, name: str) -> dict[str, Any]:
    """Return a notebook's parameters in a profile: smoke's, with the profile's own on top."""
    known_profile(name)
    smoke = _section("smoke", notebook)
    if not smoke:
        raise InputError(f"params/smoke.yaml has no section {notebook!r}")
    return smoke | _section(name, notebook)


def from_file(file: Path) -> dict[str, Any]:
    """Return the parameters that a YAML file states, such as `papermill -f` takes."""
    return _mapping(file)


def profile_of(notebook: str, p: Any) -> str:
    """Return the profile whose work `p` is, or "custom": found by comparing, so it cannot lie.

    Where profiles ask for the same work it is the largest of them: there is nothing left out to warn of. A
    profile counts only for the notebooks that it has a section of.
    Ignored are the device label, the seeds, the tracker, and what the device file decides.
    """
    given = values(p)
    from_device = device_names()
    for name in reversed(PROFILES):
        if notebook not in stated(name):
            continue
        section = profile(notebook, name)
        if all(
            given[key] == value
            for key, value in section.items()
            if key not in _NOT_WORK and not (value is None and key in from_device)
        ):
            return name
    return "custom"


def known_profile(name: str) -> str:
    """Return the name of a profile as it is; `InputError` for one that there is not."""
    if name not in PROFILES:
        raise InputError(f"unknown profile {name!r}{nearest(name, PROFILES)}; allowed: {', '.join(PROFILES)}")
    return name


def stated(profile_name: str) -> list[str]:
    """Return the notebooks that a profile has a section of; the others run in it as in smoke."""
    return list(_mapping(system.params() / f"{profile_name}.yaml"))


def device_names() -> frozenset[str]:
    """Return the names of the parameters that any `params/gpu/*.yaml` decides."""
    files = sorted((system.params() / "gpu").glob("*.yaml"))
    return frozenset(name for file in files for name in _mapping(file))


def _section(profile_name: str, notebook: str) -> dict[str, Any]:
    file = system.params() / f"{profile_name}.yaml"
    section = _mapping(file).get(notebook) or {}
    if not isinstance(section, dict):
        raise InputError(f"{file.name}: section {notebook!r} must be a mapping of parameters")
    return section


def _mapping(file: Path) -> dict[str, Any]:
    state = file.stat() if file.is_file() else None
    content = _parsed(file, state and (state.st_mtime_ns, state.st_size))
    if content is not None and not isinstance(content, dict):
        raise InputError(f"{file}: must be a mapping")
    return copy.deepcopy(content) or {}


@functools.lru_cache(maxsize=64)
def _parsed(file: Path, state: tuple[int, int] | None) -> Any:
    """Return what a YAML file holds, parsed once for each state that it was in; not to be changed."""
    return system.read_yaml(file)
