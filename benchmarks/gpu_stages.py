"""The stages of `gpu.py`: what each times on a device, and the rows of it that the planner predicts.

Parameters and rows are functions of the device alone, which need not be here: `planner.py predict h100` calls
them before a GPU's first run, and a stage that times a row writes a record of it.
"""

import functools
import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from common import Row, Rows, first_line
from planner import configs, dataset, described, write
from torch.utils.benchmark import Timer

from reclib import hardware, parameters, system
from reclib import records as reclib_records
from reclib.config import InputError, TrainConfig, changed, validated
from reclib.experiments import adaptation, comparison, speed
from reclib.model.bert4rec import Bert4Rec
from reclib.train import timing

ELECTRONICS = {"synthetic_users": 20_000, "synthetic_items": 159_748, "synthetic_mean_len": 9.4}
SMALL = {"synthetic_users": 300, "synthetic_items": 500, "synthetic_mean_len": 9.4}
LADDERS = {"85m": (10, 2), "430m": (5, 1), "130m": (8, 1)}  # timed steps, rounds
PADDED = {"layout": "padded", "head_rows": "all", "loss": "plain", "precision": "fp32"}
# Size, sequences of a step, changes of the training; in bf16 unless they say otherwise.
BATCHES: list[tuple[str, int, Row]] = [
    *(("85m", batch, {}) for batch in (128, 512, 2048, 8192)),
    *(("85m", 512, {"precision": precision}) for precision in ("tf32", "fp32")),
    *(("430m", batch, {}) for batch in (512, 4096, 16_384)),
    ("85m", 16_384, {}),
    ("85m", 512, PADDED),
    ("430m", 32_768, {}),
]
GRAPH = {"compile_mode": "graph", "bucket_steps": 4}
# Each is timed against the plain step, in turns: first the graphs, which matter most, last what takes tens of
# seconds to compile and may run into the stage's limit.
VARIANTS: dict[str, Row] = {
    "one CUDA graph a step": GRAPH,
    "loss plain": {"loss": "plain"},
    "loss chunked": {"loss": "chunked"},
    "buckets of 4 steps": {"bucket_steps": 4},
    "no clipping": {"clip_norm": None},
    "loss compiled": {"loss": "fused"},
    "encoder compiled": {"compile_mode": "default"},
    "encoder compiled, CUDA graphs": {"compile_mode": "reduce-overhead"},
}


class Bench(Rows):
    """What a stage works with: where it runs, how large, and `raw.jsonl`, the file of its rows."""

    def __init__(self, out: Path, tiny: bool = False, kind: str = "auto") -> None:
        super().__init__(out / "raw.jsonl")
        self.out, self.tiny, self.kind, self.stage = out, tiny, kind, ""
        self.shape = SMALL if tiny else ELECTRONICS

    @functools.cached_property
    def device(self) -> Any:
        return hardware.resolve("cpu" if self.kind == "cpu" else "auto")

    @property
    def cuda(self) -> bool:
        return self.device.torch_device.type == "cuda"

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("bf16", "fp32") if self.cuda else ("fp32",)

    def add(self, name: str, /, **values: Any) -> Row:
        """Write a row, whether or not it may be a record."""
        return super().add(name, stage=self.stage, **system.plain(values))

    def time(self, name: str, action: Callable[[], object], /, **about: Any) -> None:
        """Time an operation; one that raises is a row with its error."""

        def seconds() -> dict[str, float]:
            timer = Timer("action()", globals={"action": action})  # waits for the device
            return {"seconds": timer.blocked_autorange(min_run_time=0.02 if self.tiny else 0.2).median}

        self.attempt(name, seconds, **about)

    def params(self, notebook: str, small: Mapping[str, Any], **full: Any) -> Any:
        """Return a notebook's parameters: its smallest profile, the stage's, the tiny run's."""
        profile = parameters.profile(notebook, "smoke")
        return parameters.build(notebook, profile | full | (small if self.tiny else {}))

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


class Records:
    """Results of one kind of notebook: to raw.jsonl, and to the records where there may be any."""

    def __init__(self, b: Bench, notebook: str, p: Any, name: str, fingerprint: str) -> None:
        data = {"name": name, "fingerprint": fingerprint}
        self.b, self.run, self.about = b, None, {"card": hardware.device_card(b.device), "data": data}
        try:
            self.run = reclib_records.Run(notebook, p, self.about["card"], data)
        except InputError as error:  # no passed self-check
            b.add("no records", reason=str(error))

    def result(self, name: str, metrics: Mapping[str, Any], **rest: Any) -> None:
        self.b.add(name, metrics=dict(metrics), **rest)
        if self.run is not None:
            self.run.result(name, metrics, **rest)

    def step(self, row: Row | None, counts: Any, timings: Any, status: str) -> None:
        """Write a step that the planner has a row of; one that did not run is only a raw row."""
        self.b.add("row", row=row, status=status, counts=counts, timings=timings)
        if row is not None and timings and self.run is not None:
            own = row | {"set": row["stage"], "device": self.b.device.label}
            result = self.about | {"counts": counts, "timings": timings}
            write("planner_row", result, own, self.b.out / "executed")

    def rows(self, name: str, timed: Iterable[Any], rows: Iterable[Row | None]) -> None:
        """Write rows of `speed`, each as its notebook does and as the planner's."""
        for step, row in zip(timed, rows, strict=True):
            counts, settings = step.metrics(), step.own_params()
            self.result(name, counts, params=settings, timings=step.timings)
            self.step(row, counts, step.timings, f"{settings['status']} {settings['reason']}".strip())


# -- what is timed, as parameters of notebooks and as rows that the planner predicts -------------------------


def amp(b: Bench, size: str = "85m", **full: Any) -> Any:
    """Return parameters of notebook 04 on histories of Electronics' shape."""
    small = {"size": "nano", "steps": 2, "repeats": 1, "warmup_steps": 1, "batch_sizes": [16]}
    return b.params("04_amp_compile", small, dataset="synthetic", size=size, **(b.shape | full))


def amp_row(b: Bench, p: Any, stage: str, users: int = 0, **train: Any) -> Row:
    """Return the row of a step with these changes of the training."""
    model = speed.model_of(p, dataset({"users": 300, "mean_len": 9.4}, p.synthetic_items))
    default = {"batch_size": p.batch_sizes[0], "precision": b.precisions[0]}
    train_config = validated(TrainConfig, default | train)
    return described(stage, p.size, model, train_config, users or p.synthetic_users)


def size_params(b: Bench) -> Any:
    full = {"measured_sizes": ["5m", "85m", "130m", "430m"], "users": 20_000, "steps": 30, "warmup_steps": 5}
    return b.params("06_hardware", {"measured_sizes": ["nano"], "users": 300, "steps": 2}, **full)


def size_rows(b: Bench) -> list[Row]:
    p = size_params(b)
    return [
        described("sizes", size, comparison.model_of(p, size), comparison.train_of(p, name), p.users)
        for size in p.measured_sizes
        for name in b.precisions
    ]


def ladder_plan(b: Bench, size: str) -> tuple[Any, Any, list[Row]]:
    """Return the parameters of a ladder, its histories, and the rows of its rungs."""
    steps, repeats = LADDERS[size]
    full = {"precisions": ["fp32", "bf16"], "compile_modes": ["off"], "batch_sizes": [128], "warmup_steps": 3}
    p = amp(b, size, steps=steps, repeats=repeats, **full)
    prepared = speed.dataset_of(p)
    rungs = speed.rungs_of(p, prepared, b.device)
    rows = [described(f"ladder {size}", p.size, rung.model, rung.train, p.synthetic_users) for rung in rungs]
    return p, prepared, rows


def precision_plan(b: Bench) -> tuple[Any, list[Row]]:
    """Return the parameters of steps in each precision, and their rows."""
    full = {"compile_modes": ["off"], "batch_sizes": [512], "steps": 25, "warmup_steps": 10, "repeats": 2}
    p = amp(b, precisions=["fp32", "tf32", "bf16", "fp16"] if b.cuda else ["fp32", "bf16"], **full)
    return p, [amp_row(b, p, "precisions", precision=name) for name in p.precisions]


def batch_rows(b: Bench) -> list[Row]:
    return [
        amp_row(b, amp(b, size), "batches", max(300, 12 * batch), batch_size=batch, **changes)
        for size, batch, changes in ([("85m", 16, {"precision": "fp32"})] if b.tiny else BATCHES)
    ]


def variant_rows(b: Bench, batch: int) -> dict[str, Row]:
    """Return the rows of the plain step and of its variants."""
    every = {"plain": {}} | VARIANTS
    return {n: amp_row(b, amp(b), "variants", batch_size=batch, **changes) for n, changes in every.items()}


def adapter_plan(b: Bench) -> tuple[Any, list[Row | None]]:
    """Return the parameters of steps with adapters, and their rows; None for what the planner cannot plan."""
    small = {"size": "nano", "rounds": 2, "warmup_steps": 1, "batch_size": 16}
    small |= {"compile_modes": ["off"], "precisions": ["fp32"]}
    full = {"size": "85m", "dropout": 0.1, "arms": ["none", "full", "lora", "ilora", "gated", "head"]}
    full |= {"precisions": ["bf16", "fp32"], "compile_modes": ["off"], "batch_size": 512}
    full |= {"rounds": 30, "warmup_steps": 12, "learning_rates": [1e-4], "representation": "mean_embedding"}
    p = b.params("05_ilora", small, mask_prob=0.2, last_item_share=0.15, **full)
    users, items, mean_len = b.shape.values()
    model = adaptation.shape_of(p, dataset({"users": 300, "mean_len": mean_len}, items))
    shared = {"batch_size": p.batch_size, "mask_prob": p.mask_prob, "last_item_share": p.last_item_share}
    rows: list[Row | None] = []
    for variant in speed.variants(p):
        train = TrainConfig(precision=variant["precision"], compile_mode=variant["compile_mode"], **shared)
        row = described("adapters", p.size, model, train, users) | {"histories": "whole"}
        row |= {} if variant["model"] == "full" else {"adapter": variant["model"]}
        rows.append(None if variant["model"] == "head" else row)
    return p, rows


def rows(device: Any) -> list[Row]:
    """Return every row that the stages time on a device, which need not be here."""
    b = Bench(Path(os.devnull))
    b.device = device
    ladders = [row for size in LADDERS for row in ladder_plan(b, size)[-1]]
    variants = [row for batch in (512, 128) for row in variant_rows(b, batch).values()]
    every = [*size_rows(b), *ladders, *precision_plan(b)[-1], *variants, *batch_rows(b), *adapter_plan(b)[-1]]
    return [row for row in every if row is not None]


def trainer_of(b: Bench, row: Row) -> Any:
    model, train = configs(row)
    return speed.trainer_of(model, train, dataset(row, model.num_items), b.device)


# -- stages --------------------------------------------------------------------------------------------------


def environment(b: Bench) -> None:
    """Versions, clocks, the ceilings of products and copies, and whether energy can be read."""
    where, size = b.device.torch_device, 256 if b.tiny else 8192
    about = hardware.device_card(b.device) | {"versions": reclib_records.versions()}
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=power.limit,power.draw,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
        done = subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True)
        about["clocks"] = done.stdout
    about |= {"cores": hardware.usable_cores(), "energy": timing.Meter(where).read is not None}
    b.add("environment", card=about)
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        x = torch.randn(size, size, device=where, dtype=dtype)
        b.time("product", lambda x=x: x @ x, precision=name, flops=2 * size**3)
    source = torch.zeros(2**20 if b.tiny else 2**31, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    b.time("copy", lambda: target.copy_(source), bytes=2 * source.numel())


def check(b: Bench) -> None:
    """The project's self-check, whose file lets a GPU have records; then gradients in bf16 beside fp32."""
    checks = comparison.check(b.device)
    for answer in checks:
        b.add("check", check=answer._asdict())
    comparison.write(b.device, checks)
    _, exact = comparison.gradients(b.device, changed(comparison.FAST, **comparison.PLAIN))
    with torch.autocast(b.device.torch_device.type, dtype=torch.bfloat16):
        _, half = comparison.gradients(b.device, comparison.FAST)
    whole = torch.stack([g.norm() for g in exact.values()]).norm()
    gaps = [(half[n] - g).norm() / torch.maximum(g.norm(), 1e-3 * whole) for n, g in exact.items()]
    b.add("gradients in bf16", finite=bool(torch.stack(gaps).isfinite().all()), gap=str(float(max(gaps))))

    def losses(mode: str) -> torch.Tensor:
        steps = comparison.make_trainer(b.device, compile_mode=mode, bucket_steps=1).steps()
        return torch.tensor([next(steps).loss for _ in range(24)])

    b.attempt("graph", lambda: {"largest_gap": float((losses("graph") - losses("off")).abs().max())})
    if not all(answer.passed for answer in checks):
        raise RuntimeError("the self-check did not pass: numbers go to raw.jsonl and are no records")


def sizes(b: Bench) -> None:
    """Notebook 06's steps: the named sizes at batch 128, in fp32 and in what suits the device."""
    p, planned = size_params(b), {(row["size"], row["precision"]): row for row in size_rows(b)}
    about = reclib_records.params_hash({"mean_len": p.mean_len, "seed": p.seed})
    records = Records(b, "06_hardware", p, "synthetic", about)
    for size in p.measured_sizes:
        for step in comparison.measured(changed(p, measured_sizes=[size]), b.device):
            settings = step.params
            records.result("hardware_step", step.metrics, params=settings, timings=step.timings)
            row = planned.get((size, settings["precision"]))
            records.step(row, step.metrics, step.timings, settings["status"])
        b.free()


def ladder(b: Bench, size: str) -> None:
    """Notebook 04's ladder: from the seed study's step to ours, with mixed precision on top."""
    p, prepared, planned = ladder_plan(b, size)
    records = Records(b, "04_amp_compile", p, f"synthetic {p.size}", prepared.fingerprint)
    records.result("work", speed.work_rows(p, prepared, b.device))
    records.rows("ladder", speed.climb(p, prepared, b.device), planned)


def precisions(b: Bench) -> None:
    """Notebook 04's eager steps in each precision, their losses, and the independent clock over an epoch."""
    p, planned = precision_plan(b)
    prepared = speed.dataset_of(p)
    records = Records(b, "04_amp_compile", p, f"synthetic {p.size}", prepared.fingerprint)
    timed = speed.grid(p, prepared, b.device)
    records.rows("step", timed, planned)
    for number, (name, losses) in enumerate(speed.losses(timed).items()):
        series = {"step": list(range(1, len(losses) + 1)), "loss": losses}
        settings = {"precision": name, "number": number}
        records.result("loss_curve", {"steps": len(losses)}, params=settings, series=series)
    clock, steady = speed.whole_epoch(p, prepared, b.device), speed.eager_rates(timed, p.batch_sizes[0])
    timings = {"steady_sequences_per_second": steady[p.precisions[0]]}
    timings |= {"epoch_sequences_per_second": clock.sequences_per_second}
    settings = {"precision": p.precisions[0]}
    records.result("epoch_clock", {"sequences": clock.sequences}, params=settings, timings=timings)


def batches(b: Bench) -> None:
    """Rate, free-running rate and memory by batch and precision, towards what the card holds."""
    records = Records(b, "06_hardware", size_params(b), "synthetic", "by row")
    for row in batch_rows(b):
        short = row["batch_size"] > 8192 or row["size"] == "430m"
        try:
            steps = (2, 1) if b.tiny else (5, 2) if short else (40, 10)
            measured = timing.measure(trainer_of(b, row), *steps)
            records.step(row, measured.counts(), measured.timings(), measured.status)
            if not short:
                trainer = trainer_of(b, row)
                clocks = [timing.epoch_clock(trainer) for _ in range(2)]  # the first one warms up
                b.add("epoch", row=row, sequences_per_second=clocks[1].sequences_per_second)
        except (RuntimeError, MemoryError) as error:
            if not timing.is_out_of_memory(error):
                raise
            records.step(row, {}, {}, f"oom {first_line(error)}")
        trainer = None
        b.free()


def variants(b: Bench, batch: int) -> None:
    """Each change of the engine beside the plain step, in turns on the same batches."""
    records = Records(b, "06_hardware", size_params(b), "synthetic", "by row")
    planned = variant_rows(b, 16 if b.tiny else batch)
    for name, row in planned.items():
        about, trainers = {"variant": name, "batch_size": row["batch_size"]}, {}
        try:
            trainers |= {"plain": trainer_of(b, planned["plain"]), name: trainer_of(b, row)}
            # Captures of graphs fall into a warm-up of 60 steps, which meets most shapes.
            measured = timing.interleave(trainers, *((1, 1, 2) if b.tiny else (20, 60, 3)))
            records.step(row, measured[name].counts(), measured[name].timings(), measured[name].status)
            if name != "plain":
                ratio = timing.paired_ratio(measured["plain"], measured[name])._asdict()
                b.add("variant", **about, compiled=trainers[name].compile_reason, speedup=ratio)
        except Exception as error:  # a compiler's, most likely: the other variants are of use
            b.add("variant", **about, status="failed", reason=first_line(error))
        trainers.clear()
        torch._dynamo.reset()  # else the next catalogue's size would be compiled as a variable
        b.free()


def trace(b: Bench) -> None:
    """Where a step's time goes by kernel, and how busy the device is; a Chrome trace comes along."""
    p = amp(b, precisions=["bf16"], compile_modes=["off"], batch_sizes=[512], steps=3)
    for precision, batch in (("bf16", 16),) if b.tiny else (("bf16", 512), ("bf16", 128), ("fp32", 512)):
        trainer = trainer_of(b, amp_row(b, p, "trace", precision=precision, batch_size=batch))
        records = Records(b, "04_amp_compile", p, f"synthetic {p.size}", trainer.fingerprint)
        step = timing.measure(trainer, *((2, 1) if b.tiny else (30, 10))).median_seconds
        operators = timing.operators(trainer, p.steps, 16, b.out / f"trace-{precision}-{batch}.json.gz")
        names, *columns = zip(*operators, strict=True)
        series = dict(zip(("calls", "seconds", "share"), map(list, columns), strict=True))
        series["operator"] = [name[:160] for name in names]
        settings = {"precision": precision, "batch_size": batch}
        records.result("operators", {}, params=settings, series=series)
        b.add("busy", **settings, step_seconds=step, kernel_seconds=sum(series["seconds"]))
        b.free()


def adapters(b: Bench) -> None:
    """Notebook 05's steps: full fine-tuning, LoRA, gated LoRA, the head alone, iLoRA."""
    (p, planned), (users, items, mean_len) = adapter_plan(b), b.shape.values()
    prepared = dataset({"users": users, "mean_len": mean_len}, items)
    records = Records(b, "05_ilora", p, f"synthetic {p.size}", prepared.fingerprint)
    torch.manual_seed(0)
    base = Bert4Rec(adaptation.shape_of(p, prepared))
    records.rows("adapter_step", speed.adapter_grid(p, base, prepared, b.device), planned)


STAGES: dict[str, Callable[[Bench], None]] = {
    "env": environment,
    "check": check,
    "sizes": sizes,
    "ladder85": lambda b: ladder(b, "85m"),
    "variants": lambda b: variants(b, 512),
    "variants128": lambda b: variants(b, 128),
    "batches": batches,
    "trace": trace,
    "precisions": precisions,
    "adapters": adapters,
    "ladder430": lambda b: ladder(b, "430m"),
    "ladder130": lambda b: ladder(b, "130m"),
}
