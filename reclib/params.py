"""The parameters of each notebook: from its cell, through profiles, to a validated value.

A notebook states its parameters in one cell tagged `parameters`, which papermill may override, and
makes a frozen dataclass of them in the next: `p = params.read("02_baseline", globals())`.

To add a notebook: a dataclass in `NOTEBOOKS`, and a section in `params/smoke.yaml` that equals its
parameters cell (the other profiles state only what differs from smoke).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import yaml
from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from reclib import injected, paths
from reclib.config import (
    SIZES,
    STRICT,
    CompileMode,
    DataConfig,
    GpuLabel,
    InputError,
    Loss,
    NonNegative,
    Positive,
    PositiveFloat,
    Precision,
    Probability,
    Share,
    validated,
)

PROFILES = ("smoke", "quick", "full")
# Who runs it, where and how often is not how much work one run is: a profile's name ignores these.
_NOT_WORK = frozenset({"gpu", "seed", "seeds", "wandb_mode"})

T = TypeVar("T")


def _known_size(name: str) -> str:
    if name not in SIZES:
        raise ValueError(f"unknown size{nearest(name, SIZES)}; allowed: {', '.join(SIZES)}")
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
BatchSizes = Annotated[list[Positive], Field(min_length=1), AfterValidator(_distinct)]
Models = Annotated[list[Literal["bert4rec", "causal"]], Field(min_length=1), AfterValidator(_distinct)]
OtherSplits = Annotated[list[Literal["global_time", "random_users"]], AfterValidator(_distinct)]
WandbMode = Literal["disabled", "offline", "online"]


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
        asked = {name: value for name, value in values(self).items() if name not in ("gpu", "seed")}
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
    wandb_mode: WandbMode  # disabled: nothing; offline: files only; online: needs a login

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> Baseline:
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


def _divides(batch_size: int, micro_batch_size: int | None) -> None:
    if micro_batch_size is not None and batch_size % micro_batch_size:
        raise ValueError(f"batch_size={batch_size} must be a multiple of micro_batch_size={micro_batch_size}")


NOTEBOOKS: dict[str, type] = {
    "01_data_prep": DataPrep,
    "02_baseline": Baseline,
    "04_amp_compile": AmpCompile,
}


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
    return build(notebook, given | injected.strangers(namespace, known))


def build(notebook: str, values: Mapping[str, Any]) -> Any:
    """Validate `values` into the notebook's dataclass; undone misspellings are printed."""
    fields = get_type_hints(kind(notebook), include_extras=True)
    converted = {}
    for name, value in values.items():
        converted[name] = injected.respelt(value, fields[name]) if name in fields else value
        if converted[name] is not value:
            print(f"converted: {name}={value!r} -> {converted[name]!r}")
    return validated(kind(notebook), converted)


def fill(p: T, label: str) -> T:
    """Return `p` with what is None filled from `params/gpu/<label>.yaml`, if there is one.

    `label` is that of the device that is really there. A value that was given is never replaced.
    """
    file = paths.params() / "gpu" / f"{label}.yaml"
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
    if name not in PROFILES:
        raise InputError(f"unknown profile {name!r}{nearest(name, PROFILES)}; allowed: {', '.join(PROFILES)}")
    smoke = _section("smoke", notebook)
    if not smoke:
        raise InputError(f"params/smoke.yaml has no section {notebook!r}")
    return smoke | _section(name, notebook)


def profile_of(notebook: str, p: Any) -> str:
    """Return the profile whose work `p` is, or "custom": found by comparing, so it cannot lie.

    Where profiles ask for the same work it is the largest of them: there is nothing left out to warn of.
    Ignored are the device label, the seeds, the tracker, and what the device file decides.
    """
    given = values(p)
    from_device = device_names()
    for name in reversed(PROFILES):
        section = profile(notebook, name)
        if all(
            given[key] == value
            for key, value in section.items()
            if key not in _NOT_WORK and not (value is None and key in from_device)
        ):
            return name
    return "custom"


def device_names() -> frozenset[str]:
    """Return the names of the parameters that any `params/gpu/*.yaml` decides."""
    files = sorted((paths.params() / "gpu").glob("*.yaml"))
    return frozenset(name for file in files for name in _mapping(file))


def _section(profile_name: str, notebook: str) -> dict[str, Any]:
    file = paths.params() / f"{profile_name}.yaml"
    section = _mapping(file).get(notebook) or {}
    if not isinstance(section, dict):
        raise InputError(f"{file.name}: section {notebook!r} must be a mapping of parameters")
    return section


def _mapping(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{file}{line}: not valid YAML") from None
    if content is not None and not isinstance(content, dict):
        raise InputError(f"{file}: must be a mapping")
    return content or {}


def nearest(name: str, allowed: Any) -> str:
    """Return "(did you mean ...?)" for the nearest of the `allowed` names, or nothing."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
