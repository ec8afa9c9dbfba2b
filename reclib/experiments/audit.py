"""Audit of the published figures of the seed study, and of the claims of this one.

Most parts are arithmetic on `params/published/seed_study.yaml`, the published figures with their sources. The
others run torch's modules with that study's adapter, or train a small model with its loss. Each part is a
function that returns results to record and a verdict on each claim, computed from numbers by the rules here.
The claims of README and FINDINGS are resolved from `params/claims.yaml` and the committed records:

    python -m reclib claims     # exits 1 if a number differs from its record

Shapes: N rows of an item table (items, PAD and MASK), D hidden_dim, L layers, r rank of an adapter,
B sequences, T positions.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from statistics import median
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import pandas as pd
import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from reclib import records, system
from reclib.config import PAD, STRICT, InputError, ModelConfig, TrainConfig, changed, model_config, validated
from reclib.cost.work import BACKWARD, encoder_forward, head_forward
from reclib.data.batches import IGNORE, Batch, Epoch
from reclib.data.dataset import Dataset, Evaluation, Histories
from reclib.data.splits import Split, random_users
from reclib.evaluate import metrics
from reclib.evaluate.statistics import ALPHA, MIN_SEEDS, bootstrap
from reclib.experiments.baseline import COMPARED, flat, run_folder
from reclib.experiments.grids import naming
from reclib.experiments.notebook import Result
from reclib.experiments.scaling import committed_before
from reclib.experiments.speed import SEED_TRAIN
from reclib.hardware import Device
from reclib.model.bert4rec import Bert4Rec, count_parameters
from reclib.parameters import Audit
from reclib.report import tables
from reclib.system import Parser
from reclib.train.fit import data_identity, fit
from reclib.train.trainer import Trainer

NOTEBOOK = "08_audit"
Published = Mapping[str, Any]  # `records.reference()`
TOLERANCE = 0.05  # within which a number is met: what this project allows its own clocks
TENSOR_PEAK = 312e12  # FLOP/s, dense 16-bit peak of the A100 that the study names
MASK_PROB = 0.15  # of the study's training


class Check(NamedTuple):
    """One claim with its verdict."""

    claim: str
    verdict: str  # holds, holds in part, contradicted or not supported
    evidence: str  # the recomputed or measured values


class Part(NamedTuple):
    """One part of the audit: its results and its verdicts."""

    results: list[Result]
    checks: list[Check]


def table(*parts: Part) -> pd.DataFrame:
    """Return the verdicts of parts by claim."""
    pd.set_option("display.max_colwidth", None)
    return pd.DataFrame([check for part in parts for check in part.checks]).set_index("claim")


def tally(*parts: Part) -> Result:
    """Count the claims of these parts by verdict."""
    counts = Counter(check.verdict for part in parts for check in part.checks)
    return Result("audit_verdicts", dict(sorted(counts.items())))


def near(value: float, claimed: float) -> bool:
    """Return whether a number equals the claimed one within `TOLERANCE`."""
    return abs(value / claimed - 1) <= TOLERANCE


def _results(name: str, rows: Iterable[Mapping[str, Any]]) -> list[Result]:
    numbers = ((row["model"], {k: v for k, v in row.items() if k != "model"}) for row in rows)
    return [Result(name, metrics, {"model": model}) for model, metrics in numbers]


# -- arithmetic on published figures -------------------------------------------------------------------------


def large(published: Published) -> dict[str, ModelConfig]:
    """Return the models of Amazon Electronics, whose sizes were published in millions to two decimals."""
    return {m["name"]: model_config(m["size"]) for m in published["models"] if "published_millions" in m}


def rows_within(millions: float, config: ModelConfig) -> range:
    """Return all table rows N whose parameters, in millions, are `millions` to two decimals."""
    per_row = 2 * config.hidden_dim + 1  # parameters of a row: both tables and the output bias
    fixed = count_parameters(config)["total"] - per_row * config.output_rows
    low, high = ((1e6 * millions + end - fixed) / per_row for end in (-5e3, 5e3))
    return range(math.ceil(low), math.floor(high) + 1)


def addmm_flops(rows: int, hidden_dim: int, num_layers: int, tokens: int) -> int:
    """Count the products with a bias of one forward pass: output table, output FFN, and 9 D^2 a layer.

    A layer's are the attention's output (D^2) and the feed-forward part (8 D^2); its fused input projection
    is no aten::addmm in the published profiles.
    """
    return 2 * tokens * hidden_dim * (rows + hidden_dim + num_layers * 9 * hidden_dim)


def catalogue(published: Published) -> Part:
    """Infer the size of the catalogue from the rounded model sizes; check it against a log and a profile."""
    log, profile = published["adapters"]["log"], published["profile"]
    millions = {m["name"]: m.get("published_millions") for m in published["models"]}
    ranges = [rows_within(millions[name], config) for name, config in large(published).items()]
    common = sorted(set(ranges[0]).intersection(*ranges[1:]))
    tokens = profile["sequences"] * profile["max_len"]
    flops = addmm_flops(common[0], profile["hidden_dim"], profile["num_layers"], tokens)
    numbers: dict[str, Any] = {"rows": common[0], "solutions": len(common)}
    numbers["fewest_by_one_size"] = min(map(len, ranges))
    numbers |= {"log_total": log["total"] - log["trainable"], "addmm_mflop": flops / 1e6}
    return Part([Result("audit_catalogue", numbers | {"published_mflop": profile["addmm_mflop"]})], [])


def sizes(published: Published) -> Part:
    """Count the parameters of each published model by component."""
    rows, checks = [], []
    for model in published["models"]:
        config = model_config(model["size"])
        counted = count_parameters(config)
        total = counted.pop("total")
        share, tied = counted["non_embedding"] / total, total - config.output_rows * config.hidden_dim
        claimed = model.get("published_parameters") or round(1e6 * model["published_millions"])
        agrees = (total if "published_parameters" in model else round(total, -4)) == claimed
        row = {"model": model["name"], "published": claimed, "counted": total, "agrees": agrees}
        rows.append(row | counted | {"non_embedding_share": share, "if_tied": tied})
        evidence = f"{total:,}; {share:.1%} of them outside item tables and positions"
        verdict = "holds" if agrees else "contradicted"
        checks.append(Check(f"{model['name']}: {claimed:,} parameters", verdict, evidence))
    return Part(_results("audit_parameters", rows), checks)


def padded_flops(config: ModelConfig) -> int:
    """Return training FLOPs per sequence, padded to max_len, with the head at every position."""
    head = head_forward(config, config.max_len, config.output_rows)
    return (1 + BACKWARD) * (encoder_forward(config, 1, None) + head)


def rates(published: Published) -> Part:
    """Compare claimed rates with epoch times and numbers of sequences.

    `ratio` is the claimed rate times the epoch time over the number of sequences: 1 if they agree. FLOP/s are
    given for models whose FLOPs per sequence are known.
    """
    rows, checks = [], []
    work = {name: padded_flops(config) for name, config in large(published).items()}
    for run in [*published["throughput"], published["throughput_t4"]]:
        claimed, seconds = run["claimed_per_second"], run["epoch_seconds"]
        clock, ratio = run["sequences"] / seconds, claimed * seconds / run["sequences"]
        row = {"model": run["name"], "ratio": ratio, "by_clock_per_second": clock}
        if flops := work.get(run["name"].split(",")[0]):
            row |= {"claimed_flops_per_second": claimed * flops, "by_clock_flops_per_second": clock * flops}
            row |= {"claimed_share_of_peak": claimed * flops / TENSOR_PEAK}
        rows.append(row)
        claim = f"{run['name']}: {claimed:,.0f}/s and {seconds / 60:.1f} min"
        evidence = f"together {ratio:.2f} times the sequences that exist; by the clock {clock:,.0f}/s"
        checks.append(Check(claim, "holds" if near(ratio, 1) else "contradicted", evidence))
    return Part(_results("audit_rates", rows), checks)


def gains(published: Published) -> Part:
    """Judge claimed factors and savings by the published figures behind them.

    A claim holds in part if one of its two figures does not measure what the claim says (`but`).
    """
    numbers, checks = {}, []
    for row in [*published["gains"], *published["cuts"]]:
        ratio = row["after"] / row["before"]
        value = {"more": ratio, "less": 1 / ratio, None: 1 - ratio}[row.get("better")]
        is_factor = "better" in row
        is_met = near(value, row["claimed"]) if is_factor else abs(value - row["claimed"]) <= TOLERANCE
        but = f"; read in its files: {row['but']}" if row.get("but") else ""
        evidence = f"{value:.2f} times" if is_factor else f"{value:.0%} less"
        evidence = f"{row['before']:g} and {row['after']:g} {row['unit']}: {evidence}{but}"
        verdict = "contradicted" if not is_met else "holds in part" if but else "holds"
        checks.append(Check(f"{row['name']}: {row['claim']}", verdict, evidence))
        numbers[row["name"]] = value
    memory = published["memory"]
    numbers["logits_gib"] = 4 * memory["sequences"] * memory["max_len"] * memory["rows"] / 2**30  # fp32
    return Part([Result("audit_gains", numbers)], checks)


def separation(first: float, second: float, count: int) -> dict[str, float]:
    """Compare two shares, each over `count` predictions, by the normal approximation.

    Returns their difference, the standard error of one of them, and of both taken as independent z, the
    two-sided p and the predictions `needed` to find the difference with a power of 80 %. Published rates
    allow no better test: pairing by user would be sharper, and several predictions of a user are dependent.
    """
    from scipy import stats

    if not (0 < first < 1 and 0 < second < 1 and first != second and count > 1):
        raise InputError(
            f"shares {first} and {second} of {count}: expected two inside (0, 1), of more than 1"
        )
    spread, difference = (first + second) / 2 * (1 - (first + second) / 2), second - first
    error = math.sqrt(spread / count)
    z = difference / (math.sqrt(2) * error)
    needed = 2 * spread * (stats.norm.ppf([1 - ALPHA / 2, 0.8]).sum() / difference) ** 2
    numbers = {"difference": difference, "error": error, "in_errors": abs(difference) / error, "z": z}
    return numbers | {"p": float(2 * stats.norm.sf(abs(z))), "needed": math.ceil(needed)}


def accuracy(published: Published) -> Part:
    """Judge the claim that the largest model beats the second, over test sequences and over their targets."""
    scores = {(row["name"], row["source"]): row["hr_at_10"] for row in published["accuracy"]}
    smaller, larger = scores["130 M", "README and slides"], scores["429 M", "README"]
    mean_len = published["dataset"]["interactions"] / published["dataset"]["users"]
    results, checks = [], []
    for targets in (1, 1 + MASK_PROB * (mean_len - 1)):  # the last item is always masked
        count = round(published["log"]["test"] * targets)
        test = separation(smaller, larger, count)
        results.append(Result("audit_separation", test, {"predictions": count}))
        evidence = f"{test['in_errors']:.2f} standard errors over {count:,} predictions, p {test['p']:.2f}; "
        evidence += f"{test['needed']:,} predictions would be needed"
        verdict = "holds" if test["p"] < ALPHA else "not supported"
        checks.append(Check(f"429 M ({larger}) beats 130 M ({smaller})", verdict, evidence))
    return Part(results, checks)


# -- the adapter, on torch's own modules ---------------------------------------------------------------------
#
# That study puts W x + sigmoid(a) (alpha / r) B A x in the place of three linear maps of torch's encoder
# layer. The scalar a does not see the instance and folds into B: it is LoRA of the same rank. Two shortcuts
# of torch take a map's weight and never call the map: `nn.MultiheadAttention` hands `out_proj.weight` to
# `F.multi_head_attention_forward`, always; `nn.TransformerEncoderLayer` in `eval()` hands all its weights to
# one fused operator (the "fast path"), unless autograd needs one of them, and those of a base are frozen.
# What is never called has no gradient and no effect. PEFT's documentation of its attention layer says so.

MODES = ("train", "eval", "eval, fast path off", "eval, CPU autocast")
PLACES = ("out_proj", "linear1", "linear2")  # of a layer, where that study adapts it


def calls(mode: str) -> dict[str, int]:
    """Return how often a pass of torch's frozen encoder of two layers calls the linear map at each place."""
    counted = dict.fromkeys(PLACES, 0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).requires_grad_(False)
    place = {id(module): name.rpartition(".")[2] for name, module in encoder.named_modules()}

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        counted[place[id(module)]] += 1
        return F.linear(x, module.weight, module.bias)

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mode == "eval, CPU autocast")
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(mode != "eval, fast path off")
        with patch.object(nn.Linear, "forward", forward), autocast:
            encoder.train(mode == "train")(torch.randn(4, 10, 64))
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return counted


def linear_calls(num_layers: int, called: Iterable[str]) -> int:
    """Return calls of a linear map in one pass with adapters at `PLACES` and two more in the head.

    An adapted map that is called is three: itself, A and B. The attention's input projection is one, and so
    is its output projection where torch takes the weight alone.
    """
    of_layer = 1 + sum(3 for _ in called) + ("out_proj" not in called)
    return num_layers * of_layer + 3 + 3


def adapter_count(rows: int, hidden_dim: int, num_layers: int, rank: int) -> dict[str, int]:
    """Count an adapter's parameters by place, and those of the encoder that are dead: never called.

    2 r D of each D x D map, 5 r D of each feed-forward map, r (D + N) of the output table, a gate a module.
    """
    encoder, head = num_layers * 12 * hidden_dim * rank, rank * (hidden_dim + rows)
    places = {"encoder": encoder, "output_ffn": 2 * hidden_dim * rank, "head": head}
    return places | {"gates": 3 * num_layers + 2, "dead": num_layers * 2 * hidden_dim * rank}


def adapters(published: Published, by_mode: pd.DataFrame) -> Part:
    """Judge the claims that all adapters learn, that they are evaluated, and what share is trained.

    `by_mode` has a row of `calls` for each of `MODES`.
    """
    log = published["adapters"]["log"]
    learn = [place for place in PLACES if by_mode[place]["train"]]
    dead = [place for place in PLACES if place not in learn]
    dropped = [place for place in learn if not by_mode[place]["eval"]]
    numbers = {f"{p}_in_{mode}": int(by_mode[p][mode]) for p in PLACES for mode in ("train", "eval")}
    numbers |= {"linear_calls": linear_calls(log["num_layers"], learn)}
    numbers |= {"linear_calls_if_alive": linear_calls(log["num_layers"], PLACES)}
    results = [Result("audit_adapters", numbers | {"linear_calls_published": log["linear_calls"]})]
    partly = ("holds in part" if learn else "contradicted") if dead else "holds"
    never = f"never called: {', '.join(dead) or 'none'}"
    in_training = f"called in train mode and not in eval(): {', '.join(dropped) or 'none'}"
    checks = [Check("adapters in every linear map of a layer", partly, never)]
    verdict = "contradicted" if dropped else "holds"
    checks.append(Check("the adapted model is what is evaluated (fp32)", verdict, in_training))
    for row in published["adapters"]["shares"]:
        config = large(published)[row["name"]]
        count = adapter_count(config.output_rows, config.hidden_dim, config.num_layers, row["rank"])
        results.append(Result("audit_adapter_count", count, {"model": row["name"], "rank": row["rank"]}))
        trained = sum(count.values()) - count["dead"]
        share, head = trained / (count_parameters(config)["total"] + trained), count["head"] / trained
        claim = f"{row['name']}: {row['published']:.2%} trainable (it is rank {row['rank']})"
        evidence = f"{share:.2%}; {head:.0%} of it for the output table, {count['dead']:,} of it dead"
        checks.append(Check(claim, "holds" if near(share, row["published"]) else "contradicted", evidence))
    return Part(results, checks)


# -- its loss and its metric, on real data -------------------------------------------------------------------
#
# Two trainings of one model on the same histories, in the same order, with the same masks: one minimises
# focal cross-entropy over every position that is not padding (`seed_focal`), the other cross-entropy at the
# masked positions (`cloze`). Epochs of both are chosen by the next item on validation, which is kind to the
# first: its study chose by its own metric. What deviates from the original: masks are drawn as ours are (in
# a share of the samples the last item alone, instead of the last item in all), and the model is small.

OBJECTIVES = ("seed_focal", "cloze")
SHARES = (0.6, 0.1, 0.3)  # of the users that train, validate and test; the study's 0.8, 0.1, 0.1 leaves few
FRESH = 1_000_000  # number of an epoch that no training reaches: its masks are drawn for looking only


class Trained(NamedTuple):
    """One training: its objective, its seed, the users' division and the trainer at its best epoch."""

    objective: str
    seed: int
    split: Split
    trainer: Trainer


def configurations(p: Audit, dataset: Dataset, objective: str, seed: int) -> tuple[ModelConfig, TrainConfig]:
    """Return the model and the training of an objective; nothing else differs between the two."""
    shape: dict[str, Any] = {"num_items": dataset.num_items, "max_len": p.max_len, "dropout": p.dropout}
    names = ("epochs", "batch_size", "learning_rate", "mask_prob", "last_item_share", "eval_every")
    train = validated(TrainConfig, {name: getattr(p, name) for name in names} | {"seed": seed})
    if objective == "seed_focal":
        fields = ("objective", "layout", "head_rows", "loss")
        train = changed(train, **{name: SEED_TRAIN[name] for name in fields})
    return model_config(p.size, **shape, tied=False), train


def train_both(p: Audit, dataset: Dataset, device: Device) -> list[Trained]:
    """Train both objectives with each seed, or resume runs of the same code and data.

    Users are divided at random, as in that study: some histories train, the last items of others are targets.
    """
    runs = []
    for seed in p.seeds:
        split = random_users(dataset, SHARES, seed)
        for objective in OBJECTIVES:
            model, train = configurations(p, dataset, objective, seed)
            folder = run_folder(NOTEBOOK, model, train, data_identity(dataset, split))
            trainer = fit(model, dataset, train, device, folder, split=split)
            runs.append(Trained(objective, seed, split, trainer))
    return runs


def batches(histories: Histories, model: ModelConfig, config: TrainConfig) -> Iterator[Batch]:
    """Yield the batches of an epoch that no training reaches."""
    epoch = Epoch(histories, model, config, FRESH)
    for step in range(epoch.num_steps):
        yield from epoch.step(step)


@torch.no_grad()
def loss_parts(
    model: Bert4Rec, histories: Histories, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Divide the focal loss of a model over `histories` into visible and masked positions.

    Returns the share of visible positions (`visible_share`), their share of the loss (`visible_loss_share`),
    and for both kinds the share of positions whose true item has the highest score.
    """
    was_training = model.training
    model.eval()
    columns = []
    for host_batch in batches(histories, model.config, config):
        batch = host_batch.to(device)
        items = batch.items.flatten()
        labels, hidden = items.clone(), batch.targets != IGNORE
        labels[batch.target_places[hidden]] = batch.targets[hidden].to(labels.dtype)
        real = labels != PAD
        logits = model.logits(model.encode(batch.items, batch.segment_ids, batch.positions)).flatten(0, 1)
        label, score = labels[real], logits[real].float()
        entropy = F.cross_entropy(score, label, reduction="none")
        focal = (1 - torch.exp(-entropy)) * entropy  # as in `losses.focal_mean`
        columns.append(torch.stack([focal, score.argmax(-1) == label, items[real] == label]).cpu())
    model.train(was_training)
    focal, hit, shown = torch.cat(columns, dim=1).double()
    visible = shown.bool()
    numbers = {"visible_share": shown.mean(), "visible_loss_share": focal[visible].sum() / focal.sum()}
    numbers |= {"visible_hit": hit[visible].mean(), "masked_hit": hit[~visible].mean()}
    return {name: float(value) for name, value in numbers.items()}


def loss(run: Trained) -> Part:
    """Judge the claim that the loss predicts masked items, from its parts before and after training."""
    trainer: Any = run.trainer
    torch.manual_seed(run.seed)
    initial = Bert4Rec(trainer.model.config).to(trainer.where)
    before, after = (
        loss_parts(model, run.split.train, trainer.config, trainer.where)
        for model in (initial, trainer.model)
    )
    pairs = (("begins", before), ("ends", after))
    results = [Result("audit_loss", parts, {"training": moment}, seed=run.seed) for moment, parts in pairs]
    start, end = before["visible_loss_share"], after["visible_loss_share"]
    evidence = f"{start:.0%} of it is about items that are shown when training begins, "
    evidence += f"{end:.0%} when it ends; {after['visible_hit']:.0%} are copied by then"
    verdict = "contradicted" if start > 0.5 else "holds"
    return Part(results, [Check("the loss is masked-item prediction", verdict, evidence)])


def metric(p: Audit, runs: Sequence[Trained]) -> Part:
    """Judge the claim that HR@10 is about the next item, by ranking under the study's protocol and others."""
    results = []
    for run in runs:
        model, device, split = run.trainer.model, run.trainer.where, run.split

        def scores(rows: Evaluation, model: Any = model, device: torch.device = device) -> metrics.Scores:
            return metrics.model_scores(model, rows, device)

        masked = (model, split.test, device, p.mask_prob)
        with run.trainer.autocast():
            outcomes = {
                "seed study's: all masked positions": metrics.masked_positions(*masked),
                "the same, real items only": metrics.masked_positions(*masked, special_tokens=False),
                "next item, seen kept": metrics.under_split(scores, split, remove_seen=False),
                "next item, seen removed": metrics.under_split(scores, split),
            }
        for name, outcome in outcomes.items():
            values = metrics.per_user(outcome.ranks)
            intervals = {m: bootstrap(values[m], p.bootstrap_samples, users=outcome.users) for m in COMPARED}
            numbers = flat(intervals)
            numbers["per_user"] = len(outcome.ranks) / len(set(outcome.users.tolist()))
            params = {"objective": run.objective, "protocol": name, "label": outcome.label}
            results.append(Result("audit_metric", numbers, params, seed=run.seed))
    theirs, _, kept = (result.metrics for result in results[:3])
    verdict = "holds" if theirs["per_user"] == 1 else "contradicted"
    evidence = f"{theirs['per_user']:.1f} positions a user are ranked: {theirs['hr@10']:.3f}, "
    evidence += f"{kept['hr@10']:.3f} for the next item alone, by the same weights"
    return Part(results, [Check("HR@10 is about the next item", verdict, evidence)])


def redrawn(p: Audit, run: Trained) -> Part:
    """Return the range of one model's HR@10 by the study's metric over several draws of the masks."""
    arguments = run.trainer.model, run.split.test, run.trainer.where, p.mask_prob
    with run.trainer.autocast():
        draws = (metrics.masked_positions(*arguments, seed=draw) for draw in range(p.mask_draws))
        values = [float(metrics.per_user(draw.ranks)["hr@10"].mean()) for draw in draws]
    spread = {"lowest": min(values), "highest": max(values), "draws": len(values)}
    return Part([Result("audit_redrawn", spread, seed=run.seed)], [])


# -- the claims of this study --------------------------------------------------------------------------------

TEXTS = ("README.md", "FINDINGS.md")
DECIMAL = re.compile(r"(?<![\d.])([+-]?)(\d+\.\d+)(?!\.?\d)( %| million)?")  # no version such as 2.13.0
UNITS = {" %": 0.01, " million": 1e6, None: 1}

TAKE: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "lowest": min,
    "highest": max,
    "median": median,
    "largest": lambda values: max(map(abs, values)),
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Query:
    """A query of the committed records for one number.

    It matches rows with this `name` and these `own` parameters; a list allows several values. Of these count
    the rows of the largest profile: the mean over seeds if there is one, else the newest of each seed. The
    grid `benchmarks/<file>` is that of the rows of a benchmark, in `executed/<label>/benchmarks/`; nested
    values have names with dots.
    """

    name: str
    value: str = ""  # a metric or a timing; the items of a claim's `numbers` name it
    grid: str | None = None  # None: records of notebooks
    data: str | None = None  # name of the dataset
    own: dict[str, Any] = field(default_factory=dict)
    label: str | None = None  # of the device, such as h200
    day: str | None = None  # of the record, such as 2026-11-23; None: the newest
    at: dict[str, float | str] = field(default_factory=dict)  # a series and its value at the point to read
    seeds: list[int] = field(default_factory=list)  # these rows instead of the mean over all seeds
    take: Literal["mean", "lowest", "highest", "largest", "median"] = "mean"
    scale: float = 1.0  # 1000: the text has milliseconds
    over: dict[str, Any] | None = None  # fields of the query whose number is the divisor
    minus: dict[str, Any] | None = None  # fields of the query whose number is subtracted


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Claim:
    """A sentence of the texts, with its record or with the section of the log that has its numbers."""

    text: str
    record: Query | None = None
    numbers: list[str | dict[str, Any]] = field(default_factory=list)  # of its decimal numbers, in order
    log: str | None = None  # heading of a section of docs/log.md
    by: str | None = None  # the program that printed it


def _plain(text: str) -> str:
    return " ".join(text.replace("**", "").split())


def texts() -> dict[str, str]:
    """Return README and FINDINGS by name, without line breaks and bold type."""
    return {name: _plain((system.root() / name).read_text(encoding="utf-8")) for name in TEXTS}


def read_claims() -> tuple[list[Claim], dict[str, str]]:
    """Return the claims of `params/claims.yaml`, and the numbers that are no claims with their sources."""
    file = "claims.yaml"
    content = system.read_yaml(system.params() / file)
    claims = []
    with naming(file, (KeyError, TypeError)):
        for row in content["claims"]:
            with naming(repr(row.get("text"))):
                if ("record" in row) == ("log" in row):
                    raise InputError("expected either `record` or `log`")
                record = {"record": validated(Query, row["record"])} if "record" in row else {}
                claims.append(validated(Claim, row | record))
        return claims, content["no_claims"]


def benchmark_rows() -> Iterator[dict[str, Any]]:
    """Yield the committed rows of benchmarks, in the form of records."""
    for file in sorted(system.committed().glob("*/benchmarks/*.jsonl*")):
        grid = f"benchmarks/{file.name.partition('.')[0]}"
        shared = {"notebook": "", "params": {"grid": grid}, "data": None, "label": file.parts[-3]}
        shared |= {"profile": "grid", "seed": None, "timings": {}, "series": {}}
        text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        for number, line in enumerate(text.decode().splitlines()):
            values = pd.json_normalize(json.loads(line)).to_dict("records")[0]
            own = {"own_params": values, "metrics": values, "time": f"{number:06}"}
            yield shared | own | {"name": values["name"]}


class Records:
    """The committed records, and the queries of claims on them."""

    def __init__(self) -> None:
        committed = [*records.read(system.committed()), *benchmark_rows()]
        self.rows = tables.by(committed, lambda row: (row["name"], row["params"].get("grid")))

    def matching(self, query: Query) -> list[dict[str, Any]]:
        """Return the rows that a query matches; raise `InputError` if there is none."""

        def matches(row: Mapping[str, Any]) -> bool:
            params = row["own_params"]
            return (
                query.data in (None, (row["data"] or {}).get("name"))
                and query.label in (None, row["label"])
                and row["time"].startswith(query.day or "")
                and all(params.get(k) in (v if isinstance(v, list) else [v]) for k, v in query.own.items())
            )

        rows = [row for row in self.rows.get((query.name, query.grid), []) if matches(row)]
        if not rows:
            raise InputError(f"no record {query.name!r} of {query.grid or 'a notebook'} with {query.own}")
        best = max(records.PROFILES.index(row["profile"]) for row in rows)
        rows = [row for row in rows if records.PROFILES.index(row["profile"]) == best]
        rows = list(tables.newest(rows, lambda row: (str(row["own_params"]), row["seed"])).values())
        if query.seeds:
            return [row for row in rows if row["seed"] in query.seeds]
        return [row for row in rows if row["seed"] is None] or rows

    def number(self, query: Query) -> float:
        """Return the number of a query."""
        chosen = []
        for row in self.matching(query):
            numbers, series = row["metrics"] | row["timings"], row["series"]
            for name, point in query.at.items():
                numbers = {key: values[series[name].index(point)] for key, values in series.items()}
            chosen.append(numbers.get(query.value))
        if None in chosen:
            raise InputError(f"no value {query.value!r} in record {query.name!r} with {query.own}")
        value = float(TAKE[query.take](chosen))
        if query.over:
            value /= self.number(_derived(query, query.over))
        if query.minus:
            value -= self.number(_derived(query, query.minus))
        return query.scale * value

    def seeds(self, query: Query) -> list[int]:
        """Return the number of seeds of a record, or of both sides of a comparison; [] if it has none."""
        rows = self.matching(query)
        if "reference_seeds" in rows[0]["metrics"]:
            return [int(rows[0]["metrics"][name]) for name in ("seeds", "reference_seeds")]
        every = self.rows[query.name, query.grid]
        trained = {(str(row["own_params"]), row["seed"]) for row in every if row["seed"] is not None}
        counts = [sum(params == str(row["own_params"]) for params, _ in trained) for row in rows]
        return [min(counts)] if any(counts) else []


def _derived(query: Query, fields: Mapping[str, Any]) -> Query:
    return changed(query, **({"over": None, "minus": None, "scale": 1.0} | dict(fields)))


def _queries(record: Query, number: str | Mapping[str, Any]) -> list[Query]:
    """Return the queries of an item of `numbers`: the name of a value, or fields of another query."""
    if isinstance(number, str):
        return [changed(record, value=number, over=None, minus=None)]
    value = number.get("value")
    values = value if isinstance(value, list) else [value]
    shared = {"grid": record.grid, "label": record.label}
    return [validated(Query, shared | dict(number) | {"value": name}) for name in values]


def agrees(stated: re.Match[str], value: float) -> bool:
    """Return whether a value, rounded as in the text, equals the stated number or is below a stated limit."""
    sign, digits, unit = stated.groups()
    value /= UNITS[unit]
    if stated.string[: stated.start()].endswith("below "):
        return value < float(digits)
    rounded = f"{value:+.{len(digits.partition('.')[2])}f}"
    return rounded == sign + digits if sign else rounded[1:] == digits


def judged(claim: Claim, stored: Records, log: str) -> dict[str, Any]:
    """Return a claim's row of the table, with the verdict computed from its record.

    Verdicts: holds; not separated (adjusted p of 5 % or more); one seed; two seeds; not shown by git (for a
    prediction); no record (the log has the numbers); number differs (the text is wrong).
    """
    stated = list(DECIMAL.finditer(_plain(claim.text)))
    row: dict[str, Any] = {"statement": _plain(claim.text), "test": "", "p": "", "seeds": ""}
    if claim.record is None:
        section = log.partition(f"## {claim.log}\n")[2].partition("\n## ")[0]
        printed = [float(number) for number in re.findall(r"[+-]?\d+(?:\.\d+)?", section)]
        missing = [m[0] for m in stated if not any(agrees(m, UNITS[m[3]] * number) for number in printed)]
        differs = f"number differs: {', '.join(missing)} not in the log"
        source = f"printed by {claim.by}, dated {str(claim.log)[:10]}"
        return row | {"record": source, "verdict": differs if missing or not section else "no record"}
    queries = [query for number in claim.numbers for query in _queries(claim.record, number)]
    if len(queries) != len(stated):
        raise InputError(f"{len(stated)} decimal numbers in the text, {len(queries)} under `numbers`")
    pairs = zip(stated, map(stored.number, queries), strict=True)
    wrong = [f"{match[0].strip()} is {value:.5g}" for match, value in pairs if not agrees(match, value)]
    first = stored.matching(claim.record)[0]
    metrics, place = first["metrics"], claim.record.grid or first["notebook"]
    seeds = [count for query in (claim.record, *queries) for count in stored.seeds(query)]
    fewest = min((count for count in seeds if count), default=MIN_SEEDS)
    verdict = {1: "one seed", 2: "two seeds"}.get(fewest, "holds")
    if (p := metrics.get("adjusted_p")) is not None:
        kind = "users and seeds random" if "degrees_of_freedom" in metrics else "seeds fixed (earlier test)"
        row |= {"p": f"{p:.3f}" if p >= 0.001 else "below 0.001", "test": f"{kind}, Holm"}
        verdict = "not separated" if verdict == "holds" and p >= ALPHA else verdict
    if claim.record.name == "prediction":
        row["test"] = "; ".join(committed_before(place)).partition(": ")[2]
        verdict = verdict if "committed before" in row["test"] else "not shown by git"
    if wrong:
        verdict = f"number differs: {'; '.join(wrong)}"
    sides = stored.seeds(claim.record) if p is not None else [fewest] * any(seeds)
    row |= {"record": f"{place}: {claim.record.name}", "seeds": " and ".join(map(str, sides))}
    return row | {"verdict": verdict}


def claims() -> pd.DataFrame:
    """Return every claim of README and FINDINGS with its record, test, corrected p, seeds and verdict.

    Numbers of the texts that no claim covers have rows too, and so have claims that no text makes.
    """
    uncovered, (stated, no_claims), stored = texts(), read_claims(), Records()
    log = (system.root() / "docs" / "log.md").read_text(encoding="utf-8")
    rows = []
    for claim in stated:
        with naming(f"claims.yaml: {claim.text!r}", (KeyError, ValueError, IndexError)):
            row = judged(claim, stored, log)
        files = [name for name in TEXTS if row["statement"] in uncovered[name]]
        row["in"] = ", ".join(name.removesuffix(".md") for name in files)
        rows.append(row if files else row | {"verdict": "number differs: no text says so"})
    for snippet in sorted([*(row["statement"] for row in rows), *no_claims], key=len, reverse=True):
        uncovered = {name: text.replace(snippet, " ... ") for name, text in uncovered.items()}
    for name, text in uncovered.items():
        for match in DECIMAL.finditer(text):
            around = text[max(0, match.start() - 30) : match.end() + 20]
            rows.append({"statement": around, "in": name, "verdict": "number differs: no claim covers it"})
    pd.set_option("display.max_colwidth", None)
    columns = ["statement", "in", "record", "test", "p", "seeds", "verdict"]
    return pd.DataFrame(rows, columns=columns).fillna("").set_index("statement")


def claims_main(argv: list[str] | None = None) -> int:
    """Print the claims of README and FINDINGS; exit code 1 if a number differs from its record."""
    description = "Resolve every claim of README and FINDINGS from its record."
    Parser(prog="python -m reclib claims", description=description).parse_args(argv)
    rows = claims()
    for row in rows.reset_index().to_dict("records"):
        details = [row["record"], row["test"], f"p {row['p']}" if row["p"] else ""]
        details += [f"seeds {row['seeds']}" if row["seeds"] else ""]
        print(f"{row['verdict']}: {row['statement']}\n    {', '.join(text for text in details if text)}")
    counts = rows["verdict"].str.partition(":")[0].value_counts()
    print("\n".join(f"{count:>4} {verdict}" for verdict, count in counts.items()))
    print(records.code_in_git(records.read(system.committed())))
    return int(rows["verdict"].str.startswith("number differs").any())
