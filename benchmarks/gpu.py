"""What one GPU measures of this study in ten minutes, in order of worth; the row that `make gpu` adds.

    python benchmarks/gpu.py                              all stages on the GPU that is here
    python benchmarks/gpu.py --stages env,check,sizes     some of them
    python benchmarks/gpu.py --device cpu --tiny          the same code, small, where there is no GPU

Each stage is a process of its own with a time limit: one that raises, hangs or is killed is a row with its
reason, and the next one runs whole. Results are written at once to the folder `--out`: `executed/` has the
records, once the self-check has passed, `raw.jsonl` every number with or without a record, `stages.jsonl` a
row for each stage, `log.txt` what they printed. `python -m reclib merge gpu-row/executed` takes the
records into a checkout; `python benchmarks/planner.py` compares them with the predictions made before.

A GPU machine without network (Python 3.12 with torch, pandas and scipy): the first command is for a machine
with network. The checkout then goes over with `.wheels` in it, and the other two commands are for the GPU's.

    python benchmarks/gpu.py --wheels .wheels --python 3.12
    python3 -m pip install --no-index --no-deps --target .site .wheels/*.whl
    PYTHONPATH=$PWD/.site python3 benchmarks/gpu.py --commit HASH

Where a command may take some minutes only, run it again with the same `--out` and other `--stages`: the
self-check and the records of the first call stay valid. Where few files come back, pack the folder:
`tar czf row.tgz --exclude=runs gpu-row`.

Exit codes: 0 every stage ended well, 1 one did not, 2 wrong input or no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from planner_rows import configs, dataset, described, write  # noqa: E402

FORK = multiprocessing.get_context("fork")  # stages inherit the imports; the parent never touches CUDA
ELECTRONICS = {"synthetic_users": 20_000, "synthetic_items": 159_748, "synthetic_mean_len": 9.4}
SMALL = {"synthetic_users": 300, "synthetic_items": 500, "synthetic_mean_len": 9.4}
LADDERS = {"85m": (10, 2), "430m": (5, 1), "130m": (8, 1)}  # timed steps, rounds
PADDED = {"layout": "padded", "head_rows": "all", "loss": "plain", "precision": "fp32"}
# Size, sequences of a step, changes of the training; in bf16 unless they say otherwise.
BATCHES: list[tuple[str, int, dict[str, Any]]] = [
    *(("85m", batch, {}) for batch in (128, 512, 2048, 8192)),
    *(("85m", 512, {"precision": precision}) for precision in ("tf32", "fp32")),
    *(("430m", batch, {}) for batch in (512, 4096, 16_384)),
    ("85m", 16_384, {}),
    ("85m", 512, PADDED),
    ("430m", 32_768, {}),
]
# Each is timed against the plain step, in turns. What this version does not have is a row that says so.
VARIANTS: dict[str, dict[str, Any]] = {
    "loss compiled": {"loss": "fused"},
    "rows of the head a multiple of 64": {"head_multiple": 64},
    "16-bit copies once a step": {"half_copies": True},
    "loss plain": {"loss": "plain"},
    "loss chunked": {"loss": "chunked"},
    "buckets of 4 steps": {"bucket_steps": 4},
    "no clipping": {"clip_norm": None},
    # A capture that fails spoils every dropout after it in the process, so these come late.
    "one CUDA graph a step": {"compile_mode": "graph", "bucket_steps": 4},
    "all four": {
        "loss": "fused",
        "head_multiple": 64,
        "half_copies": True,
        "compile_mode": "graph",
        "bucket_steps": 4,
    },
    "encoder compiled": {"compile_mode": "default"},
    "encoder compiled, CUDA graphs": {"compile_mode": "reduce-overhead"},
}
# What the core and the notebooks import beside torch, numpy, pandas and scipy; of what those need in turn a
# kernel without a debugger needs neither of the large ones.
CARRIED = ("isal", "msgspec", "plotly", "pydantic", "pyyaml", "safetensors", "tqdm")
CARRIED += ("ipykernel", "nbformat", "papermill")
LEFT_OUT = ("debugpy", "jedi", "numpy", "parso")


class AbsentError(Exception):
    """What a stage needs is not here."""


class Bench:
    """What a stage is given: where it runs, how large, and where its results go."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out, self.tiny, self.kind, self.data = given.out.resolve(), given.tiny, given.device, given.data
        self.shape, self.stage = SMALL if given.tiny else ELECTRONICS, ""

    @functools.cached_property
    def device(self) -> Any:
        from reclib import hardware

        return hardware.resolve("cpu" if self.kind == "cpu" else "auto")

    @property
    def cuda(self) -> bool:
        return self.device.torch_device.type == "cuda"

    def raw(self, what: str, /, **values: Any) -> None:
        """Print and keep one result, whether or not it may be a record."""
        from reclib import records as reclib_records
        from reclib import system

        line = system.plain({"stage": self.stage, "what": what, **values})
        print(json.dumps(line), flush=True)
        reclib_records.append(self.out / "raw.jsonl", line)

    def time(self, what: str, action: Callable[[], object], /, **about: Any) -> None:
        """Time an operation; one that raises is a line with its error."""
        from torch.utils.benchmark import Timer

        try:
            timer = Timer("action()", globals={"action": action})  # waits for the device
            seconds = timer.blocked_autorange(min_run_time=0.02 if self.tiny else 0.2).median
        except Exception as error:
            return self.raw(what, **about, error=first_line(error))
        self.raw(what, **about, seconds=seconds)

    def params(self, notebook: str, small: Mapping[str, Any], **full: Any) -> Any:
        """Return a notebook's parameters: its smallest profile, the stage's, the tiny run's."""
        from reclib import parameters

        return parameters.build(
            notebook, parameters.profile(notebook, "smoke") | full | (small if self.tiny else {})
        )

    def free(self) -> None:
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


class Records:
    """Results of one kind of notebook: to raw.jsonl, and to the records where there may be any."""

    def __init__(self, b: Bench, notebook: str, p: Any, name: str, fingerprint: str) -> None:
        from reclib import hardware
        from reclib import records as reclib_records
        from reclib.config import InputError

        self.b, self.run = b, None
        self.about = {
            "card": hardware.device_card(b.device),
            "data": {"name": name, "fingerprint": fingerprint},
        }
        try:
            self.run = reclib_records.Run(notebook, p, self.about["card"], self.about["data"])
        except InputError as error:  # no passed self-check
            b.raw("no records", reason=str(error))

    def result(self, name: str, metrics: Mapping[str, Any], **rest: Any) -> None:
        self.b.raw(name, metrics=dict(metrics), **rest)
        if self.run is not None:
            self.run.result(name, metrics, **rest)

    def step(self, row: dict[str, Any] | None, counts: Any, timings: Any, status: str) -> None:
        """Write a step that the planner has a row of; one that did not run is only a raw line."""
        self.b.raw("row", row=row, status=status, counts=counts, timings=timings)
        if row is not None and timings and self.run is not None:
            own = row | {"set": row["stage"], "device": self.b.device.label}
            found = self.about | {"counts": counts, "timings": timings}
            write("planner_row", found, own, self.b.out / "executed")

    def rows(self, name: str, timed: Iterable[Any], rows: Iterable[dict[str, Any] | None]) -> None:
        """Write rows of `speed`, each as its notebook does and as the planner's."""
        for one, row in zip(timed, rows, strict=True):
            self.result(name, one.metrics(), params=one.own_params(), timings=one.timings)
            self.step(row, one.metrics(), one.timings, f"{one.found.status} {one.found.reason}".strip())


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


# -- what is timed, as parameters of notebooks and as rows that the planner predicts -------------------------


def amp(b: Bench, size: str = "85m", **full: Any) -> Any:
    """Return parameters of notebook 04 on histories of Electronics' shape."""
    small = {"size": "nano", "steps": 2, "repeats": 1, "warmup_steps": 1, "batch_sizes": [16]}
    return b.params("04_amp_compile", small, dataset="synthetic", size=size, **(b.shape | full))


def ladder_params(b: Bench, size: str) -> Any:
    steps, repeats = LADDERS[size]
    full = {"precisions": ["fp32", "bf16"], "compile_modes": ["off"], "batch_sizes": [128], "warmup_steps": 3}
    return amp(b, size, steps=steps, repeats=repeats, **full)


def precision_params(b: Bench) -> Any:
    full = {"compile_modes": ["off"], "batch_sizes": [512], "steps": 25, "warmup_steps": 10, "repeats": 2}
    return amp(b, precisions=["fp32", "tf32", "bf16", "fp16"] if b.cuda else ["fp32", "bf16"], **full)


def size_params(b: Bench) -> Any:
    full = {"measured_sizes": ["5m", "85m", "130m", "430m"], "users": 20_000, "steps": 30, "warmup_steps": 5}
    return b.params("06_hardware", {"measured_sizes": ["nano"], "users": 300, "steps": 2}, **full)


def adapter_params(b: Bench) -> Any:
    small = {"size": "nano", "rounds": 2, "warmup_steps": 1, "batch_size": 16}
    small |= {"compile_modes": ["off"], "precisions": ["fp32"]}
    full = {"size": "85m", "dropout": 0.1, "arms": ["none", "full", "lora", "ilora", "gated", "head"]}
    full |= {"precisions": ["bf16", "fp32"], "compile_modes": ["off"], "batch_size": 512}
    full |= {"rounds": 30, "warmup_steps": 12, "learning_rates": [1e-4], "representation": "mean_embedding"}
    return b.params("05_ilora", small, mask_prob=0.2, last_item_share=0.15, **full)


def amp_row(b: Bench, p: Any, stage: str, users: int = 0, **train: Any) -> dict[str, Any]:
    """Return the row of a step with these changes of the training; `InputError` for what is not known."""
    from reclib.config import TrainConfig, validated
    from reclib.experiments import speed

    model = speed.model_of(p, dataset({"users": 300, "mean_len": 9.4}, p.synthetic_items))
    default = {"batch_size": p.batch_sizes[0], "precision": "bf16" if b.cuda else "fp32"}
    return described(
        stage, p.size, model, validated(TrainConfig, default | train), users or p.synthetic_users
    )


def size_rows(b: Bench) -> list[dict[str, Any]]:
    from reclib.experiments import comparison

    p, names = size_params(b), ("fp32", "bf16") if b.cuda else ("fp32",)
    shapes = [(size, comparison.model_of(p, size), name) for size in p.measured_sizes for name in names]
    return [
        described("sizes", size, model, comparison.train_of(p, name), p.users) for size, model, name in shapes
    ]


def ladder_rows(b: Bench, size: str) -> list[dict[str, Any]]:
    from reclib.experiments import speed

    p = ladder_params(b, size)
    rungs = speed.rungs_of(p, speed.dataset_of(p), b.device)
    return [described(f"ladder {size}", p.size, one.model, one.train, p.synthetic_users) for one in rungs]


def precision_rows(b: Bench) -> list[dict[str, Any]]:
    p = precision_params(b)
    return [amp_row(b, p, "precisions", precision=name) for name in p.precisions]


def batch_rows(b: Bench) -> Iterator[dict[str, Any]]:
    for size, batch, changes in [("85m", 16, {"precision": "fp32"})] if b.tiny else BATCHES:
        yield amp_row(b, amp(b, size), "batches", max(300, 12 * batch), batch_size=batch, **changes)


def variant_rows(
    b: Bench, sizes: tuple[int, ...] = (512, 128)
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield each variant's name, row and the plain step's row; what is not known here is a raw line."""
    from reclib.config import InputError

    for batch in (16,) if b.tiny else sizes:
        plain = amp_row(b, amp(b), "variants", batch_size=batch)
        for name, changes in ({"plain": {}} | VARIANTS).items():
            try:
                yield name, amp_row(b, amp(b), "variants", batch_size=batch, **changes), plain
            except InputError as error:
                b.raw(
                    "variant",
                    variant=name,
                    batch_size=batch,
                    status=f"not in this version: {error}",
                )


def adapter_rows(b: Bench) -> list[dict[str, Any] | None]:
    """Return the rows of the adapters' stage in its order; None for what the planner has no plan of."""
    from reclib.config import TrainConfig
    from reclib.experiments import adaptation, speed

    p, users, items = adapter_params(b), b.shape["synthetic_users"], b.shape["synthetic_items"]
    model = adaptation.shape_of(p, dataset({"users": 300, "mean_len": 9.4}, items))
    shared = {"batch_size": p.batch_size, "mask_prob": p.mask_prob, "last_item_share": p.last_item_share}
    rows = []
    for asked in speed.variants(p):
        train = TrainConfig(precision=asked["precision"], compile_mode=asked["compile_mode"], **shared)
        row = described("adapters", p.size, model, train, users) | {"histories": "whole"}
        row |= {} if asked["model"] == "full" else {"adapter": asked["model"]}
        rows.append(None if asked["model"] == "head" else row)
    return rows


def rows(device: Any) -> list[dict[str, Any]]:
    """Return every row that the stages time on a device, which need not be here."""
    b = Bench(argparse.Namespace(out=Path(os.devnull), tiny=False, device="auto", data=None))
    b.device, b.raw = device, lambda *_, **__: None  # type: ignore[method-assign]
    found = [*size_rows(b), *(row for size in LADDERS for row in ladder_rows(b, size)), *precision_rows(b)]
    found += [*(row for _, row, _ in variant_rows(b)), *batch_rows(b)]
    return found + [row for row in adapter_rows(b) if row is not None]


def trainer_of(b: Bench, row: dict[str, Any]) -> Any:
    from reclib.experiments import speed

    model, train = configs(row)
    return speed.trainer_of(model, train, dataset(row, model.num_items), b.device)


# -- stages --------------------------------------------------------------------------------------------------


def environment(b: Bench) -> None:
    """Versions, clocks, the ceilings of products and copies, and whether energy can be read."""
    import torch

    from reclib import hardware
    from reclib import records as reclib_records
    from reclib.train import timing

    where, size = b.device.torch_device, 256 if b.tiny else 8192
    about = hardware.device_card(b.device) | {"versions": reclib_records.versions()}
    if shutil.which("nvidia-smi"):
        asked = "--query-gpu=power.limit,power.draw,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
        done = subprocess.run(["nvidia-smi", asked, "--format=csv"], capture_output=True, text=True)
        about["clocks"] = done.stdout
    about |= {"cores": hardware.usable_cores(), "energy": timing.Meter(where).read is not None}
    b.raw("environment", **about)
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        x = torch.randn(size, size, device=where, dtype=dtype)
        b.time("product", lambda x=x: x @ x, precision=name, flops=2 * size**3)
    source = torch.zeros(2**20 if b.tiny else 2**31, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    b.time("copy", lambda: target.copy_(source), bytes=2 * source.numel())


def check(b: Bench) -> None:
    """The project's self-check, whose file lets a GPU have records; then gradients in bf16 beside fp32."""
    import torch

    from reclib.config import changed
    from reclib.experiments import comparison

    found = comparison.check(b.device)
    for one in found:
        b.raw("check", **one._asdict())
    comparison.write(b.device, found)
    _, exact = comparison.gradients(b.device, changed(comparison.FAST, **comparison.PLAIN))
    with torch.autocast(b.device.torch_device.type, dtype=torch.bfloat16):
        _, half = comparison.gradients(b.device, comparison.FAST)
    whole = torch.stack([g.norm() for g in exact.values()]).norm()
    gaps = [(half[n] - g).norm() / torch.maximum(g.norm(), 1e-3 * whole) for n, g in exact.items()]
    b.raw("gradients in bf16", finite=bool(torch.stack(gaps).isfinite().all()), gap=str(float(max(gaps))))
    if not all(one.passed for one in found):
        raise RuntimeError("the self-check did not pass: numbers go to raw.jsonl and are no records")


def sizes(b: Bench) -> None:
    """Notebook 06's steps: the named sizes at batch 128, in fp32 and in what suits the device."""
    from reclib import records as reclib_records
    from reclib.config import changed
    from reclib.experiments import comparison

    p, planned = size_params(b), {(row["size"], row["precision"]): row for row in size_rows(b)}
    about = reclib_records.params_hash({"mean_len": p.mean_len, "seed": p.seed})
    records = Records(b, "06_hardware", p, "synthetic", about)
    for size in p.measured_sizes:
        for one in comparison.measured(changed(p, measured_sizes=[size]), b.device):
            own = one.own_params
            records.result("hardware_step", one.metrics, params=own, timings=one.timings)
            row = planned.get((size, own["precision"]))
            records.step(row, one.metrics, one.timings, own["status"])
        b.free()


def ladder(b: Bench, size: str) -> None:
    """Notebook 04's ladder: from the seed study's step to ours, with mixed precision on top."""
    from reclib.experiments import speed

    p = ladder_params(b, size)
    prepared = speed.dataset_of(p)
    records = Records(b, "04_amp_compile", p, f"synthetic {p.size}", prepared.fingerprint)
    records.result("work", speed.work_rows(p, prepared, b.device))
    records.rows("ladder", speed.climb(p, prepared, b.device), ladder_rows(b, size))


def precisions(b: Bench) -> None:
    """Notebook 04's eager steps in each precision, their losses, and the independent clock over an epoch."""
    from reclib.experiments import speed

    p = precision_params(b)
    prepared = speed.dataset_of(p)
    records = Records(b, "04_amp_compile", p, f"synthetic {p.size}", prepared.fingerprint)
    timed = speed.grid(p, prepared, b.device)
    records.rows("step", timed, precision_rows(b))
    for number, (name, losses) in enumerate(speed.losses(timed).items()):
        series = {"step": list(range(1, len(losses) + 1)), "loss": losses}
        own = {"precision": name, "number": number}
        records.result("loss_curve", {"steps": len(losses)}, params=own, series=series)
    clock, steady = speed.whole_epoch(p, prepared, b.device), speed.eager_rates(timed, p.batch_sizes[0])
    rates = {"steady": steady[p.precisions[0]], "epoch": clock.sequences_per_second}
    timings = {f"{name}_sequences_per_second": rate for name, rate in rates.items()}
    own = {"precision": p.precisions[0]}
    records.result("epoch_clock", {"sequences": clock.sequences}, params=own, timings=timings)


def batches(b: Bench) -> None:
    """Rate, free-running rate and memory by batch and precision, towards what the card holds."""
    from reclib.train import timing

    records = Records(b, "06_hardware", size_params(b), "synthetic", "by row")
    for row in batch_rows(b):
        short = row["batch_size"] > 8192 or row["size"] == "430m"
        try:
            found = timing.measure(trainer_of(b, row), *((2, 1) if b.tiny else (5, 2) if short else (40, 10)))
            records.step(row, found.counts(), found.timings(), found.status)
            if not short:
                trainer = trainer_of(b, row)
                clocks = [timing.epoch_clock(trainer) for _ in range(2)]  # the first one warms up
                b.raw("epoch", row=row, sequences_per_second=clocks[1].sequences_per_second)
        except (RuntimeError, MemoryError) as error:
            if not timing.is_out_of_memory(error):
                raise
            records.step(row, {}, {}, f"oom {first_line(error)}")
        trainer = None
        b.free()


def variants(b: Bench, *sizes: int) -> None:
    """Each change of the engine beside the plain step, in turns on the same batches."""
    import torch._dynamo

    from reclib.train import timing

    records = Records(b, "06_hardware", size_params(b), "synthetic", "by row")
    for name, row, plain in variant_rows(b, sizes):
        about = {"variant": name, "batch_size": row["batch_size"]}
        trainers = {}
        try:
            trainers |= {"plain": trainer_of(b, plain), name: trainer_of(b, row)}
            # Captures of graphs fall into a warm-up of 60 steps, which meets most shapes.
            found = timing.interleave(trainers, *((1, 1, 2) if b.tiny else (20, 60, 3)))
            records.step(row, found[name].counts(), found[name].timings(), found[name].status)
            if name != "plain":
                ratio = timing.paired_ratio(found["plain"], found[name])._asdict()
                b.raw("variant", **about, status=trainers[name].compile_reason, speedup=ratio)
        except Exception as error:  # a compiler's, most likely: the other variants are of use
            b.raw("variant", **about, status=first_line(error))
        trainers.clear()
        torch._dynamo.reset()  # else the next catalogue's size would be compiled as a variable
        b.free()


def probe(b: Bench) -> None:
    """Operations that a trace does not tell apart: attention by backend, the head, batches."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from reclib.data.batches import Epoch
    from reclib.data.dataset import train_histories
    from reclib.model.bert4rec import attention_bias

    where, half = b.device.torch_device, torch.bfloat16
    normal = functools.partial(torch.randn, device=where, dtype=half)
    for shape in ((4, 2, 16, 16),) if b.tiny else ((76, 4, 50, 64), (64, 4, 200, 64), (76, 16, 50, 64)):
        q, k, v = normal(3, *shape, requires_grad=True).unbind()
        bias = attention_bias((torch.arange(shape[2], device=where) // 8 + 1).expand(shape[0], -1), half)

        def attend(q: Any = q, k: Any = k, v: Any = v, bias: Any = bias) -> None:
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias).sum().backward(retain_graph=True)

        for backend in ("EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                b.time("attention", attend, shape=shape, backend=backend)
    for m in (16,) if b.tiny else (240, 928):
        for n in (500, 512) if b.tiny else (159_748, 159_752, 159_808):
            h, table, slope = normal(m, 256), normal(n, 256), normal(m, n)
            b.time("head: scores", lambda h=h, table=table: h @ table.t(), targets=m, items=n)
            b.time("head: to hidden", lambda s=slope, table=table: s @ table, targets=m, items=n)
            b.time("head: to table", lambda s=slope, h=h: s.t() @ h, targets=m, items=n)
    row = amp_row(b, amp(b, batch_sizes=[512]), "")
    model, train = configs(row)
    plan = Epoch(train_histories(dataset(row, model.num_items)), model, train, 0)
    b.time("make a batch", lambda: plan.step(0))
    (batch,) = plan.step(0)
    b.time("a batch to the device", lambda: batch.to(where))


def trace(b: Bench) -> None:
    """Where a step's time goes by kernel, and how busy the device is; a Chrome trace comes along."""
    from reclib.train import timing

    p = amp(b, precisions=["bf16"], compile_modes=["off"], batch_sizes=[512], steps=3)
    for precision, batch in (("bf16", 16),) if b.tiny else (("bf16", 512), ("bf16", 128), ("fp32", 512)):
        trainer = trainer_of(b, amp_row(b, p, "trace", precision=precision, batch_size=batch))
        records = Records(b, "04_amp_compile", p, f"synthetic {p.size}", trainer.fingerprint)
        step = timing.measure(trainer, *((2, 1) if b.tiny else (30, 10))).median_seconds
        found = timing.operators(trainer, p.steps, 16, b.out / f"trace-{precision}-{batch}.json.gz")
        series = {name: [getattr(one, name) for one in found] for name in ("calls", "seconds", "share")}
        series["operator"] = [one.name[:160] for one in found]
        own = {"precision": precision, "batch_size": batch}
        records.result("operators", {}, params=own, series=series)
        b.raw("busy", **own, step_seconds=step, kernel_seconds=sum(series["seconds"]))
        b.free()


def ranking(b: Bench) -> None:
    """Users/s ranked over the whole catalogue, and one request at a time."""
    from reclib.data.prepare import evaluation
    from reclib.train import timing
    from reclib.train.fit import rank_targets

    for precision in ("bf16", "fp32") if b.cuda else ("fp32",):
        row = amp_row(b, amp(b, batch_sizes=[512]), "ranking", precision=precision)
        trainer = trainer_of(b, row)
        part = evaluation(dataset(row, trainer.model.config.num_items), "test")
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            rank_targets(trainer, part, True, 10)  # ends with ranks on the host
            rate = len(part.targets) / (time.perf_counter() - began)
        one = timing.latency(trainer, part.histories, 5 if b.tiny else 200)
        b.raw("ranking", precision=precision, users_per_second=rate, **one._asdict())


def training(b: Bench) -> None:
    """A training by the recipe of params/grids/beauty.yaml, on `--data` or synthetic histories."""
    import torch

    from reclib.config import DataConfig
    from reclib.data.prepare import prepare, synthetic_dataset
    from reclib.data.splits import leave_one_out
    from reclib.evaluate.metrics import summary
    from reclib.experiments import baseline
    from reclib.train.fit import rank_targets

    full = {"models": ["bert4rec"], "other_splits": [], "size": "w192d2", "seeds": [0], "epochs": 60}
    full |= {"batch_size": 128, "dropout": 0.4, "max_len": 50, "mask_prob": 0.4, "last_item_share": 0.25}
    full |= {"eval_every": 5, "patience": 0, "learning_rate": 1e-3, "tracker": "none"}
    if b.data:
        prepared = prepare(DataConfig(dataset=str(b.data)))
    else:
        prepared = synthetic_dataset(*((300, 500) if b.tiny else (22_363, 12_101)), 8.9, 0)
    split = leave_one_out(prepared)
    for precision in ("bf16", "fp32") if b.cuda else ("fp32",):
        small = {"size": "nano", "epochs": 2, "eval_every": 1}
        p = b.params("02_baseline", small, dataset=prepared.name, precision=precision, **full)
        records = Records(b, "02_baseline", p, prepared.name, prepared.fingerprint)
        one = baseline.train_seed("02_baseline", p, prepared, split, b.device, "bert4rec", 0)
        about = {"series": one.curve(), "timings": one.timings(), "seed": 0}
        records.result("learning_curve", one.best(), params={"model": "bert4rec"}, **about)
        for name in ("fp32", "bf16"):  # rounded scores tie, and ties count against the target
            one.trainer.autocast = functools.partial(
                torch.autocast, one.trainer.where.type, dtype=torch.bfloat16, enabled=name == "bf16"
            )
            ndcg = summary(rank_targets(one.trainer, split.valid, True, 10).ranks)["ndcg@10"]
            b.raw("ranked", trained_in=precision, ranked_in=name, ndcg=ndcg)


def adapters(b: Bench) -> None:
    """Notebook 05's steps: full fine-tuning, LoRA, gated LoRA, the head alone, iLoRA; eager and compiled."""
    import torch

    from reclib.experiments import adaptation, speed
    from reclib.model.bert4rec import Bert4Rec

    p, (users, items, mean_len) = adapter_params(b), b.shape.values()
    prepared = dataset({"users": users, "mean_len": mean_len}, items)
    records = Records(b, "05_ilora", p, f"synthetic {p.size}", prepared.fingerprint)
    torch.manual_seed(0)
    base = Bert4Rec(adaptation.shape_of(p, prepared))
    records.rows("adapter_step", speed.adapter_grid(p, base, prepared, b.device), adapter_rows(b))


def notebook(b: Bench, number: str) -> None:
    """A notebook at the profile for a lent GPU, through papermill."""
    from reclib import system

    for name in ("papermill", "ipykernel"):
        if importlib.util.find_spec(name) is None:
            raise AbsentError(f"{name} is not installed: no notebook can run")
    words = ["run", number, "--force", "--profile", "smoke" if b.tiny else "lease"]
    words += ["--gpu", "cpu"] if b.kind == "cpu" else []
    command = [sys.executable, "-m", "reclib", *words]
    done = subprocess.run(command, cwd=ROOT, env=system.start_with(), capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:300])


# Name -> (stage, its longest seconds on a GPU), in the order of worth.
STAGES: dict[str, tuple[Callable[[Bench], None], float]] = {
    "env": (environment, 40),
    "check": (check, 60),
    "sizes": (sizes, 90),
    "ladder85": (lambda b: ladder(b, "85m"), 80),
    "variants": (lambda b: variants(b, 512), 170),
    "variants128": (lambda b: variants(b, 128), 90),
    "batches": (batches, 90),
    "probe": (probe, 60),
    "trace": (trace, 45),
    "precisions": (precisions, 60),
    "ranking": (ranking, 45),
    "adapters": (adapters, 100),
    "training": (training, 130),
    "ladder430": (lambda b: ladder(b, "430m"), 80),
    "ladder130": (lambda b: ladder(b, "130m"), 60),
    "notebook06": (lambda b: notebook(b, "06"), 200),
    "notebook04": (lambda b: notebook(b, "04"), 200),
    "notebook05": (lambda b: notebook(b, "05"), 200),
}


# -- the parent ----------------------------------------------------------------------------------------------


def child(b: Bench, name: str, answer: Any) -> None:
    """Carry out a stage in this process, a group of its own, and answer with how it ended."""
    os.setsid()  # compile workers are in it and end with it
    with (b.out / "log.txt").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    b.stage = name
    try:
        STAGES[name][0](b)
        answer.send("ok")
    except AbsentError as error:
        answer.send(f"absent: {error}")
    except Exception as error:
        traceback.print_exc()
        answer.send(f"failed: {first_line(error)}")


def carry_out(b: Bench, name: str, seconds: float) -> str:
    """Run a stage in a process of its own for at most so many seconds; return how it ended."""
    heard, answer = FORK.Pipe(duplex=False)
    process = FORK.Process(target=child, args=(b, name, answer))
    process.start()
    answer.close()
    process.join(seconds)
    late = process.is_alive()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if late:
        return f"out of time after {seconds:.0f} s"
    with contextlib.suppress(EOFError):
        return heard.recv()
    code = process.exitcode
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def wheels(folder: Path, version: str) -> int:
    """Download what a machine with torch, numpy, pandas and scipy lacks; print how many and how large."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = [*project["dependencies"], *project["optional-dependencies"]["study"]]
    wanted = [one for one in stated if one.replace("=", ">").partition(">")[0] in CARRIED]
    tags = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    command += ["--python-version", version, "--implementation", "cp", *(f"--platform={tag}" for tag in tags)]
    done = subprocess.run([*command, *wanted], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return 1
    for file in [file for name in LEFT_OUT for file in folder.glob(f"{name}-*.whl")]:
        file.unlink()
    found = [file.stat().st_size for file in folder.glob("*.whl")]
    print(f"{len(found)} wheels, {sum(found) / 1e6:.1f} MB, in {folder}")
    return 0


def no_gpu() -> bool:
    """Whether torch has no GPU here, looked up in a process of its own: it may spoil CUDA for later forks."""
    import torch

    look = FORK.Process(target=lambda: sys.exit(not torch.cuda.is_available()))
    look.start()
    look.join()
    return look.exitcode != 0


def main(argv: list[str] | None = None) -> int:
    words = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**words)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-row", help="folder of the results (gpu-row)")
    parser.add_argument("--seconds", type=float, default=780, help="for everything (%(default)s)")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes of no interest, to try the script")
    parser.add_argument("--data", type=Path, help="a prepared folder, for the stage training")
    parser.add_argument("--commit", help="of the checkout, where its .git is not there")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="only download what a bare machine lacks")
    parser.add_argument("--python", default="3.12", help="of that machine (%(default)s)")
    given = parser.parse_args(argv)
    if given.wheels:
        return wheels(given.wheels, given.python)
    names, began = given.stages.split(","), time.monotonic()
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"unknown stages: {', '.join(unknown)}; there are: {', '.join(STAGES)}")
    if given.device == "auto" and no_gpu():
        print("no GPU that torch can use is here; --device cpu --tiny tries the script", file=sys.stderr)
        return 2
    from reclib.experiments import (
        speed,  # noqa: F401  (once, for all stages)
    )

    b = Bench(given)
    shutil.rmtree(b.out / "runs", ignore_errors=True)  # a finished training would only be loaded
    os.environ |= {"RECLIB_RECORDS": str(b.out / "executed"), "RECLIB_RUNS": str(b.out / "runs")}
    os.environ |= {"RECLIB_COMMIT": given.commit} if given.commit else {}
    (b.out / "executed").mkdir(parents=True, exist_ok=True)
    states = {}
    for name in names:
        started, left = time.monotonic(), given.seconds - (time.monotonic() - began)
        limit = min(STAGES[name][1] * (4 if given.device == "cpu" else 1), left)
        states[name] = carry_out(b, name, limit) if limit > 0 else "no time left"
        row = {"stage": name, "state": states[name], "seconds": round(time.monotonic() - started, 2)}
        print(f"{name:<12}{row['seconds']:>8.1f} s  {states[name]}", flush=True)
        with (b.out / "stages.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    shutil.rmtree(b.out / "runs", ignore_errors=True)
    print(f"{time.monotonic() - began:.0f} s; the results are in {b.out.name}/")
    return 0 if set(states.values()) == {"ok"} else 1


if __name__ == "__main__":
    raise SystemExit(main())
