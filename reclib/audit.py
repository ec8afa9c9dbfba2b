"""The published figures of the study that this one started from, recomputed: counts, rates, shares, errors.

Pure functions of `params/published/seed_study.yaml`, which holds what was published with its sources.
Nothing here is measured, and nothing needs that study's code or data: a parameter count follows from a
shape, a rate and an epoch time from each other. What has to be run is in `bypass` (its adapters on torch's
own modules) and in `recreation` (its loss and its metric on real data).

Shapes: N rows of an item table (items, PAD and MASK), D hidden_dim, L layers, r rank of an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from reclib.claims import ALPHA
from reclib.config import InputError, ModelConfig, model_config
from reclib.flops import BACKWARD, encoder_forward, head_forward, layer_linear
from reclib.model import count_parameters

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

    `ratio` is claimed rate times epoch time over sequences, 1 where they agree. `flops` gives training FLOPs
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
