"""The published figures of the study that this one started from, recomputed: counts, rates, shares, errors.

Pure functions of `params/published/seed_study.yaml`, which holds what was published with its sources.
Nothing here is measured, and nothing needs that study's code or data: a parameter count follows from a
shape, a rate and an epoch time from each other. What has to be run is in `audit` (its adapters on torch's
own modules) and in `audit` (its loss and its metric on real data).

Shapes: N rows of an item table (items, PAD and MASK), D hidden_dim, L layers, r rank of an adapter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclib.config import PAD, InputError, ModelConfig, TrainConfig, changed, model_config, validated
from reclib.cost.work import BACKWARD, encoder_forward, head_forward, layer_linear
from reclib.data.batches import IGNORE, Batch, Epoch
from reclib.data.dataset import Dataset, Evaluation, Histories
from reclib.data.splits import Split, random_users
from reclib.evaluate import metrics
from reclib.evaluate.metrics import Outcome
from reclib.evaluate.statistics import ALPHA
from reclib.experiments.baseline import COMPARED, flat, run_folder
from reclib.experiments.speed import SEED_TRAIN
from reclib.hardware import Device
from reclib.model.bert4rec import Bert4Rec, count_parameters
from reclib.parameters import Audit
from reclib.train.fit import data_identity, fit
from reclib.train.trainer import Trainer

Verdict = Literal["holds", "holds in part", "contradicted", "not supported"]

TENSOR_PEAK = 312e12  # FLOP/s, dense 16-bit peak of the A100 that the study names

POWER = 0.8


class Shape(NamedTuple):
    """What a parameter count of the study's larger models follows from, beside the catalogue."""

    hidden_dim: int
    num_layers: int
    output_ffn: bool  # a Linear and a LayerNorm before the output table


def shape_of(model: Mapping[str, Any]) -> Shape:
    """Return the shape of an entry of `models`."""
    return Shape(model["hidden_dim"], model["num_layers"], model["output_ffn"])


def fixed_parameters(shape: Shape) -> int:
    """Count what does not grow with the catalogue: layers, two further LayerNorms, the output FFN."""
    D, L, ffn = shape
    return L * (12 * D * D + 13 * D) + 4 * D + (D * D + 3 * D if ffn else 0)


def parameters(rows: int, shape: Shape) -> int:
    """Count all parameters: two tables of `rows` vectors, an output bias, and the fixed ones."""
    return rows * (2 * shape.hidden_dim + 1) + fixed_parameters(shape)


def rows_of(total: int, shape: Shape) -> int | None:
    """Return the table rows N that give exactly `total` parameters; None where no whole number does."""
    rows, rest = divmod(total - fixed_parameters(shape), 2 * shape.hidden_dim + 1)
    return rows if rest == 0 and rows > 0 else None


def rows_within(millions: float, shape: Shape, decimals: int = 2) -> range:
    """Return all N whose count, in millions, is `millions` to so many decimals."""
    half, each = 0.5 * 10 ** (6 - decimals), 2 * shape.hidden_dim + 1
    given = millions * 1e6 - fixed_parameters(shape)
    return range(math.ceil((given - half) / each), math.floor((given + half) / each) + 1)


def solve_rows(models: Iterable[Mapping[str, Any]]) -> list[int]:
    """Return every N that gives all rounded counts of `models` at once."""
    ranges = [rows_within(m["published_millions"], shape_of(m)) for m in models if "published_millions" in m]
    if not ranges:
        raise InputError("no entry of 'models' has published_millions: expected one or more")
    return sorted(set.intersection(*(set(found) for found in ranges)))


def exact_shapes(total: int, widths: Iterable[int], most_layers: int) -> list[tuple[Shape, int]]:
    """Return every shape of a scan, with its N, that gives exactly `total` parameters."""
    shapes = [Shape(D, L, ffn) for D in widths for L in range(1, most_layers + 1) for ffn in (False, True)]
    return [(shape, rows) for shape in shapes if (rows := rows_of(total, shape)) is not None]


def addmm_flops(rows: int, hidden_dim: int, num_layers: int, tokens: int) -> int:
    """Count the products with a bias of one forward pass: output table, output FFN, and 9 D^2 a layer.

    A layer's are the attention's output (D^2) and the feed-forward part (8 D^2); its fused input projection
    is no aten::addmm in the published profiles.
    """
    D = hidden_dim
    return 2 * tokens * (D * rows + D * D + num_layers * 9 * D * D)


def parameter_table(models: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Count the parameters of each published model, by where they are."""
    rows = []
    for model in models:
        config = model_config(model["size"])
        counted = count_parameters(config)
        claimed = model.get("published_parameters") or round(model["published_millions"] * 1e6)
        decimals = 0 if "published_parameters" in model else 4  # of the rounded last digit, in powers of 10
        rows.append(
            {
                "name": model["name"],
                "published": claimed,
                "counted": counted["total"],
                "agrees": round(counted["total"], -decimals) == claimed,
                "item_tables": counted["item_tables"],
                "positions": counted["positions"],
                "non_embedding": counted["non_embedding"],
                "non_embedding_share": counted["non_embedding"] / counted["total"],
                "if_tied": counted["total"] - config.output_rows * config.hidden_dim,
            }
        )
    return rows


def padded_flops(config: ModelConfig) -> tuple[int, int]:
    """Return training FLOPs per sequence, (all, those of the head): padded to max_len, head everywhere."""
    head = head_forward(config, config.max_len, config.output_rows)
    return tuple((1 + BACKWARD) * part for part in (encoder_forward(config, 1, None) + head, head))  # type: ignore[return-value]


def needed_flops(config: ModelConfig, mean_len: float, targets: float) -> float:
    """Return training FLOPs per sequence of `mean_len` real items and so many `targets`, without waste.

    Attention is counted for the mean length, which is a lower bound: it grows with the square.
    """
    D = config.hidden_dim
    layer = layer_linear(config, 1, 1) * mean_len + 4 * mean_len**2 * D
    head = (head_forward(config, 1, config.num_items)) * targets
    return (1 + BACKWARD) * (config.num_layers * layer + head)


def headroom(models: Iterable[Mapping[str, Any]], mean_len: float, targets: float) -> list[dict[str, Any]]:
    """Return what a padded step of each large model computes and what its objective needs, per sequence."""
    rows = []
    for model in (m for m in models if "hidden_dim" in m):
        config = model_config(model["size"])
        everything, head = padded_flops(config)
        needed = needed_flops(config, mean_len, targets)
        rows.append(
            {
                "name": model["name"],
                "padded_flops": everything,
                "needed_flops": needed,
                "factor": everything / needed,
                "head_share": head / everything,
            }
        )
    return rows


def rates(runs: Iterable[Mapping[str, Any]], flops: Mapping[str, int]) -> list[dict[str, Any]]:
    """Compare claimed rates with epoch times and the sequences that exist.

    `ratio` is claimed rate times epoch time over sequences, 1 where they agree. `work` gives training FLOPs
    per sequence by the model's name; where it is known, so is the arithmetic that a rate implies, in FLOP/s.
    """
    rows = []
    for run in runs:
        product = run["claimed_per_second"] * run["epoch_seconds"]
        by_clock = run["sequences"] / run["epoch_seconds"]
        each = flops.get(run["name"].split(",")[0])
        rows.append(
            {
                "name": run["name"],
                "source": run["source"],
                "claimed_per_second": run["claimed_per_second"],
                "epoch_seconds": run["epoch_seconds"],
                "sequences": run["sequences"],
                "claimed_in_epoch": product,
                "ratio": product / run["sequences"],
                "by_clock_per_second": by_clock,
                "claimed_flops_per_second": each and run["claimed_per_second"] * each,
                "by_clock_flops_per_second": each and by_clock * each,
            }
        )
    return rows


def gain(row: Mapping[str, Any]) -> float:
    """Return by how much `after` is better than `before`, as a factor."""
    ratio = row["after"] / row["before"]
    return ratio if row["better"] == "more" else 1 / ratio


def cut(row: Mapping[str, Any]) -> float:
    """Return the share of `before` that `after` saves."""
    return 1 - row["after"] / row["before"]


class Separation(NamedTuple):
    """How far two hit rates over equally many predictions are apart, in units of what chance moves them."""

    difference: float
    error: float  # standard error of one of the two rates
    in_errors: float  # the difference, in units of `error`
    z: float  # the difference over its own standard error, the two taken as independent
    p: float  # two-sided
    needed: int  # predictions at which this difference would be found with a power of 80 %


def separation(first: float, second: float, count: int) -> Separation:
    """Compare two shares, each over `count` predictions, by the normal approximation.

    Independence is the only assumption that published rates allow. The same users stand behind both: pairing
    could make the test sharper; counting several predictions of one user as independent makes it too sharp.
    """
    from scipy import stats

    if not (0 < first < 1 and 0 < second < 1 and count > 1):
        raise InputError(
            f"shares {first} and {second} over {count}: expected shares inside (0, 1), count above 1"
        )
    pooled = (first + second) / 2
    spread = pooled * (1 - pooled)
    difference = second - first
    error = math.sqrt(spread / count)
    z = difference / (math.sqrt(2) * error)
    reach = float(stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(POWER))
    needed = math.ceil(2 * spread * (reach / difference) ** 2) if difference else 0
    return Separation(difference, error, abs(difference) / error, z, float(2 * stats.norm.sf(abs(z))), needed)


class AdapterCount(NamedTuple):
    """Trainable parameters of the study's adapters, by where they are."""

    encoder: int  # attention output and both feed-forward maps of every layer, the dead ones among them
    output_ffn: int
    head: int
    gates: int  # one scalar a module
    dead: int  # of `encoder`: on the attention's output, which is never called

    @property
    def total(self) -> int:
        """All but the scalars: what its log prints."""
        return self.encoder + self.output_ffn + self.head

    @property
    def head_share(self) -> float:
        """Share of the output table's adapter."""
        return self.head / self.total


def adapter_count(rows: int, hidden_dim: int, num_layers: int, rank: int) -> AdapterCount:
    """Count them: 2 r D of each D x D map, 5 r D of each feed-forward map, r (D + N) of the output table."""
    D, L, r = hidden_dim, num_layers, rank
    return AdapterCount(
        encoder=L * 12 * D * r, output_ffn=2 * D * r, head=r * (D + rows), gates=3 * L + 2, dead=L * 2 * D * r
    )


def linear_calls(num_layers: int, out_proj_runs: bool) -> int:
    """Return calls of a linear map in one forward pass with three adapted maps a layer and two in the head.

    An adapted map that runs is three calls: itself, A and B. The attention's input projection is one, and so
    is its output projection where torch takes the weight and never calls the module.
    """
    return num_layers * (1 + (3 if out_proj_runs else 1) + 3 + 3) + 3 + 3


def mean_targets(mask_prob: float, mean_len: float) -> float:
    """Return the expected masked positions of a sequence: the last always, others with mask_prob."""
    return 1 + mask_prob * (mean_len - 1)


def logits_bytes(sequences: int, max_len: int, rows: int, bytes_each: int = 4) -> int:
    """Return the size of the logits of all positions of a batch."""
    return sequences * max_len * rows * bytes_each


# ------------------------------------------------------------------------------------------------
# What torch's own modules do with an adapter that stands in the place of a linear map inside them.
#
# Two shortcuts take a map's weight and never call the map:
#
# - `nn.MultiheadAttention` hands `out_proj.weight` to `F.multi_head_attention_forward`, always: an adapter
#   there is never executed and gets no gradient (PEFT's documentation of its layer for it says so);
# - `nn.TransformerEncoderLayer` in `eval()` hands all its weights to one fused operator (the "fast path"),
#   unless autograd needs one of them. The base of an adapter is frozen, so it does not.
#
# `ScalarGateLora` re-creates, in our own words, the adapter of the study that this one started from. It
# keeps the weight and bias of its base visible, as a module must that torch looks into: so nothing
# complains.
#
# Shapes: B sequences, T positions, D hidden_dim, r rank, N rows of an output table.

Mode = Literal["train", "eval", "eval, fast path off", "eval, CPU autocast"]

MODES: tuple[Mode, ...] = ("train", "eval", "eval, fast path off", "eval, CPU autocast")

PLACES = ("out_proj", "linear1", "linear2")  # of a layer, where that study adapts it


class ScalarGateLora(nn.Module):
    """W x + sigmoid(a) (alpha / r) B A x: a frozen map and a low-rank one, gated by one learned scalar.

    The scalar does not see the instance. It folds into B (`folded`), so that what this can represent is what
    LoRA of the same rank can.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.gate = nn.Parameter(torch.zeros(()))
        self.scaling = alpha / rank

    @property
    def weight(self) -> Tensor:
        """The base's own weight: what torch's shortcuts take."""
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        """The base's own bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in)."""
        return self.base(x) + self.gate.sigmoid() * self.scaling * self.lora_B(self.lora_A(x))

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """Return one plain linear map that does the same for every input."""
        plain = nn.Linear(self.base.in_features, self.base.out_features)
        delta = self.gate.sigmoid() * self.scaling * self.lora_B.weight @ self.lora_A.weight
        plain.weight.copy_(self.weight + delta)
        plain.bias.copy_(self.bias)
        return plain


class Adapted(NamedTuple):
    """A frozen encoder of torch's own layers with adapters inside, and an input for it."""

    encoder: nn.TransformerEncoder
    x: Tensor  # (B, T, D)

    def adapters(self) -> dict[str, ScalarGateLora]:
        """Return the adapters by the name of their place."""
        found = dict(self.encoder.named_modules())
        return {name: one for name, one in found.items() if isinstance(one, ScalarGateLora)}


def adapted_encoder(
    hidden_dim: int = 64, num_layers: int = 2, num_heads: int = 4, rank: int = 8, seed: int = 0
) -> Adapted:
    """Build torch's encoder (post-norm, GELU, batch first, without dropout), freeze it, adapt each layer.

    B is drawn at random and not zero, so that an adapter that runs changes the output.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(
            hidden_dim, num_heads, 4 * hidden_dim, dropout=0.0, activation="gelu", batch_first=True
        )
        encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False).requires_grad_(False)
        for one in encoder.layers:
            one.self_attn.out_proj = ScalarGateLora(one.self_attn.out_proj, rank, 2.0 * rank)
            one.linear1 = ScalarGateLora(one.linear1, rank, 2.0 * rank)
            one.linear2 = ScalarGateLora(one.linear2, rank, 2.0 * rank)
        found = Adapted(encoder, torch.randn(4, 10, hidden_dim))
        for adapter in found.adapters().values():
            nn.init.normal_(adapter.lora_B.weight, std=0.5)
    return found


def gradients(adapted: Adapted) -> dict[str, float | None]:
    """Return the norm of the gradient of B after one backward pass in train mode; None: it got none."""
    adapted.encoder.train().zero_grad()
    adapted.encoder(adapted.x).square().sum().backward()
    return {
        name: None if (grad := one.lora_B.weight.grad) is None else float(grad.norm())
        for name, one in adapted.adapters().items()
    }


@contextlib.contextmanager
def silenced(adapted: Adapted, place: str) -> Iterator[None]:
    """Set B of the adapters at `place` ("" for all) to zero for so long: they then add nothing."""
    chosen = [one for name, one in adapted.adapters().items() if name.endswith(place)]
    kept = [one.lora_B.weight.detach().clone() for one in chosen]
    with torch.no_grad():
        for one in chosen:
            one.lora_B.weight.zero_()
        yield
        for one, weight in zip(chosen, kept, strict=True):
            one.lora_B.weight.copy_(weight)


def output(adapted: Adapted, mode: Mode) -> Tensor:
    """Return the encoder's output (B, T, D) in a mode; autograd stays on, as it is in that study's loop."""
    encoder, before = adapted.encoder, torch.backends.mha.get_fastpath_enabled()
    encoder.train(mode == "train")
    try:
        torch.backends.mha.set_fastpath_enabled(mode != "eval, fast path off")
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "eval, CPU autocast"):
            return encoder(adapted.x).detach().float()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        encoder.train()


def effect(adapted: Adapted, mode: Mode, place: str = "") -> float:
    """Return the largest change of any output when the adapters at `place` (all by default) are silenced."""
    spoken = output(adapted, mode)
    with silenced(adapted, place):
        quiet = output(adapted, mode)
    return float((spoken - quiet).abs().max())


def effects(adapted: Adapted) -> list[dict[str, Any]]:
    """Return a row for each mode: the effect of the adapters at each place, and of all."""
    places = {**{name: name for name in PLACES}, "all": ""}
    return [
        {"mode": mode} | {name: effect(adapted, mode, place) for name, place in places.items()}
        for mode in MODES
    ]


def counted_linear_calls(num_layers: int, rank: int = 8, hidden_dim: int = 16, rows: int = 32) -> int:
    """Count calls of `F.linear` in one training pass of an adapted model of `num_layers`.

    The model is that study's: the encoder, an adapted linear map (`output_ffn`), an adapted output table.
    """
    adapted = adapted_encoder(hidden_dim, num_layers, 2, rank)
    head = nn.Sequential(
        ScalarGateLora(nn.Linear(hidden_dim, hidden_dim), rank, rank),
        ScalarGateLora(nn.Linear(hidden_dim, rows), rank, rank),
    )
    with patch.object(F, "linear", wraps=F.linear) as counted:  # what modules and torch's own functions call
        head(adapted.encoder(adapted.x))
    return counted.call_count


# ------------------------------------------------------------------------------------------------
# The seed study's loss and its metric on real data, beside the ones that answer the question.
#
# Two trainings of one model on the same histories, in the same order, with the same masks: one minimises
# focal cross-entropy over every position that is not padding (`seed_focal`), the other cross-entropy at the
# masked positions (`cloze`). Epochs of both are chosen by the next item on validation, which is kind to the
# first: its study chose by its own metric. Both are then scored both ways, under that study's split of
# users.
#
# What deviates from the original: masks are drawn as ours are (in a share of the samples the last item
# alone, instead of the last item in all), and the model is a small one of ours.
#
# Shapes: R rows, L positions, V rows of the output table.

OBJECTIVES = ("seed_focal", "cloze")

SHARES = (
    0.6,
    0.1,
    0.3,
)  # of the users that train, validate and test; the study's 0.8, 0.1, 0.1 leaves few here

FRESH = 1_000_000  # number of an epoch that no training reaches: its masks are drawn for looking only


def configurations(p: Audit, dataset: Dataset, objective: str, seed: int) -> tuple[ModelConfig, TrainConfig]:
    """Return the model and the training of an objective; nothing else differs between the two."""
    model = model_config(
        p.size, num_items=dataset.num_items, max_len=p.max_len, dropout=p.dropout, tied=False
    )
    names = ("epochs", "batch_size", "learning_rate", "mask_prob", "last_item_share", "eval_every")
    train = validated(TrainConfig, {name: getattr(p, name) for name in names} | {"seed": seed})
    if objective == "seed_focal":
        theirs = {name: SEED_TRAIN[name] for name in ("objective", "layout", "head_rows", "loss")}
        train = changed(train, **theirs)
    return model, train


def divided(dataset: Dataset, seed: int) -> Split:
    """Divide users at random as that study does: whole histories train, others' last items are targets."""
    return random_users(dataset, SHARES, seed)


def train(
    notebook: str, p: Audit, dataset: Dataset, split: Split, device: Device, objective: str, seed: int
) -> Trainer:
    """Train one objective with one seed, or go on with a run of the same code and data."""
    model, config = configurations(p, dataset, objective, seed)
    folder = run_folder(notebook, model, config, data_identity(dataset, split))
    return fit(model, dataset, config, device, folder, split=split)


def untrained(trainer: Trainer, seed: int) -> Bert4Rec:
    """Return the model that the trainer's run began with."""
    torch.manual_seed(seed)
    return Bert4Rec(trainer.model.config).to(trainer.where)


class LossParts(NamedTuple):
    """What the focal loss over all positions consists of."""

    visible_share: float  # of the positions, those whose item the model is shown
    visible_loss_share: float  # of the loss, what comes from them
    visible_hit: float  # of them, those where the shown item has the highest score: copying
    masked_hit: float  # of the masked positions, those where the hidden item has the highest score


@torch.no_grad()
def loss_parts(model: Bert4Rec, histories: Histories, config: TrainConfig, device: Device) -> LossParts:
    """Divide the focal loss of a model over `histories` into visible and masked positions."""
    was_training = model.training
    model.eval()
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in ("visible", "masked")}
    for batch in _batches(histories, model.config, config):
        moved = batch.to(device.torch_device)
        labels = true_items(moved)  # (R, L)
        logits = model.logits(model.encode(moved.items, moved.segment_ids, moved.positions))
        real = (labels != PAD).flatten()
        label, score = labels.flatten()[real], logits.flatten(0, 1)[real].float()
        entropy = F.cross_entropy(score, label, reduction="none")
        loss = (1 - torch.exp(-entropy)) * entropy  # as in `losses.focal_mean`
        hit = score.argmax(-1) == label
        shown = moved.items.flatten()[real] == label
        for name, chosen in (("visible", shown), ("masked", ~shown)):
            found = (chosen.sum(), loss[chosen].sum(), hit[chosen].sum())
            sums[name] += torch.stack([part.double().cpu() for part in found])
    model.train(was_training)
    (seen, seen_loss, copied), (hidden, hidden_loss, right) = (s.tolist() for s in sums.values())
    return LossParts(
        seen / (seen + hidden), seen_loss / (seen_loss + hidden_loss), copied / seen, right / hidden
    )


def true_items(batch: Batch) -> Tensor:
    """Return the item at every position (R, L), the hidden ones put back; PAD where there is none."""
    labels = batch.items.flatten().clone()
    real = batch.targets != IGNORE
    labels[batch.target_places[real]] = batch.targets[real].to(labels.dtype)
    return labels.view_as(batch.items)


def _batches(histories: Histories, model: ModelConfig, config: TrainConfig) -> Iterator[Batch]:
    plan = Epoch(histories, model, config, FRESH)
    for step in range(plan.num_steps):
        yield from plan.step(step)


def outcomes(trainer: Trainer, split: Split, mask_prob: float) -> list[Outcome]:
    """Rank a model's test targets in four ways, from the seed study's to the next item among unseen ones."""
    model, test, where = trainer.model, split.test, trainer.where

    def scores(part: Evaluation) -> metrics.Scores:
        return metrics.model_scores(model, part, where)

    with trainer.autocast():
        found = [
            metrics.masked_positions(model, test, where, mask_prob),
            metrics.masked_positions(model, test, where, mask_prob, special_tokens=False),
        ]
        for remove_seen in (False, True):
            found.append(metrics.under_split(scores, split, remove_seen))
    names = (
        "seed study's: all masked positions",
        "the same, real items only",
        "next item, seen kept",
        "next item, seen removed",
    )
    return [one._replace(protocol=name) for one, name in zip(found, names, strict=True)]


def redrawn(trainer: Trainer, split: Split, mask_prob: float, draws: int) -> list[float]:
    """Return HR@10 by the seed study's metric of one model, with the masks drawn anew each time."""
    with trainer.autocast():
        found = [
            metrics.masked_positions(trainer.model, split.test, trainer.where, mask_prob, seed=draw)
            for draw in range(draws)
        ]
    return [metrics.mean(one) for one in found]


def numbers(outcome: Outcome, samples: int) -> dict[str, Any]:
    """Return an outcome's metrics with intervals over users, and how many predictions a user stands for."""
    intervals = flat({name: metrics.interval(outcome, name, samples) for name in COMPARED})
    return intervals | {"per_user": len(outcome.ranks) / len(set(outcome.users.tolist()))}


# ------------------------------------------------------------------------------------------------
# What is left of each published claim once it has been recomputed: claim, verdict, what was found.
#
# A verdict follows from numbers by the rules below and is never typed in. "holds" is said of a number that
# is met within 5 %, the tolerance that this project allows its own clocks; "contradicted" of one that the
# study's other figures rule out; "not supported" of a difference that chance alone would often give.

TOLERANCE = 0.05


class Check(NamedTuple):
    """One claim and what became of it."""

    claim: str
    verdict: Verdict
    found: str  # what was recomputed or measured


def near(found: float, claimed: float) -> bool:
    """Return whether a number is what was claimed, within `TOLERANCE`."""
    return abs(found / claimed - 1) <= TOLERANCE


def of_counts(table: Iterable[Mapping[str, Any]]) -> list[Check]:
    """Judge parameter counts, rows of `audit.parameter_table`."""
    return [
        Check(
            f"{row['name']}: {row['published']:,} parameters",
            "holds" if row["agrees"] else "contradicted",
            f"{row['counted']:,}; {row['non_embedding_share']:.1%} of them outside item tables and positions",
        )
        for row in table
    ]


def of_rates(rows: Iterable[Mapping[str, Any]]) -> list[Check]:
    """Judge rates against epoch times, rows of `audit.rates`."""
    return [
        Check(
            f"{row['name']}: {row['claimed_per_second']:,.0f}/s and {row['epoch_seconds'] / 60:.1f} min",
            "holds" if near(row["ratio"], 1) else "contradicted",
            f"together {row['ratio']:.2f} times the sequences that exist; by the clock "
            f"{row['by_clock_per_second']:,.0f}/s",
        )
        for row in rows
    ]


def _met(is_met: bool, row: Mapping[str, Any]) -> Verdict:
    """Judge a ratio; it holds in part where its two figures are not what they are said to be (`but`)."""
    return "contradicted" if not is_met else "holds in part" if row.get("but") else "holds"


def _but(row: Mapping[str, Any]) -> str:
    return f"; read in its files: {row['but']}" if row.get("but") else ""


def of_gains(gains: Iterable[Mapping[str, Any]], cuts: Iterable[Mapping[str, Any]]) -> list[Check]:
    """Judge claimed factors and savings by the published figures that they should follow from."""
    found = [
        Check(
            f"{row['name']}: {row['claim']}",
            _met(near(gain(row), row["claimed"]), row),
            f"{row['before']:g} and {row['after']:g} {row['unit']}: {gain(row):.2f} times{_but(row)}",
        )
        for row in gains
    ]
    return found + [
        Check(
            f"{row['name']}: {row['claim']}",
            _met(abs(cut(row) - row["claimed"]) <= TOLERANCE, row),
            f"{row['before']:g} and {row['after']:g} {row['unit']}: {cut(row):.0%} less{_but(row)}",
        )
        for row in cuts
    ]


def of_difference(name: str, found: Separation, count: int) -> Check:
    """Judge a difference of two published hit rates over `count` predictions."""
    return Check(
        name,
        "holds" if found.p < ALPHA else "not supported",
        f"{found.in_errors:.2f} standard errors over {count:,} predictions, p {found.p:.2f}; "
        f"{found.needed:,} predictions would be needed",
    )


def of_share(name: str, published: float, found: AdapterCount, base: int) -> Check:
    """Judge a published share of trainable parameters; the base has so many of its own."""
    share = (found.total + found.gates) / (base + found.total + found.gates)
    return Check(
        name,
        "holds" if near(share, published) else "contradicted",
        f"{share:.2%}; {found.head_share:.0%} of it for the output table, {found.dead:,} of it dead",
    )


def of_adapters(gradients: Mapping[str, float | None], effects: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Judge that all adapters learn, and that evaluation sees what was learned, from `audit`."""
    dead = sorted({name.rsplit(".", 1)[-1] for name, norm in gradients.items() if not norm})
    by_mode = {row["mode"]: row for row in effects}
    silent = [place for place in PLACES if by_mode["train"][place] > 0 and by_mode["eval"][place] == 0]
    return [
        Check(
            "adapters in every linear map of a layer",
            "contradicted" if dead == sorted(PLACES) else "holds in part" if dead else "holds",
            f"no gradient for {', '.join(dead)}" if dead else "every adapter gets a gradient",
        ),
        Check(
            "the adapted model is what is evaluated (fp32)",
            "contradicted" if silent else "holds",
            f"eval() drops {', '.join(silent)}: largest change {by_mode['eval']['all']:g}, "
            f"in train mode {by_mode['train']['all']:.2f}",
        ),
    ]


def of_loss(before: LossParts, after: LossParts) -> Check:
    """Judge that the loss asks for hidden items."""
    most = before.visible_loss_share > 0.5
    return Check(
        "the loss is masked-item prediction",
        "contradicted" if most else "holds",
        f"{before.visible_loss_share:.0%} of it is about items that are shown when training begins, "
        f"{after.visible_loss_share:.0%} when it ends; {after.visible_hit:.0%} of those are copied by then",
    )


def of_metric(found: Sequence[Mapping[str, float]]) -> Check:
    """Judge that HR@10 is of the next item, from its metrics by each protocol, the study's first."""
    theirs, kept = found[0], found[2]
    return Check(
        "HR@10 is about the next item",
        "holds" if theirs["per_user"] == 1 else "contradicted",
        f"{theirs['per_user']:.1f} positions a user are ranked: {theirs['hr@10']:.3f}, "
        f"{kept['hr@10']:.3f} for the next item alone, by the same weights",
    )
