"""What a run is made of, as frozen and validated values.

Every configuration is a pydantic dataclass of primitives that refuses unknown names, wrong types and
impossible values. Model sizes are data (`SIZES`), not code.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]

Objective = Literal["cloze", "next_item", "seed_focal"]

Loss = Literal["auto", "plain", "fused", "chunked", "inplace", "sampled_softmax", "gbce"]

CompileMode = Literal["off", "default", "reduce-overhead", "max-autotune", "graph"]

# What may be claimed: every board of params/devices.yaml, and the family of boards that differ in memory.
_Cpu = Literal["cpu", "cpu1", "cpu2"]

_Old = Literal["t4", "v100", "v100-16", "v100-32"]

_New = Literal["l4", "a10g", "a100", "a100-40", "a100-80", "h100", "h200", "rtx4090"]

GpuLabel = Literal["auto", _Cpu, _Old, _New]

GPU_LABELS: tuple[str, ...] = get_args(GpuLabel)

CPU_LABELS: tuple[str, ...] = get_args(_Cpu)

PAD = 0  # item id of padding; real items are 1..num_items, MASK is num_items + 1

# Below 2**63: larger ones fit neither the generators of torch (seeds) nor an array's shape.
Positive = Annotated[int, Field(gt=0, lt=2**63)]

NonNegative = Annotated[int, Field(ge=0, lt=2**63)]

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]

Share = Annotated[float, Field(ge=0.0, le=1.0)]

PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]

NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

LATER = ("head_multiple", "half_copies", "prior")  # fields that came after the first records: see `as_dict`

STRICT = ConfigDict(extra="forbid", strict=True)

T = TypeVar("T")


class InputError(ValueError):
    """Something that the user gave is wrong: told in one line, without a traceback."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """One BERT4Rec encoder with its item tables (Sun et al., CIKM 2019, section 3)."""

    num_items: Positive  # catalogue size, special tokens apart
    hidden_dim: Positive = 64  # D
    num_layers: Positive = 2
    num_heads: Positive = 2  # divides hidden_dim
    ffn_factor: Positive = 4  # inner width of the feed-forward part, in units of hidden_dim
    max_len: Positive = 200  # L, positions per packed row and longest history
    dropout: Probability = 0.1  # on embeddings and on both residual branches
    attention_dropout: Probability = 0.0  # on attention probabilities; above 0 it rules out fused attention
    norm: Literal["pre", "post"] = "pre"
    embedding_norm: bool = False  # LayerNorm right after the embedding
    final_norm: bool = True  # LayerNorm after the last layer
    positions: Literal["learned", "sinusoidal"] = "learned"
    position_origin: Literal["first", "last"] = "first"  # count from the first item or back from the last
    head: Literal["linear", "mlp"] = "linear"  # mlp: Linear-GELU-LayerNorm-Dropout before the output table
    tied: bool = True  # the output table is the input table
    output_bias: bool = True
    output_mask_row: bool = True  # whether an untied output table has a row for MASK
    causal: bool = False  # a position sees itself and what is before it: the causal twin (SASRec)

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim={self.hidden_dim} must be divisible by num_heads={self.num_heads}")
        if self.positions == "sinusoidal" and self.hidden_dim % 2:
            raise ValueError(f"sinusoidal positions need an even hidden_dim, got {self.hidden_dim}")
        return self

    @property
    def mask_id(self) -> int:
        """Id of MASK."""
        return self.num_items + 1

    @property
    def vocab_size(self) -> int:
        """Rows of the input table: items, PAD and MASK."""
        return self.num_items + 2

    @property
    def output_rows(self) -> int:
        """Rows of the output table."""
        return self.num_items + 1 + int(self.tied or self.output_mask_row)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Which interactions, how they are read, and how they are filtered."""

    dataset: str = "ml-100k"  # a name, a file, or a prepared folder: see `prepare.source`
    format: str = "auto"  # a name of `formats.FORMATS`; auto: detected, or an error that names the choices
    columns: dict[str, str] | None = None  # own CSV or Parquet: user, item, time, rating -> column name
    min_user: Positive = 5  # k-core: interactions that a user must have
    min_item: Positive = 5  # k-core: interactions that an item must have
    core: Literal["fixed_point", "single_pass"] = "fixed_point"  # single_pass: the seed study's filter
    duplicates: Literal["keep", "exact", "first", "last"] = "keep"  # repeated (user, item) pairs
    strict: bool = False  # stop at the first bad line instead of counting it
    max_rejected_share: Share = 0.01  # share of bad lines above which reading stops
    memory_limit_mb: Positive = 512  # of the database that prepares the data
    synthetic_users: Positive = 300
    synthetic_items: Positive = 200
    synthetic_mean_len: PositiveFloat = 30.0  # interactions per user
    synthetic_seed: NonNegative = 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """One training run: objective, batches, optimiser, precision, stopping."""

    seed: NonNegative = 0
    # objective
    objective: Objective = "cloze"  # next_item: the causal twin's; seed_focal: the seed study's
    mask_prob: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2  # share of positions that are targets
    last_item_share: Share = 0.15  # share of samples whose only target is the last item
    prefix_share: Share = 0.0  # share of samples that end at a random place of the history
    window: Literal["last", "random"] = "last"  # which max_len items of a longer history
    prior: Literal["none", "counts"] = "none"  # counts: pairwise counts in the logits; see `evaluate.prior`
    # batches
    batch_size: Positive = 64  # sequences per optimiser step
    micro_batch_size: Positive | None = None  # sequences per forward pass; None: batch_size
    layout: Literal["packed", "padded"] = "packed"
    head_rows: Literal["targets", "all"] = "targets"  # positions that reach the output layer
    loss: Loss = "auto"  # routes to the full cross-entropy, or a sampled loss; see `losses`
    num_negatives: Positive = 256  # of a sampled loss, shared by the targets of a step
    negatives: Literal["uniform", "popularity"] = "uniform"  # what they are drawn from
    logq: bool = True  # sampled_softmax: correct each negative for how likely it was drawn
    gbce_t: Share = 0.75  # gbce: calibration; 0 is plain binary cross-entropy
    head_multiple: Positive = 1  # scored rows of the output table are filled up to a multiple of this
    bucket_steps: Positive = 16  # sizes per octave of rows and targets; fewer (4) for compile_mode=graph
    # optimiser
    optimizer: Literal["fused", "loop"] = "fused"  # loop: one tensor at a time, torch's default on CPU
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.01
    lr_warmup_steps: NonNegative = 100  # optimiser steps of linear warm-up
    lr_final_share: Share = 0.0  # share of the learning rate that the cosine ends at
    clip_norm: PositiveFloat | None = 1.0  # global gradient norm; None: no clipping
    # length and stopping
    epochs: Positive = 100  # passes over the users; the cosine ends with the last
    max_steps: Positive | None = None  # stop earlier; the cosine then ends here
    eval_every: Positive = 5  # epochs between evaluations on validation
    patience: NonNegative = 0  # evaluations without a better NDCG@10 before stopping; 0: never
    checkpoint_seconds: NonNegativeFloat = 60.0  # between checkpoints; 0: after every step
    # device
    precision: Precision = "auto"
    half_copies: bool = False  # in bf16 and fp16, cast all weights by one call a step; no effect elsewhere
    compile_mode: CompileMode = "off"  # graph: whole steps as CUDA graphs, off CUDA no effect; see `trainer`

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> TrainConfig:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of micro_batch_size={self.micro_batch_size}"
            )
        if self.head_rows == "all" and self.loss not in ("auto", "plain"):
            raise ValueError(f"head_rows='all' holds all logits: it needs loss='plain', not {self.loss!r}")
        if self.objective == "seed_focal" and self.sampled:
            raise ValueError(f"objective='seed_focal' is over all items: it knows no loss={self.loss!r}")
        if self.prior != "none" and (
            self.sampled
            or self.objective == "seed_focal"
            or self.head_rows == "all"
            or self.loss == "fused"
            or self.compile_mode == "graph"
        ):
            raise ValueError(
                f"prior={self.prior!r} needs the logits of a full cross-entropy at the targets: objective "
                "cloze or next_item, head_rows='targets', loss auto, plain, chunked or inplace, and no "
                "compile_mode='graph'"
            )
        if self.layout == "packed" and self.objective == "seed_focal":
            raise ValueError("objective='seed_focal' scores padded rows: it needs layout='padded'")
        return self

    @property
    def sampled(self) -> bool:
        """Whether the loss looks at sampled items instead of the catalogue."""
        return self.loss in ("sampled_softmax", "gbce")


_SEED = {"positions": "sinusoidal", "norm": "post", "embedding_norm": True, "tied": False}

_SEED |= {"max_len": 50, "dropout": 0.25}

_CPU = {"norm": "pre", "positions": "learned", "tied": True}

# Named sizes. "num_items" is the catalogue that the name's parameter count belongs to; a run on another
# catalogue overrides it. 5m to 430m are those of the seed study, counted in its audit.
SIZES: dict[str, dict[str, Any]] = {
    "nano": _CPU | {"hidden_dim": 32, "num_layers": 1, "num_heads": 1, "num_items": 1349},
    "tiny": _CPU | {"hidden_dim": 64, "num_layers": 2, "num_heads": 2, "num_items": 1349},
    "small": _CPU | {"hidden_dim": 128, "num_layers": 2, "num_heads": 4, "num_items": 1349},
    "medium": _CPU | {"hidden_dim": 256, "num_layers": 2, "num_heads": 4, "num_items": 1349},
    "5m": {
        "hidden_dim": 128,
        "num_layers": 2,
        "num_heads": 4,
        "max_len": 50,
        "positions": "learned",
        "norm": "pre",
        "tied": False,
        "output_mask_row": False,
        "num_items": 18_345,
    },
    "85m": _SEED | {"hidden_dim": 256, "num_layers": 4, "num_heads": 4, "num_items": 159_748},
    "130m": _SEED | {"hidden_dim": 384, "num_layers": 4, "num_heads": 6, "num_items": 159_748, "head": "mlp"},
    "430m": _SEED
    | {"hidden_dim": 1024, "num_layers": 8, "num_heads": 16, "num_items": 159_748, "head": "mlp"},
}

# The family of the scaling experiment, `w<width>d<depth>`: heads of 32, tied tables as wide as the encoder.
# Width changes tables and encoder together; depth changes the encoder and leaves the tables as they are.
WIDTHS, DEPTHS = (32, 64, 96, 128, 192, 256, 384), (1, 2, 4, 8)

SIZES |= {
    f"w{width}d{depth}": _CPU
    | {"hidden_dim": width, "num_layers": depth, "num_heads": width // 32, "num_items": 3416}
    for width in WIDTHS
    for depth in DEPTHS
}

_FIRST = f"w{WIDTHS[0]}d{DEPTHS[0]}"

SIZE_NAMES = ", ".join([*list(SIZES)[: list(SIZES).index(_FIRST)], f"{_FIRST} to {list(SIZES)[-1]}"])


def model_config(size: str, **overrides: Any) -> ModelConfig:
    """Return the configuration of a named size; `overrides` replace single fields."""
    if size not in SIZES:
        raise InputError(f"unknown size {size!r}{nearest(size, SIZES)}; allowed: {SIZE_NAMES}")
    return validated(ModelConfig, SIZES[size] | overrides)


def divided(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that are fields of ModelConfig and those of TrainConfig; refuse all others."""
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    model, train = ({f.name for f in dataclasses.fields(kind)} for kind in (ModelConfig, TrainConfig))
    for name, value in settings.items():
        if name not in model | train:
            raise InputError(
                f"unknown setting {name!r}{nearest(name, model | train)}: no field of "
                "ModelConfig or TrainConfig"
            )
        parts[name in train][name] = value
    return parts


def validated(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build the dataclass `kind` from `values`; raise `InputError` that names the parameter otherwise."""
    try:
        return kind(**values)
    except ValidationError as error:
        names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
        raise InputError("; ".join(_sentence(e, names) for e in error.errors())) from None


# Spellings that papermill and YAML 1.1 take for text: `-p use_amp false`, `learning_rate: 1e-3`.
_SPELLINGS: dict[str, bool | None] = {"false": False, "true": True, "null": None, "none": None}

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def typed(text: str) -> Any:
    """Read the value of a `-p NAME VALUE` as papermill does; `respelt` does the rest."""
    words: dict[str, Any] = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def respelt(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` for the dataclass `kind` with known misspellings undone; print what was converted.

    A text is converted only where its field refuses it and takes what it stands for, or where it is a list.
    """
    fields = get_type_hints(kind, include_extras=True)
    result = dict(values)
    for name, value in values.items():
        if name not in fields or not isinstance(value, str) or _accepts(fields[name], value):
            continue
        candidate = _meant(value)
        # A list is converted even if the field refuses it, so that the message is about what is in it.
        if candidate != value and (isinstance(candidate, list) or _accepts(fields[name], candidate)):
            result[name] = candidate
            print(f"converted: {name}={value!r} -> {candidate!r}")
    return result


def _meant(text: str) -> Any:
    if text in _SPELLINGS:
        return _SPELLINGS[text]
    if _EXPONENT.fullmatch(text):
        return float(text)
    if text.startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            pass
    return text


def _accepts(annotation: Any, value: Any) -> bool:
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def changed(config: T, **values: Any) -> T:
    """Return a copy of `config` with some fields replaced, validated again."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    return validated(type(config), fields | values)


def as_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as it is recorded and hashed.

    Fields that `LATER` names are left out at their defaults: the hashes of runs from before they were there
    stay what they were.
    """
    later = {f.name: f.default for f in dataclasses.fields(config) if f.name in LATER}
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in later or v != later[k]}


def nearest(name: str, allowed: Any) -> str:
    """Return "(did you mean ...?)" for the nearest of the `allowed` names, or nothing."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _sentence(error: Any, names: list[str]) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "configuration"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown parameter {where!r}{nearest(where, names)}; allowed: {', '.join(names)}"
    if error["type"] == "missing":
        return f"parameter {where!r} is missing"
    said = error["msg"].removeprefix("Value error, ")
    if where == "configuration":
        return said
    return f"parameter {where!r} is {error['input']!r}: {said[:1].lower()}{said[1:]}"


Kind = Literal["lora", "rslora", "ilora", "gated"]

RepresentationName = Literal["mean_embedding", "base_state", "causal_state"]

Controls = Literal["shuffled_user", "noise", "fixed_gate", "static_gate"]

CONTROLS: tuple[str, ...] = get_args(Controls)

Control = Literal["none", Controls]

ENCODER = ("qkv", "attention_out", "ffn_up", "ffn_down")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterConfig:
    """One adapter: its kind, its size, and what of the model it adapts."""

    kind: Kind = "lora"
    rank: Positive = 8  # r
    alpha: PositiveFloat = 8.0  # lora: the factor is alpha / rank
    dropout: Probability = 0.0  # on the adapter's input
    targets: tuple[str, ...] = ENCODER  # names of `ilora.TARGETS`, or paths of single modules
    num_experts: Positive = 4  # K, of `ilora`; divides rank
    representation: RepresentationName = "mean_embedding"  # what the gate of `ilora` looks at
    temperature: PositiveFloat = 1.0  # the gate is softmax(W z / temperature)
    control: Control = "none"  # `ilora` with something taken away: see `ilora.Representation`
    gate_seed: NonNegative = 0  # of the weights that control='fixed_gate' draws once
    gate_learning_rate: PositiveFloat = 1.0  # of the gate, in units of the adapter's; 0.3 in the paper's code
    gate_init: Annotated[float, Field(ge=0.0)] = 1.0  # times torch's initial weights; 0: uniform at first

    @model_validator(mode="after")
    def _experts_divide(self) -> AdapterConfig:
        if not self.targets:
            raise ValueError("targets is empty: an adapter needs at least one")
        if self.kind == "ilora" and self.rank % self.num_experts:
            raise ValueError(f"rank={self.rank} must be divisible by num_experts={self.num_experts}")
        if self.kind != "ilora" and self.control != "none":
            raise ValueError(f"control={self.control!r} is one of kind='ilora', not of {self.kind!r}")
        return self

    @property
    def scaling(self) -> float:
        """What A x is multiplied by, before a gate: alpha / r, alpha / sqrt(r) or alpha K / r."""
        if self.kind == "rslora":
            return self.alpha / math.sqrt(self.rank)
        return self.alpha * (self.num_experts if self.kind == "ilora" else 1) / self.rank
