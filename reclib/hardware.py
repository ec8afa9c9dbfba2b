"""What device this is, what precision it should train in, and how to measure on it honestly.

Decisions are pure functions of a `Card`, so that they can be tested for devices that are not there. Devices
that are not here are `Board`s: what their makers say of them, from `params/devices.yaml`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import json
import os
import platform
import re
import resource
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from reclib import system
from reclib.config import GPU_LABELS, InputError, nearest
from reclib.system import Parser

GIB = 2**30

# The CPU with a stated number of threads: devices of their own, with records of their own.
CPU_THREADS = {"cpu1": 1, "cpu2": 2}

# Words of a CUDA device's name that say it is less than the board: a part of one, or another chip.
OTHER_CHIPS = {"mig", "laptop", "d"}


@dataclass(frozen=True, kw_only=True)
class Card:
    """A device as it describes itself."""

    type: str  # "cpu" or "cuda"
    name: str
    label: str  # a gpu label of params/gpu, or "other"
    capability: tuple[int, int] | None = None  # CUDA compute capability
    memory_bytes: int | None = None
    arch_list: tuple[str, ...] = ()  # architectures that this torch build has kernels for
    threads: int | None = None  # CPU threads that torch uses


@dataclass(frozen=True)
class Device:
    """The device that a run uses, beside the one that was asked for."""

    torch_device: torch.device
    card: Card
    claimed: str

    @property
    def label(self) -> str:
        """Label of the device that is really there."""
        return self.card.label

    @property
    def is_claimed(self) -> bool:
        """Whether what was asked for is what is there ("auto" takes what is there)."""
        board = of_memory(self.label, self.card.memory_bytes or 0)
        return self.claimed in ("auto", self.label, board and board.label)


# -- the device that is here ---------------------------------------------------------------------------------


def label_of(name: str) -> str:
    """Return the family of boards that a CUDA device belongs to by its name, else "other".

    Whole words, so that L40 is no L4, or two in a row (RTX 4090). "H100 NVL" and "H100 PCIe" are H100s too.
    """
    words = name.lower().replace("-", " ").split()
    if OTHER_CHIPS & set(words):
        return "other"
    names = {*words, *map("".join, itertools.pairwise(words))}
    return next((family for family in map(_family, catalogue()) if family in names), "other")


def probe() -> Card:
    """Describe the device that is there: the first CUDA device, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return Card(type="cpu", name=cpu_name(), label="cpu", threads=torch.get_num_threads())
    properties = torch.cuda.get_device_properties(0)
    return Card(
        type="cuda",
        name=properties.name,
        label=label_of(properties.name),
        capability=(properties.major, properties.minor),
        memory_bytes=properties.total_memory,
        arch_list=tuple(torch.cuda.get_arch_list()),
    )


def cpu_card(claimed: str, cores: int, threads: int) -> Card:
    """Describe the CPU as it is used under the label `claimed`: with its threads if the cores are there."""
    number = CPU_THREADS.get(claimed)
    if number is None or number > cores:
        return Card(type="cpu", name=cpu_name(), label="cpu", threads=threads)
    return Card(type="cpu", name=cpu_name(), label=claimed, threads=number)


def find(claimed: str = "auto", card: Card | None = None) -> Device:
    """Return the device to use for the gpu label `claimed`; nothing is set.

    A label is a claim: a run on another device goes on there, and everything measured carries that device.
    "cpu" is a choice and is always honoured, and so is "cpu1" or "cpu2" where there are as many cores. `card`
    is the device that is there, None: the one of `probe`. Raises `InputError` for an unknown label and for a
    GPU that this torch build has no kernels for.
    """
    import torch

    if claimed not in GPU_LABELS:
        raise InputError(f"unknown gpu label {claimed!r}; allowed: {', '.join(GPU_LABELS)}")
    if claimed == "cpu" or claimed in CPU_THREADS:
        card = cpu_card(claimed, usable_cores(), torch.get_num_threads())
    card = card or probe()
    check_build(card)
    return Device(torch.device(card.type), card, claimed)


def resolve(claimed: str = "auto", card: Card | None = None) -> Device:
    """Find the device for a gpu label and set torch up for it, for the rest of the process."""
    import torch

    device = find(claimed, card)
    if device.card.type == "cuda":
        # From torch 2.9 on cuDNN's attention comes first on capability 9 and 10, and plans anew, tens of
        # milliseconds, for every shape of rows; the shapes of packed rows change step by step.
        torch.backends.cuda.enable_cudnn_sdp(False)
        return device
    # The number of threads is set even where torch has that many: until then MKL may take fewer for a call as
    # it sees fit (MKL_DYNAMIC), and a matrix product over another number of threads rounds otherwise.
    torch.set_num_threads(CPU_THREADS.get(device.label, torch.get_num_threads()))
    # Numbers below 1.2e-38 are zero. Once attention is sharp, some per cent of its probabilities are that
    # small: a step of training took 1.7 times as long with them (FINDINGS.md). The setting belongs to a
    # thread and is passed on to those that it starts, so this comes before the first parallel operation.
    torch.set_flush_denormal(True)
    return device


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def visible_gpus() -> list[tuple[str, str]]:
    """Return (what to set CUDA_VISIBLE_DEVICES to, label) of each GPU that this process may use."""
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if given is None else given.split(",")
    return [(names[i].strip(), label_of(torch.cuda.get_device_name(i))) for i in range(count)]


def check_build(card: Card) -> None:
    """Refuse a CUDA device that this torch build holds no kernels for, and say what to install."""
    import torch

    if card.type != "cuda" or card.capability is None:
        return
    # Binary code (sm_xx) runs on its own major version from its minor up; PTX (compute_xx) on anything newer.
    for arch in card.arch_list:
        kind, digits = re.fullmatch(r"([a-z]+)_(\d+)[a-z]?", arch).groups()  # type: ignore[union-attr]
        built = divmod(int(digits), 10)
        if built <= card.capability and (kind == "compute" or built[0] == card.capability[0]):
            return
    raise InputError(
        f"torch {torch.__version__} has no kernels for {card.name} (capability {_version(card)}): built "
        f"for {', '.join(card.arch_list) or 'no GPU'}. For a V100 install the CUDA 12.6 build: pip install "
        f"torch=={torch.__version__.partition('+')[0]} --index-url https://download.pytorch.org/whl/cu126"
    )


def _version(card: Card) -> str:
    return ".".join(map(str, card.capability or ()))


def device_card(device: Device) -> dict[str, Any]:
    """Return what a record says of the device: card, torch, CUDA and driver versions."""
    import torch

    card = asdict(device.card)
    del card["arch_list"]
    on_cpu = device.card.type == "cpu"
    return card | {
        "claimed": device.claimed,
        "cpu_model": cpu_model() if on_cpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": None if on_cpu else driver_version(),
    }


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver as its library says it; None where there is none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    failed = library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, len(text))
    return None if failed else text.value.decode()


def cpu_name() -> str:
    """Return what this machine's CPU calls itself; several generations may share a name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_model() -> str:
    """Return a short name that tells generations apart, such as `Intel Xeon 6/207` (family and model)."""
    numbers = [_cpuinfo()[name] for name in ("cpu family", "model") if name in _cpuinfo()]
    return f"{short_cpu(cpu_name())} {'/'.join(numbers)}".strip()


def short_cpu(name: str) -> str:
    """Return a CPU's name without marks and words that say nothing."""
    words = re.sub(r"\((R|TM)\)|@.*", "", name).split()
    return " ".join(word for word in words if word not in ("Processor", "CPU"))


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Return what Linux says of the first core; nothing elsewhere."""
    if sys.platform != "linux":
        return {}
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    return dict(re.findall(r"^(\S[^\t:]*?)\s*: *(.*?) *$", first, re.MULTILINE))


# -- precision and compilation -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrecisionChoice:
    """What a run computes in, and why."""

    name: str  # fp32, tf32, bf16 or fp16
    reason: str

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Type for autocast; None: no autocast."""
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name)

    @property
    def needs_scaler(self) -> bool:
        """Whether gradients must be scaled to stay in range."""
        return self.name == "fp16"


def choose_precision(precision: str, card: Card) -> PrecisionChoice:
    """Return what a run with the parameter `precision` computes in on `card`.

    "auto" goes by compute capability, never by `is_bf16_supported()`, which is true on a V100 by emulation.
    Raises `InputError` for a precision that the device has no units for.
    """
    on_cpu, where = card.type == "cpu", f"capability {_version(card)}"
    capability = card.capability or (0, 0)
    if precision in ("tf32", "bf16") and not on_cpu and capability < (8, 0):
        raise InputError(
            f"precision {precision} needs capability 8.0; {card.name} has {where}: use fp16 or fp32"
        )
    if precision == "tf32" and on_cpu:
        raise InputError("precision tf32 exists on CUDA devices of capability 8.0 and above, not on a CPU")
    if precision != "auto":
        return PrecisionChoice(precision, "asked for")
    if on_cpu:
        return PrecisionChoice("fp32", "auto: fp32 on a CPU")
    if capability >= (8, 0):
        return PrecisionChoice("bf16", f"auto: {where} is at least 8.0")
    if capability >= (7, 0):
        return PrecisionChoice("fp16", f"auto: {where} has fp16 tensor cores and no bf16")
    return PrecisionChoice("fp32", f"auto: {where} has no tensor cores")


def set_matmul_precision(choice: PrecisionChoice) -> None:
    """Let fp32 products use TF32 units if and only if that was chosen."""
    import torch

    torch.set_float32_matmul_precision("high" if choice.name == "tf32" else "highest")


def compile_choice(mode: str, card: Card, has_compiler: bool) -> tuple[str, str]:
    """Return the compile mode that is used and why, for the mode asked for."""
    if card.type == "cpu" and mode in ("reduce-overhead", "graph"):
        return "off", f"not applicable: {mode} is CUDA graphs, and this is a CPU"
    if card.type == "cpu" and mode != "off" and not has_compiler:
        advice = "install g++ or clang, or set compile_mode=off"
        return "off", f"no C++ compiler found: eager instead; {advice}"
    return mode, "asked for"


def has_compiler() -> bool:
    """Return whether the C++ compiler is there that `torch.compile` calls on a CPU: `CXX`, if set, alone."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", default)) is not None


# -- time and memory -----------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak where the platform can: CUDA's counters, or the kernel's on Linux."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # not permitted in some containers: it is then the whole process's
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of allocated memory on CUDA, of resident memory on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # what `reset_peak_memory` resets
    if status.is_file() and (match := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> bool:
    """Ask glibc to keep what is freed, so that each step reuses its buffers; return whether it did.

    By default glibc gives blocks over some megabytes back to the kernel and takes them again zeroed, page by
    page. Blocks of 32 MiB and more still come from the kernel: kept, they would fragment the heap; those of a
    step stay allocated anyway (see `bert4rec`). No effect on other C libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    return bool(mallopt(m_mmap_threshold, 32 * 2**20)) and bool(mallopt(m_trim_threshold, 2**31 - 1))


# -- devices that are not here -------------------------------------------------------------------------------
# A gpu label may stand for several boards ("v100" for 16 and 32 GB). Whoever needs one number of a label gets
# it only where its boards agree: an unknown device has no peak, and so no MFU.


@dataclass(frozen=True, kw_only=True)
class Board:
    """One device of the catalogue."""

    label: str
    name: str
    capability: tuple[int, int]  # CUDA compute capability
    memory_bytes: int
    bandwidth: float  # bytes/s between processor and memory
    power: float  # W, at most
    peaks: dict[str, float] = field(hash=False)  # dense FLOP/s by precision
    source: str
    build: str = ""  # what torch build it needs, where not any

    def precision(self, wanted: str = "auto") -> str:
        """Return what `wanted` means here: auto is bf16 from capability 8.0, below it fp16.

        Raises `InputError` for a precision that the device has no units for.
        """
        chosen = ("bf16" if self.capability >= (8, 0) else "fp16") if wanted == "auto" else wanted
        if chosen not in self.peaks:
            known = ", ".join(self.peaks)
            raise InputError(f"precision {chosen!r}: {self.name} has no units for it; allowed: {known}")
        return chosen


@functools.cache
def catalogue() -> dict[str, Board]:
    """Return every device by label."""
    return {
        label: Board(
            label=label,
            capability=tuple(given.pop("capability")),
            memory_bytes=int(given.pop("memory") * GIB),
            bandwidth=given.pop("bandwidth") * 1e9,
            peaks={precision: tera * 1e12 for precision, tera in given.pop("peaks").items()},
            **given,
        )
        for label, given in system.read_yaml(system.params() / "devices.yaml").items()
    }


def _family(label: str) -> str:
    return label.partition("-")[0]


def boards(label: str) -> list[Board]:
    """Return the boards that a label stands for: itself, or all that begin with it; raise `InputError`."""
    matches = [board for name, board in catalogue().items() if label in (name, _family(name))]
    if not matches:
        known = ", ".join(catalogue())
        raise InputError(f"unknown device {label!r}{nearest(label, catalogue())}; known: {known}")
    return matches


def of_memory(family: str, memory_bytes: int) -> Board | None:
    """Return the board of a family with the memory nearest to this; None for a family that is not known."""
    matches = [board for name, board in catalogue().items() if _family(name) == family]
    return min(matches, key=lambda board: abs(board.memory_bytes - memory_bytes), default=None)


def peak_flops(label: str, precision: str) -> float | None:
    """Return the dense peak of a label; None for a CPU and for whatever is not in the catalogue."""
    try:
        peaks = {board.peaks.get(precision) for board in boards(label)}
    except InputError:
        return None
    return peaks.pop() if len(peaks) == 1 else None


def device_main(argv: list[str] | None = None) -> int:
    """Describe the device, or list the GPUs."""
    parser = Parser(prog="python -m reclib device", description="What this machine computes on, in full.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", help="none: describe the device")
    actions.add_parser("visible", help="the GPUs that this process sees, as JSON")
    if parser.parse_args(argv).action == "visible":
        print(json.dumps(visible_gpus()))
        return 0
    for name, value in device_card(find()).items():
        print(f"{name:<14}{value}")
    return 0
