"""What one GPU measures of this study in ten minutes, in order of worth; the row that `make gpu` adds.

    python benchmarks/gpu.py                              all stages on the GPU that is here
    python benchmarks/gpu.py --stages env,check,sizes     some of them
    python benchmarks/gpu.py --device cpu --tiny          the same code, small, where there is no GPU

Stages (`gpu_stages.py`) run in a process of their own, each with a time limit: one that raises, hangs or is
killed is a row with its reason, and the next one has a new process and runs whole. Results are written at
once to the folder `--out`: `executed/` has the records, once the self-check has passed, `raw.jsonl` every
number with or without a record, `stages.jsonl` a row for each stage, `log.txt` what they printed. `python -m
reclib merge gpu-row/executed` takes the records into a checkout; `python benchmarks/planner.py` compares
them with the predictions made before.

A GPU machine without network (Python 3.12 with torch, pandas and scipy): the first command is for a machine
with network. The checkout then goes over with `.wheels` in it, and the other two commands are for the GPU's.

    pip download -d .wheels --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
        --platform manylinux2014_x86_64 isal msgspec 'plotly>=7' pydantic pyyaml safetensors tqdm
    python3 -m pip install --no-index --no-deps --target .site .wheels/*.whl
    PYTHONPATH=$PWD/.site python3 benchmarks/gpu.py --commit HASH

Where a command may take some minutes only, run it again with the same `--out` and other `--stages`: the
self-check and the records of the first call stay valid. Where few files come back, pack the folder:
`tar czf row.tgz --exclude=runs gpu-row`. Notebooks run on a GPU by `python -m reclib run 06 --profile lease`.

Exit codes: 0 every stage ended well, 1 one did not, 2 wrong input or no GPU.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, Rows, first_line, parser_of

# What the stages import touches CUDA, which cannot start in a fork after that: the parent imports none of it.
FORK = multiprocessing.get_context("fork")
IMPORTS = 90  # seconds that they may take
# The stages of `gpu_stages.py` in the order of worth, with their longest seconds on a GPU.
LIMITS: dict[str, float] = {
    "env": 40,
    "check": 60,
    "sizes": 90,
    "ladder85": 80,
    "variants": 170,
    "variants128": 150,
    "batches": 90,
    "trace": 45,
    "precisions": 60,
    "adapters": 100,
    "ladder430": 80,
    "ladder130": 60,
}


def work(args: argparse.Namespace, names: Sequence[str], sender: Any) -> None:
    """Carry out stages in this process, a group of its own, until one fails; send how each ended."""
    os.setsid()  # compile workers are in it and end with it
    with (args.out / "log.txt").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from gpu_stages import STAGES, Bench  # here, since a process that imports torch may not fork for CUDA

    b = Bench(args.out, tiny=args.tiny, kind=args.device)
    for name in names:
        sender.send(name)
        b.stage, status = name, "ok"
        try:
            STAGES[name](b)
        except Exception as error:
            traceback.print_exc()
            status = f"failed: {first_line(error)}"
        sender.send(status)
        if status.startswith("failed"):  # the next one has a process without its traces
            return
        b.free()


def carry_out(
    args: argparse.Namespace, names: Sequence[str], limit: Callable[[str], float]
) -> Iterator[tuple[str, str, float]]:
    """Run stages, one process for as long as none fails; yield name, how it ended and its seconds."""
    while names:
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=work, args=(args, names, sender))
        process.start()
        sender.close()
        while names:
            began, status = time.monotonic(), f"not ready after {IMPORTS} s"
            try:
                if receiver.poll(IMPORTS):  # the name comes once what it needs is imported
                    receiver.recv()
                    began, allowed = time.monotonic(), limit(names[0])
                    in_time = allowed > 0 and receiver.poll(allowed)
                    status = receiver.recv() if in_time else f"out of time after {max(0, allowed):.0f} s"
            except EOFError:
                process.join()
                code = process.exitcode
                status = f"ended with exit code {code}"
                status = f"killed by {signal.Signals(-code).name}" if code < 0 else status
            yield names[0], status, time.monotonic() - began
            names = names[1:]
            if status != "ok":
                break
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def look_for_gpu() -> None:
    """End this process with 0 where torch has a GPU here."""
    import torch

    sys.exit(not torch.cuda.is_available())


def no_gpu() -> bool:
    """Whether torch has no GPU here, looked up in a process of its own: it may spoil CUDA for later forks."""
    look = FORK.Process(target=look_for_gpu)
    look.start()
    look.join()
    return look.exitcode != 0


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "gpu-row", help="folder of the results (gpu-row)")
    add("--seconds", type=float, default=780, help="for everything (%(default)s)")
    add("--stages", help="names with commas between them (all of gpu_stages.py)")
    add("--device", default="auto", choices=("auto", "cpu"))
    add("--tiny", action="store_true", help="sizes of no interest, to try the script")
    add("--commit", help="of the checkout, where its .git is not there")
    args = parser.parse_args(argv)
    if args.device == "auto" and no_gpu():
        print("no GPU that torch can use is here; --device cpu --tiny tries the script", file=sys.stderr)
        return 2
    names, began = args.stages.split(",") if args.stages else list(LIMITS), time.monotonic()
    if unknown := [name for name in names if name not in LIMITS]:
        parser.error(f"unknown stages: {', '.join(unknown)}; there are: {', '.join(LIMITS)}")
    args.out = args.out.resolve()
    shutil.rmtree(args.out / "runs", ignore_errors=True)  # a finished training would only be loaded
    os.environ |= {"RECLIB_RECORDS": str(args.out / "executed"), "RECLIB_RUNS": str(args.out / "runs")}
    os.environ |= {"RECLIB_COMMIT": args.commit} if args.commit else {}
    (args.out / "executed").mkdir(parents=True, exist_ok=True)
    stages = Rows(args.out / "stages.jsonl")

    def limit(name: str) -> float:
        left = args.seconds - (time.monotonic() - began)
        return min(LIMITS[name] * (4 if args.device == "cpu" else 1), left)

    for name, status, seconds in carry_out(args, names, limit):
        stages.add(name, status=status, seconds=round(seconds, 2))
    shutil.rmtree(args.out / "runs", ignore_errors=True)
    print(f"{time.monotonic() - began:.0f} s; the results are in {args.out.name}/")
    return int(stages.failed)


if __name__ == "__main__":
    raise SystemExit(main())
