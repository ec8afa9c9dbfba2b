"""Configurations of runs, as frozen and validated dataclasses.

Each is a pydantic dataclass of primitives that rejects unknown names, wrong types and invalid values. Model
sizes are data (`SIZES`).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

PAD = 0  # item id of padding; real items are 1..num_items, MASK is num_items + 1

STRICT = ConfigDict(extra="forbid", strict=True)

# Below 2**63: larger ones fit neither the generators of torch (seeds) nor an array's shape.
Positive = Annotated[int, Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Inside = Annotated[float, Field(gt=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Objective = Literal["cloze", "next_item", "seed_focal"]
Loss = Literal["auto", "plain", "fused", "chunked", "inplace", "sampled_softmax", "gbce"]
CompileMode = Literal["off", "default", "reduce-overhead", "max-autotune", "graph"]
Core = Literal["fixed_point", "single_pass"]
Duplicates = Literal["keep", "exact", "first", "last"]
Window = Literal["last", "random"]
Norm = Literal["pre", "post"]

# GPU labels: every board of params/devices.yaml, and families of boards that differ in memory.
_Cpu = Literal["cpu", "cpu1", "cpu2"]
_Earlier = Literal["t4", "v100", "v100-16", "v100-32"]
_Recent = Literal["l4", "a10g", "a100", "a100-40", "a100-80", "h100", "h200", "rtx4090"]
GpuLabel = Literal["auto", _Cpu, _Earlier, _Recent]
GPU_LABELS: tuple[str, ...] = get_args(GpuLabel)
CPU_LABELS: tuple[str, ...] = get_args(_Cpu)

Kind = Literal["lora", "rslora", "ilora", "gated"]
RepresentationName = Literal["mean_embedding", "base_state", "causal_state"]
Controls = Literal["shuffled_user", "noise", "fixed_gate", "static_gate"]
CONTROLS: tuple[str, ...] = get_args(Controls)
Control = Literal["none", Controls]
ENCODER = ("qkv", "attention_out", "ffn_up", "ffn_down")

T = TypeVar("T")


class InputError(ValueError):
    """Wrong input by the user; printed in one line, without a traceback."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """One BERT4Rec encoder with its item tables (Sun et al., CIKM 2019, section 3)."""

    num_items: Positive  # catalogue size, special tokens apart
    hidden_dim: Positive = 64  # D
    table_dim: Positive | None = None  # E, width of the item vectors; None: D, with no projection between
    num_layers: Positive = 2
    num_heads: Positive = 2  # divides hidden_dim
    ffn_factor: Positive = 4  # inner width of the feed-forward part, in units of hidden_dim
    max_len: Positive = 200  # L, positions per packed row and longest history
    dropout: Probability = 0.1  # on embeddings and on both residual branches
    attention_dropout: Probability = 0.0  # on attention probabilities; above 0 it rules out fused attention
    norm: Norm = "pre"
    embedding_norm: bool = False  # LayerNorm right after the embedding
    final_norm: bool = True  # LayerNorm after the last layer
    positions: Literal["learned", "sinusoidal"] = "learned"
    position_origin: Literal["first", "last"] = "first"  # count from the first item or back from the last
    scale_items: bool = False  # multiply item vectors by sqrt(D) (Vaswani et al. 2017, section 3.4)
    head: Literal["linear", "mlp"] = "linear"  # mlp: Linear-GELU-LayerNorm-Dropout before the output table
    tied: bool = True  # the output table is the input table
    output_bias: bool = True
    output_mask_row: bool = True  # whether an untied output table has a row for MASK
    causal: bool = False  # a position attends to itself and earlier ones: the causal twin (SASRec)

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim={self.hidden_dim} must be divisible by num_heads={self.num_heads}")
        if self.positions == "sinusoidal" and self.hidden_dim % 2:
            raise ValueError(f"sinusoidal positions need an even hidden_dim, got {self.hidden_dim}")
        return self

    @property
    def table_width(self) -> int:
        """Width E of the item vectors in both tables."""
        return self.table_dim or self.hidden_dim

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
    columns: dict[str, str] | None = None  # own CSV or Parquet: user, item, time -> column name
    min_user: Positive = 5  # k-core: interactions that a user must have
    min_item: Positive = 5  # k-core: interactions that an item must have
    core: Core = "fixed_point"  # single_pass: the seed study's filter
    duplicates: Duplicates = "keep"  # repeated (user, item) pairs
    ties: Literal["source", "shuffle", "item"] = "source"  # order of a user's interactions at one time
    ties_seed: NonNegative = 0  # of ties='shuffle'
    merge_variants: bool = False  # items whose titles differ in size, colour or count alone are one item
    strict: bool = False  # stop at the first bad line instead of counting it
    max_rejected_share: Share = 0.01  # share of bad lines above which reading stops
    max_line_mb: Positive = 16  # longest line, and longest quoted field, of a text file
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
    mask_prob: Inside = 0.2  # share of positions that are masked
    last_item_share: Share = 0.15  # share of samples whose only masked item is the last
    visible_targets: bool = False  # cloze: the items that are not masked are targets too
    prefix_share: Share = 0.0  # share of samples that end at a random place of the history
    window: Window = "last"  # which max_len items of a longer history
    prior: Literal["none", "counts"] = "none"  # counts: pairwise counts in the logits: `CountPrior`
    # batches
    batch_size: Positive = 64  # sequences per optimiser step
    micro_batch_size: Positive | None = None  # sequences per forward pass; None: batch_size
    layout: Literal["packed", "padded"] = "packed"
    head_rows: Literal["targets", "all"] = "targets"  # positions that reach the output layer
    loss: Loss = "auto"  # routes to the full cross-entropy, or a sampled loss; see `losses`
    num_negatives: Positive = 256  # of a sampled loss, shared by the targets of a step
    negatives: Literal["uniform", "popularity"] = "uniform"  # distribution of negatives
    logq: bool = True  # sampled_softmax: correct each negative for how likely it was drawn
    gbce_t: Share = 0.75  # gbce: calibration; 0 is plain binary cross-entropy
    bucket_steps: Positive = 16  # sizes per octave of rows and targets; fewer (4) for compile_mode=graph
    # optimiser
    optimizer: Literal["fused", "loop", "muon"] = "fused"  # AdamW, AdamW without fusing, Muon; see `trainer`
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
        if self.visible_targets and self.objective != "cloze":
            raise ValueError(f"visible_targets is for objective='cloze', and objective is {self.objective!r}")
        if self.layout == "packed" and self.objective == "seed_focal":
            raise ValueError("objective='seed_focal' scores padded rows: it needs layout='padded'")
        return self

    @property
    def sampled(self) -> bool:
        """Whether the loss is over sampled items instead of the catalogue."""
        return self.loss in ("sampled_softmax", "gbce")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterConfig:
    """One adapter: its kind, size and targets."""

    kind: Kind = "lora"
    rank: Positive = 8  # r
    alpha: PositiveFloat = 8.0  # lora: the factor is alpha / rank
    dropout: Probability = 0.0  # on the adapter's input
    targets: tuple[str, ...] = ENCODER  # names of `ilora.TARGETS`, or paths of single modules
    num_experts: Positive = 4  # K, of `ilora`; divides rank
    representation: RepresentationName = "mean_embedding"  # input of the gate of `ilora`
    temperature: PositiveFloat = 1.0  # the gate is softmax(W z / temperature)
    control: Control = "none"  # `ilora` with something taken away: see `ilora.Representation`
    gate_seed: NonNegative = 0  # of the weights that control='fixed_gate' draws once
    gate_learning_rate: PositiveFloat = 1.0  # of the gate, in units of the adapter's; 0.3 in the paper's code
    gate_init: NonNegativeFloat = 1.0  # times torch's initial weights; 0: uniform at first

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
        """Factor of A x, before a gate: alpha / r, alpha / sqrt(r) or alpha K / r."""
        if self.kind == "rslora":
            return self.alpha / math.sqrt(self.rank)
        return self.alpha * (self.num_experts if self.kind == "ilora" else 1) / self.rank


# Named sizes. "num_items" is the catalogue for which the name states the parameter count; a run on another
# catalogue overrides it. 5m to 430m are the sizes of the seed study, counted in its audit.
_CPU = {"norm": "pre", "positions": "learned", "tied": True}
_SEED = {"positions": "sinusoidal", "norm": "post", "embedding_norm": True, "tied": False}
_SEED |= {"max_len": 50, "dropout": 0.25}
_5M = {"positions": "learned", "norm": "pre", "tied": False, "output_mask_row": False, "max_len": 50}


def _size(
    base: Mapping[str, Any], width: int, depth: int, heads: int, items: int, **overrides: Any
) -> dict[str, Any]:
    return dict(base, hidden_dim=width, num_layers=depth, num_heads=heads, num_items=items, **overrides)


SIZES: dict[str, dict[str, Any]] = {
    "nano": _size(_CPU, 32, 1, 1, 1349),
    "tiny": _size(_CPU, 64, 2, 2, 1349),
    "small": _size(_CPU, 128, 2, 4, 1349),
    "medium": _size(_CPU, 256, 2, 4, 1349),
    "5m": _size(_5M, 128, 2, 4, 18_345),
    "85m": _size(_SEED, 256, 4, 4, 159_748),
    "130m": _size(_SEED, 384, 4, 6, 159_748, head="mlp"),
    "430m": _size(_SEED, 1024, 8, 16, 159_748, head="mlp"),
}

# The family of the scaling experiment, `w<width>d<depth>`: heads of 32, tied tables as wide as the encoder.
# Width changes tables and encoder together; depth changes the encoder and leaves the tables as they are.
WIDTHS, DEPTHS = (32, 64, 96, 128, 192, 256, 384, 512, 1024), (1, 2, 4, 8)
SIZE_NAMES = f"{', '.join(SIZES)}, w{WIDTHS[0]}d{DEPTHS[0]} to w{WIDTHS[-1]}d{DEPTHS[-1]}"
SIZES |= {f"w{w}d{d}": _size(_CPU, w, d, w // 32, 3416) for w in WIDTHS for d in DEPTHS}


def model_config(size: str, **overrides: Any) -> ModelConfig:
    """Return the configuration of a named size; `overrides` replace single fields."""
    if size not in SIZES:
        raise InputError(f"unknown size {size!r}{nearest(size, SIZES)}; allowed: {SIZE_NAMES}")
    return validated(ModelConfig, SIZES[size] | overrides)


def divided(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide settings into fields of ModelConfig and of TrainConfig; raise `InputError` for others."""
    model, train = _names(ModelConfig), _names(TrainConfig)
    for name in settings:
        if name not in model + train:
            near = nearest(name, model + train)
            raise InputError(f"unknown setting {name!r}{near}: no field of ModelConfig or TrainConfig")
    return (
        {name: value for name, value in settings.items() if name in model},
        {name: value for name, value in settings.items() if name in train},
    )


def validated(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build the dataclass `kind` from `values`; raise `InputError` that names a wrong parameter."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise InputError("; ".join(_sentence(e, _names(kind)) for e in error.errors())) from None


def changed(config: T, **values: Any) -> T:
    """Return a copy of `config` with some fields replaced, validated again."""
    return validated(type(config), {name: getattr(config, name) for name in _names(config)} | values)


# Fields that were added after the first records.
LATER = {"max_line_mb", "prior", "ties", "ties_seed", "table_dim"}
LATER |= {"scale_items", "merge_variants", "visible_targets"}


def as_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as a dictionary, for records and hashes.

    The fields in `LATER` are left out at their defaults, which keeps the hashes of earlier runs.
    """
    later = {f.name: f.default for f in dataclasses.fields(config) if f.name in LATER}
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in later or v != later[k]}


def typed(text: str) -> Any:
    """Parse the value of `-p NAME VALUE` as papermill does: a number, True, False, None, or the text."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    return value if isinstance(value, bool | int | float | None) else text


def respelt(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` for the dataclass `kind`, converting texts to the types of fields; print conversions.

    Papermill and YAML 1.1 read `-p tied false` and `learning_rate: 1e-3` as text. A text that its field
    rejects is parsed as JSON if the field accepts the result. A list always is: errors then name its entry.
    """
    fields = get_type_hints(kind, include_extras=True)
    result = dict(values)
    for name, text in values.items():
        if name not in fields or not isinstance(text, str) or _accepts(fields[name], text):
            continue
        try:
            value = None if text == "none" else json.loads(text)
        except ValueError:
            continue
        if isinstance(value, list) or _accepts(fields[name], value):
            result[name] = value
            print(f"converted: {name}={text!r} -> {value!r}")
    return result


def _accepts(annotation: Any, value: Any) -> bool:
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def columns_of(text: str) -> dict[str, str] | None:
    """Return `DataConfig.columns` as written on a command line: user=A,item=B,time=C; None if empty."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if wrong := [role for role, _, column in pairs if role not in ("user", "item", "time") or not column]:
        raise InputError(f"expected pairs user=NAME,item=NAME,time=NAME in columns, not {wrong[0]!r}")
    return {role: column for role, _, column in pairs} or None


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return "(did you mean ...?)" for the nearest of the `allowed` names, or nothing."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _sentence(error: Any, names: list[str]) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown parameter {name!r}{nearest(name, names)}; allowed: {', '.join(names)}"
    if error["type"] == "missing":
        return f"parameter {name!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    reason = message[:1].lower() + message[1:]
    return f"parameter {name!r} is {error['input']!r}: {reason}" if name else message
