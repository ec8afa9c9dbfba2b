"""Parameters of the notebooks: `Parameters` has every parameter once, with its type and meaning.

A notebook has the parameters of its section of `params/smoke.yaml`. Its parameters cell has the same names;
papermill may override them. The cell after it makes a frozen, validated value of them:
`p = parameters.read("02_baseline", globals())`. Other profiles contain only differences from smoke.
To add a notebook, add a section to smoke.yaml and its new parameters to `Parameters`.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_type_hints

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from reclib import config, system
from reclib.config import (
    CompileMode,
    Controls,
    DataConfig,
    GpuLabel,
    InputError,
    Inside,
    NonNegative,
    Positive,
    PositiveFloat,
    Precision,
    Probability,
    Share,
    nearest,
    respelt,
    validated,
)

T = TypeVar("T")


def _valid_size(name: str) -> str:
    config.model_config(name)
    return name


def _distinct(values: list[T]) -> list[T]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} is listed twice")
    return values


def _valid_columns(text: str) -> str:
    config.columns_of(text)
    return text


Name = Annotated[str, Field(min_length=1)]
Columns = Annotated[str, AfterValidator(_valid_columns)]  # written as on the command line
Size = Annotated[str, AfterValidator(_valid_size)]  # one of `config.SIZES`
Distinct = Annotated[list[T], AfterValidator(_distinct)]
Several = Annotated[list[T], Field(min_length=1), AfterValidator(_distinct)]
MeanLength = Annotated[float, Field(ge=5.0)]

Adapted = Literal["none", "full", "lora", "ilora", "gated", "head", "bias"]
Arms = Annotated[list[Literal[Adapted, Controls]], Field(min_length=2), AfterValidator(_distinct)]
Tasks = Several[Literal["next_period", "segment"]]
Tracker = Literal["none", "wandb-offline", "wandb-online", "tensorboard"]


class Parameters:
    """All parameters of all notebooks. The class of a notebook has those of its section in smoke.yaml."""

    gpu: GpuLabel  # device label, a claim to be checked; auto: what is here
    # data
    dataset: Name  # a name that `reclib.data` knows, a file, or a prepared folder
    format: Name  # of a file, a name of `formats.FORMATS`; auto: detected, never guessed
    columns: Columns  # of an own table, user=A,item=B,time=C; empty: by its header
    min_user: Positive  # k-core: interactions that a user must have
    min_item: Positive  # k-core: interactions that an item must have
    core: config.Core  # k-core until nothing changes, or the seed study's pass
    duplicates: config.Duplicates  # which of repeated (user, item) pairs stay
    ties: Literal["source", "shuffle", "item"]  # order of a user's interactions at one time
    ties_seed: NonNegative  # of ties='shuffle'
    strict: bool  # stop at the first bad line instead of counting it
    max_rejected_share: Share  # share of bad lines above which reading stops
    memory_limit_mb: Positive  # of the database that prepares the data
    synthetic_users: Positive  # synthetic histories
    synthetic_items: Positive  # catalogue of the synthetic histories
    synthetic_mean_len: PositiveFloat  # interactions per user of the synthetic histories
    other_splits: Distinct[Literal["global_time", "random_users"]]  # further trainings of the first model
    # model
    models: Several[Literal["bert4rec", "causal"]]  # causal: the twin that predicts the next item
    size: Size  # named model size
    sizes: Several[Size]  # trained here, one run for each seed, or planned for
    max_len: Positive  # positions per packed row and longest history
    dropout: Probability  # on embeddings and residual branches
    norm: config.Norm  # LayerNorm before or after each residual branch
    tied: bool  # the output table is the input table
    output_bias: bool  # a learned bias for each item
    # training
    seed: NonNegative  # of whatever is drawn: weights, masks, order, examples
    seeds: Several[NonNegative]  # one training run each
    epochs: Positive  # passes over the users
    batch_size: Positive  # sequences per optimiser step
    micro_batch_size: Positive | None  # sequences per forward pass; None: from the device file
    learning_rate: PositiveFloat  # peak of the schedule
    base_rate: PositiveFloat  # peak learning rate at a width of 128; others by the square root of the width
    tuned: bool  # take what `reclib tune` chose for a size on this dataset, where it did
    mask_prob: Inside  # share of positions that are cloze targets
    last_item_share: Share  # share of samples whose only target is the last item
    window: config.Window  # which max_len items of a longer history train
    loss: config.Loss  # full cross-entropy (auto, plain, chunked, inplace) or sampled_softmax or gbce
    eval_every: Positive  # epochs between evaluations on validation
    patience: NonNegative  # evaluations without a better NDCG@10 before stopping; 0: never
    precision: Precision | None  # None: from the device file
    compile_mode: CompileMode | None  # None: from the device file
    nproc: Positive  # processes that train each model together; 1: the notebook itself
    tracker: Tracker  # curves: none, files of wandb, wandb itself (needs a login), files of TensorBoard
    bootstrap_samples: Positive  # resamples of the users behind each confidence interval
    mask_draws: Annotated[int, Field(ge=2)]  # evaluations of one model with masks drawn anew
    # timed steps
    precisions: Several[Precision]  # each once; of 05, arms other than ilora: the first
    compile_modes: Several[CompileMode]  # each once; of 05, arms other than ilora: the first
    batch_sizes: Several[Positive]  # sequences per optimiser step, each once
    steps: Positive  # timed steps of a variant in a round
    warmup_steps: Positive  # steps of a variant before the first timed one
    repeats: Positive  # rounds, in which the variants take turns
    rounds: Positive  # timed steps of each variant, which take turns
    # adaptation
    past_share: Inside  # of the interactions, in time order: what a base learns from
    adaptation_share: Inside  # the next ones: what it is adapted to
    valid_share: Inside  # the next ones: what everything is chosen on; the rest is the test
    targets_per_user: Positive  # random targets of a user in a window
    tasks: Tasks  # next_period: all its users; segment: past far from popular items
    segment_share: Inside  # of the adaptation's users with a past that are it
    arms: Arms  # of `adaptation`; none, ilora always
    base_epochs: Positive  # passes over the past
    base_learning_rate: PositiveFloat  # peak of the base's schedule
    learning_rates: Several[PositiveFloat]  # peaks of an arm's schedule; the first seed's validation chooses
    evaluations: Positive  # on validation in a run, evenly spread; the best epoch counts
    rank: Positive  # r of every adapter
    alpha: PositiveFloat  # lora's factor is alpha / rank
    num_experts: Positive  # K of ilora; divides rank
    targets: Several[Name]  # what has adapters: names of `ilora.TARGETS`
    implanted: Distinct[Inside]  # shares of later items exchanged for a signal that a gate can read
    adapter_dropout: Probability  # on an adapter's input
    representation: config.RepresentationName  # what the gate looks at
    temperature: PositiveFloat  # of the gate's softmax
    gate_learning_rate: PositiveFloat  # of the gate, in units of the adapter's
    # devices
    devices: Several[Name]  # that plans are made for
    measured_sizes: Distinct[Size]  # that are timed here
    mean_len: MeanLength  # interactions per user
    epoch_users: Positive  # histories of an epoch, for its time and cost
    users: Positive  # synthetic histories of what is timed here
    prices: list[Name]  # device=price of an hour, in any currency; none: no cost
    # the panels of 07, and what they begin with
    plan_device: Name  # what would it cost: a device of params/devices.yaml, or a CPU that was measured
    plan_size: Size  # named model size
    plan_items: Positive | None  # catalogue; None: the size's own
    plan_mean_len: MeanLength  # interactions per user
    plan_max_len: Positive  # positions per packed row and longest history
    plan_batch_size: Positive  # sequences per optimiser step
    plan_precision: Precision  # auto: what suits the device
    plan_adapter: Literal["none", config.Kind]  # none: all weights are trained
    plan_rank: Positive  # of that adapter
    plan_tied: bool  # the output table is the input table
    plan_users: Positive  # histories of an epoch
    plan_price: config.NonNegativeFloat | None  # of an hour of the device, in any currency; None: no cost
    result: Name  # results: which kind of records, by name
    x: Name  # the number that goes across
    y: Name  # the number that goes upwards
    color: Name  # what colours tell apart
    labels: list[Name]  # device labels; none: all
    kept_model: Name  # a folder of models/; auto: the newest of this dataset, else none; none: train
    adapter_epochs: Positive  # passes of an adapter over what came after the past
    adapter_learning_rate: PositiveFloat  # peak of an adapter's schedule
    user: str  # raw id of the user to begin with; empty: the first that there is
    history: list[Name]  # raw ids of items, oldest first, in place of the user's; none: the user's
    history_items: Positive  # last items of a user's history to begin with
    top_k: Positive  # recommendations of a list

    def data_config(self) -> DataConfig:
        """Return the configuration of the data: which interactions, and how they are read and filtered."""
        names = [field.name for field in dataclasses.fields(DataConfig)]
        values = {name: getattr(self, name) for name in names if hasattr(self, name)}
        if "columns" in values:
            values["columns"] = config.columns_of(values["columns"])
        return validated(DataConfig, values)


# What the functions of a notebook take.
Baseline: TypeAlias = Parameters
Scaling: TypeAlias = Parameters
AmpCompile: TypeAlias = Parameters
ILora: TypeAlias = Parameters
Hardware: TypeAlias = Parameters
Explore: TypeAlias = Parameters
Audit: TypeAlias = Parameters


@dataclass(frozen=True, kw_only=True, config=config.STRICT)
class _Checked:
    """Conditions between parameters, for notebooks that have them."""

    @model_validator(mode="after")
    def _go_together(self) -> _Checked:
        p: dict[str, Any] = vars(self)
        micro, experts = p.get("micro_batch_size"), p.get("num_experts")
        if micro is not None and p["batch_size"] % micro:
            raise ValueError(f"batch_size={p['batch_size']} must be a multiple of micro_batch_size={micro}")
        if experts is not None and p["rank"] % experts:
            raise ValueError(f"rank={p['rank']} must be divisible by num_experts={experts}")
        if missing := {"none", "ilora"} - set(p.get("arms", ["none", "ilora"])):
            raise ValueError(f"arms lacks {', '.join(sorted(missing))}: all others are compared with them")
        if sum(p.get(name, 0) for name in ("past_share", "adaptation_share", "valid_share")) >= 1:
            raise ValueError("past_share, adaptation_share and valid_share leave nothing for the test")
        return self


# -- a notebook's parameters as a value ----------------------------------------------------------------------

PROFILES = ("smoke", "quick", "lease", "full")  # from least to most work

NOTEBOOKS = (
    "01_data_prep",
    "02_baseline",
    "03_scaling",
    "04_amp_compile",
    "05_ilora",
    "06_hardware",
    "07_explore",
    "08_audit",
)

# Parameters that do not change the work of one run: profiles are compared without them.
_NOT_WORK = {"gpu", "seed", "seeds", "nproc", "tracker"}


def names(notebook: str) -> list[str]:
    """Return the names of a notebook's parameters, in order; raise `InputError` for an unknown notebook."""
    if notebook not in NOTEBOOKS:
        close = nearest(notebook, NOTEBOOKS)
        raise InputError(f"unknown notebook {notebook!r}{close}; known: {', '.join(NOTEBOOKS)}")
    section = _section("smoke", notebook)
    if not section:
        raise InputError(f"params/smoke.yaml has no section {notebook!r}")
    return list(section)


@functools.cache
def _kind(names: tuple[str, ...]) -> type:
    """Return the frozen dataclass of the parameters with these names."""
    types = get_type_hints(Parameters, include_extras=True)
    if unknown := [name for name in names if name not in types]:
        raise InputError(f"params/smoke.yaml: unknown parameter {unknown[0]!r}{nearest(unknown[0], types)}")
    fields = {"__annotations__": {name: types[name] for name in names}, "__module__": __name__}
    kind = type("Parameters", (_Checked, Parameters), fields)
    return dataclass(frozen=True, kw_only=True, config=config.STRICT)(kind)


def read(notebook: str, namespace: Mapping[str, Any]) -> Any:
    """Build a notebook's parameters from its global names: `read("02_baseline", globals())`.

    Raises `InputError` for a name that is no parameter, a wrong type or an invalid value.
    """
    expected = names(notebook)
    cell = {name: namespace[name] for name in expected if name in namespace}
    return build(notebook, cell | _strangers(namespace, expected))


def build(notebook: str, values: Mapping[str, Any]) -> Any:
    """Validate `values` into the notebook's parameters; corrected misspellings are printed."""
    kind = _kind(tuple(names(notebook)))
    return validated(kind, respelt(kind, values))


def values(p: Any) -> dict[str, Any]:
    """Return parameters as a dict of plain values."""
    return dataclasses.asdict(p)


def fill(p: T, label: str) -> T:
    """Return `p` with None replaced by the value in `params/gpu/<label>.yaml`, if there is one.

    `label` is that of the device in use. Other values are never replaced.
    """
    file = system.params() / "gpu" / f"{label}.yaml"
    if not file.is_file():
        print(f"no device file for {label!r}: what depends on the device keeps its general default")
        return p
    device = from_file(file)
    filled = {name: device.get(name) if value is None else value for name, value in values(p).items()}
    return validated(type(p), filled)


def _strangers(namespace: Mapping[str, Any], expected: list[str]) -> dict[str, Any]:
    """Return the simple values in a notebook's globals that are not `expected` parameters.

    Papermill injects a misspelt name like a right one. When a cell is run again in JupyterLab, later cells
    have assigned names too. Therefore, if there is a history, only names from cells of plain assignments
    count: the parameters cell and the one that papermill injects.
    """
    history = [source for source in namespace.get("In", []) if source]
    assigned = {name for source in history for name in assigned_names(source)}
    ipython = {"In", "Out", "exit", "quit", "open", "get_ipython"}
    return {
        name: value
        for name, value in namespace.items()
        if not (name in expected or name in ipython or name.startswith("_"))
        and isinstance(value, bool | int | float | str | list | tuple | dict | None)
        and (not history or name in assigned)
    }


def assigned_names(source: str) -> list[str]:
    """Return the names that a cell assigns if it only assigns literals, else nothing."""
    result = []
    try:
        for statement in ast.parse(source).body:
            match statement:
                case ast.Assign([ast.Name(name)], value):
                    pass
                case ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
                    pass
                case _:  # an import, several targets, no value
                    return []
            if ast.unparse(value) not in ("float('nan')", "float('inf')", "float('-inf')"):
                ast.literal_eval(value)
            result.append(name)
    except (SyntaxError, ValueError):  # a call, a magic
        return []
    return result


# -- profiles and device files -------------------------------------------------------------------------------


def profile(notebook: str, name: str) -> dict[str, Any]:
    """Return a notebook's parameters in a profile: those of smoke, updated by the profile."""
    names(notebook)
    return _section("smoke", notebook) | _section(known_profile(name), notebook)


def profile_of(notebook: str, p: Any) -> str:
    """Return the profile whose work equals that of `p`, or "custom".

    If several profiles have this work, the largest of them is returned. A profile counts only for notebooks
    that it has a section of. The device label, the seeds, the tracker and values of the device file are
    ignored.
    """
    actual, from_device = values(p), device_names()
    for name in reversed(PROFILES):
        if notebook in stated(name) and all(
            key in _NOT_WORK or actual[key] == value or (value is None and key in from_device)
            for key, value in profile(notebook, name).items()
        ):
            return name
    return "custom"


def known_profile(name: str) -> str:
    """Return the name of a profile unchanged; raise `InputError` for an unknown one."""
    if name not in PROFILES:
        raise InputError(f"unknown profile {name!r}{nearest(name, PROFILES)}; allowed: {', '.join(PROFILES)}")
    return name


def stated(profile_name: str) -> list[str]:
    """Return the notebooks that have a section in a profile; others run as in smoke."""
    return list(from_file(system.params() / f"{profile_name}.yaml"))


def device_names() -> frozenset[str]:
    """Return the names of the parameters in any `params/gpu/*.yaml`."""
    return frozenset(name for file in (system.params() / "gpu").glob("*.yaml") for name in from_file(file))


def _section(profile_name: str, notebook: str) -> dict[str, Any]:
    file = system.params() / f"{profile_name}.yaml"
    section = from_file(file).get(notebook) or {}
    if not isinstance(section, dict):
        raise InputError(f"{file.name}: section {notebook!r} must be a mapping of parameters")
    return section


def from_file(file: Path) -> dict[str, Any]:
    """Return the parameters of a YAML file, as `papermill -f` takes them."""
    state = file.stat() if file.is_file() else None
    content = _parsed(file, state and (state.st_mtime_ns, state.st_size))
    if not isinstance(content, dict | None):
        raise InputError(f"{file}: must be a mapping")
    return copy.deepcopy(content) or {}


@functools.lru_cache(maxsize=64)
def _parsed(file: Path, state: tuple[int, int] | None) -> Any:
    """Return the content of a YAML file, cached by its state; callers must not change it."""
    return system.read_yaml(file)
