"""The device of this machine, the precision to train in, and measuring time and memory.

Decisions are pure functions of a `Card`, so that they can be tested for any device. A `Board` is a GPU of the
catalogue `params/devices.yaml`, with the numbers of its data sheet.
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

# Words in the name of a CUDA device that is a part of a board, or another chip.
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
    """The device that a run uses, with the gpu label of the request."""

    torch_device: torch.device
    card: Card
    claimed: str

    @property
    def label(self) -> str:
        """Label of the device in use."""
        return self.card.label

    @property
    def is_claimed(self) -> bool:
        """Whether the device in use has the requested label; always for "auto"."""
        board = of_memory(self.label, self.card.memory_bytes or 0)
        return self.claimed in ("auto", self.label, board and board.label)


# -- the device of this machine ------------------------------------------------------------------------------


def label_of(name: str) -> str:
    """Return the family of boards of a CUDA device by its name, else "other".

    Matches words, so that L40 is not L4, or two in a row (RTX 4090). "H100 NVL" and "H100 PCIe" are H100.
    """
    words = name.lower().replace("-", " ").split()
    if OTHER_CHIPS & set(words):
        return "other"
    names = {*words, *map("".join, itertools.pairwise(words))}
    return next((family for family in map(_family, catalogue()) if family in names), "other")


def probe() -> Card:
    """Describe the first CUDA device, or the CPU if there is none."""
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
    """Describe the CPU under the label `claimed`, with that label's threads if there are enough cores."""
    number = CPU_THREADS.get(claimed)
    if number is None or number > cores:
        return Card(type="cpu", name=cpu_name(), label="cpu", threads=threads)
    return Card(type="cpu", name=cpu_name(), label=claimed, threads=number)


def find(claimed: str = "auto", card: Card | None = None) -> Device:
    """Return the device to use for the gpu label `claimed`, without setting up torch.

    If the claimed GPU is not there, the run uses the device of this machine, and its records name that one.
    "cpu" is always used, and so are "cpu1" and "cpu2" with enough cores. `card` describes the device; the
    default is `probe()`. Raises `InputError` for an unknown label and for a GPU without kernels in this torch
    build.
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
    """Return the device for a gpu label and set up torch for it in this process."""
    import torch

    device = find(claimed, card)
    if device.card.type == "cuda":
        # From torch 2.9 on cuDNN's attention is preferred on capability 9 and 10. It takes tens of
        # milliseconds to plan each new shape, and the shapes of packed rows change from step to step.
        torch.backends.cuda.enable_cudnn_sdp(False)
        return device
    # Set the number of threads even if it is unchanged: otherwise MKL may use fewer for a call (MKL_DYNAMIC),
    # and a matrix product with another number of threads rounds differently.
    torch.set_num_threads(CPU_THREADS.get(device.label, torch.get_num_threads()))
    # Flush numbers below 1.2e-38 to zero. Sharp attention has a few per cent of such probabilities, with
    # which a training step took 1.7 times as long (FINDINGS.md). Threads inherit the setting from the thread
    # that starts them, so it must come before the first parallel operation.
    torch.set_flush_denormal(True)
    return device


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def visible_gpus() -> list[tuple[str, str]]:
    """Return (value for CUDA_VISIBLE_DEVICES, label) of each GPU that this process may use."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if visible is None else visible.split(",")
    return [(names[i].strip(), label_of(torch.cuda.get_device_name(i))) for i in range(count)]


def check_build(card: Card) -> None:
    """Raise `InputError` with advice for a CUDA device without kernels in this torch build."""
    import torch

    if card.type != "cuda" or card.capability is None:
        return
    # Binary code (sm_xx) runs on its major version from its minor version up; PTX (compute_xx) on all newer.
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
    """Return the device of a record: card, torch, CUDA and driver versions."""
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
    """Return the version of NVIDIA's driver from its library; None without one."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    failed = library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, len(text))
    return None if failed else text.value.decode()


def cpu_name() -> str:
    """Return the name of this machine's CPU; several generations may share a name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_model() -> str:
    """Return a short name with family and model, such as `Intel Xeon 6/207`."""
    numbers = [_cpuinfo()[name] for name in ("cpu family", "model") if name in _cpuinfo()]
    return f"{short_cpu(cpu_name())} {'/'.join(numbers)}".strip()


def short_cpu(name: str) -> str:
    """Return a CPU's name without trademarks, frequency and generic words."""
    words = re.sub(r"\((R|TM)\)|@.*", "", name).split()
    return " ".join(word for word in words if word not in ("Processor", "CPU"))


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Return Linux's description of the first core; empty on other systems."""
    if sys.platform != "linux":
        return {}
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    return dict(re.findall(r"^(\S[^\t:]*?)\s*: *(.*?) *$", first, re.MULTILINE))


# -- precision and compilation -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision of a run, and the reason for it."""

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
    """Return the precision on `card` of a run with the parameter `precision`.

    "auto" follows compute capability: `is_bf16_supported()` is true on a V100, which emulates it. Raises
    `InputError` for a precision that the hardware does not support.
    """
    on_cpu, version = card.type == "cpu", f"capability {_version(card)}"
    capability = card.capability or (0, 0)
    if precision in ("tf32", "bf16") and not on_cpu and capability < (8, 0):
        raise InputError(
            f"precision {precision} needs capability 8.0; {card.name} has {version}: use fp16 or fp32"
        )
    if precision == "tf32" and on_cpu:
        raise InputError("precision tf32 exists on CUDA devices of capability 8.0 and above, not on a CPU")
    if precision != "auto":
        return PrecisionChoice(precision, "asked for")
    if on_cpu:
        return PrecisionChoice("fp32", "auto: fp32 on a CPU")
    if capability >= (8, 0):
        return PrecisionChoice("bf16", f"auto: {version} is at least 8.0")
    if capability >= (7, 0):
        return PrecisionChoice("fp16", f"auto: {version} has fp16 tensor cores and no bf16")
    return PrecisionChoice("fp32", f"auto: {version} has no tensor cores")


def set_matmul_precision(choice: PrecisionChoice) -> None:
    """Allow TF32 in fp32 products if the choice is tf32, else forbid it."""
    import torch

    torch.set_float32_matmul_precision("high" if choice.name == "tf32" else "highest")


def compile_choice(mode: str, card: Card, has_compiler: bool) -> tuple[str, str]:
    """Return the compile mode to use for a requested mode, and the reason."""
    if card.type == "cpu" and mode in ("reduce-overhead", "graph"):
        return "off", f"not applicable: {mode} is CUDA graphs, and this is a CPU"
    if card.type == "cpu" and mode != "off" and not has_compiler:
        advice = "install g++ or clang, or set compile_mode=off"
        return "off", f"no C++ compiler found: eager instead; {advice}"
    return mode, "asked for"


def has_compiler() -> bool:
    """Return whether `torch.compile` finds its C++ compiler on a CPU: only `CXX`, if that is set."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", default)) is not None


# -- time and memory -----------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of memory, in CUDA's counters or in Linux's for this process."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # not permitted in some containers: the peak is then not reset
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of allocated memory on CUDA, of resident memory on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # reset by `reset_peak_memory`
    if status.is_file() and (match := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory, so that each step reuses its buffers; return whether it succeeded.

    By default glibc returns blocks of some megabytes to the kernel and gets them back zeroed, page by page.
    Blocks of 32 MiB and more are still returned, since keeping them would fragment the heap; those of a step
    stay allocated (see `bert4rec`). No effect with other C libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    return bool(mallopt(m_mmap_threshold, 32 * 2**20)) and bool(mallopt(m_trim_threshold, 2**31 - 1))


# -- the catalogue of GPUs -----------------------------------------------------------------------------------
# A gpu label may stand for several boards ("v100" for 16 and 32 GB). A label has a peak, and so an MFU, only
# where its boards agree.


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
    build: str = ""  # the torch build that it needs, if not any

    def precision(self, name: str = "auto") -> str:
        """Return the precision for `name`; auto is bf16 from capability 8.0, below it fp16.

        Raises `InputError` for a precision that the hardware does not support.
        """
        chosen = ("bf16" if self.capability >= (8, 0) else "fp16") if name == "auto" else name
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
            capability=tuple(values.pop("capability")),
            memory_bytes=int(values.pop("memory") * GIB),
            bandwidth=values.pop("bandwidth") * 1e9,
            peaks={precision: tera * 1e12 for precision, tera in values.pop("peaks").items()},
            **values,
        )
        for label, values in system.read_yaml(system.params() / "devices.yaml").items()
    }


def _family(label: str) -> str:
    return label.partition("-")[0]


def boards(label: str) -> list[Board]:
    """Return the board of a label, or all boards of a family; raise `InputError` for an unknown label."""
    matches = [board for name, board in catalogue().items() if label in (name, _family(name))]
    if not matches:
        labels = ", ".join(catalogue())
        raise InputError(f"unknown device {label!r}{nearest(label, catalogue())}; known: {labels}")
    return matches


def of_memory(family: str, memory_bytes: int) -> Board | None:
    """Return the board of a family whose memory is nearest to `memory_bytes`; None for an unknown family."""
    matches = [board for name, board in catalogue().items() if _family(name) == family]
    return min(matches, key=lambda board: abs(board.memory_bytes - memory_bytes), default=None)


def peak_flops(label: str, precision: str) -> float | None:
    """Return the dense peak of a label in FLOP/s; None for a CPU and for labels not in the catalogue."""
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
