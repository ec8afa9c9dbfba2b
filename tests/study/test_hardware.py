"""Device decisions, driven with devices that are not there."""

import contextlib
from dataclasses import replace

import pytest
import torch
from conftest import python, refused

from reclib import hardware
from reclib.config import GPU_LABELS, InputError
from reclib.hardware import Card


def cuda(capability: tuple[int, int], name: str = "NVIDIA X", arch: str = "") -> Card:
    arch_list = tuple(arch.split()) or (f"sm_{capability[0]}{capability[1]}",)
    about = {"type": "cuda", "name": name, "label": hardware.label_of(name), "memory_bytes": 24 * 2**30}
    return Card(**about, capability=capability, arch_list=arch_list)


CPU = Card(type="cpu", name="some CPU", label="cpu", threads=2)


def test_devices_that_are_no_board_of_the_catalogue_have_no_label():
    assert hardware.label_of("Tesla V100-PCIE-32GB") == "v100"
    assert hardware.label_of("NVIDIA H100 NVL") == "h100"
    others = ["NVIDIA L40", "NVIDIA L40S", "NVIDIA A10", "NVIDIA GeForce RTX 4090 D"]
    others += ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
    assert {hardware.label_of(name) for name in others} == {"other"}


def test_auto_precision_goes_by_capability_and_gives_its_reason():
    for card, name, dtype in [
        (cuda((6, 1)), "fp32", None),
        (cuda((7, 0)), "fp16", torch.float16),
        (cuda((7, 5)), "fp16", torch.float16),
        (cuda((8, 0)), "bf16", torch.bfloat16),
        (cuda((9, 0)), "bf16", torch.bfloat16),
        (CPU, "fp32", None),
    ]:
        choice = hardware.choose_precision("auto", card)
        assert (choice.name, choice.autocast_dtype, choice.needs_scaler) == (name, dtype, name == "fp16")
        assert choice.reason.startswith("auto: ")


def test_precision_that_the_units_lack_is_refused():
    for precision in ("bf16", "tf32"):
        assert "needs capability 8.0" in refused(None, hardware.choose_precision, precision, cuda((7, 0)))
    assert "not on a CPU" in refused(None, hardware.choose_precision, "tf32", CPU)
    assert hardware.choose_precision("bf16", CPU).autocast_dtype == torch.bfloat16


def test_tf32_sets_the_products_and_anything_else_resets_them():
    for name, card, precision in (("tf32", cuda((8, 0)), "high"), ("fp32", CPU, "highest")):
        hardware.set_matmul_precision(hardware.choose_precision(name, card))
        assert torch.get_float32_matmul_precision() == precision


def test_a_build_without_kernels_for_the_device_is_refused():
    for capability, arch, runs in [
        ((7, 0), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", False),
        ((7, 0), "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90", True),
        ((8, 9), "sm_75 sm_80 sm_86 sm_90", True),  # binary code runs on later minors
        ((8, 0), "sm_86", False),
        ((12, 0), "sm_80 sm_90a compute_90", True),  # PTX is compiled for what comes later
    ]:
        refused = pytest.raises(InputError, match=r"no kernels for Tesla V100.*cu126")
        with contextlib.nullcontext() if runs else refused:
            hardware.check_build(cuda(capability, "Tesla V100-SXM2-16GB", arch))


def test_a_claimed_device_that_is_not_there_is_no_claim():
    l4 = cuda((8, 9), "NVIDIA L4")
    for claimed, card, label, is_claimed in [
        ("l4", CPU, "cpu", False),
        ("l4", l4, "l4", True),
        ("auto", CPU, "cpu", True),
        ("cpu", l4, "cpu", True),
    ]:
        device = hardware.find(claimed, card)
        assert (device.label, device.is_claimed) == (label, is_claimed)
    assert "unknown gpu label 'l40'; allowed: auto, cpu, cpu1, cpu2, t4" in refused(
        None, hardware.find, "l40"
    )
    assert hardware.cpu_card("cpu2", cores=1, threads=1).label == "cpu"
    assert [hardware.cpu_card(name, cores=8, threads=8).threads for name in ("cpu2", "cpu")] == [2, 8]


def test_every_board_of_the_catalogue_can_be_claimed_and_is_told_by_its_memory():
    known = hardware.catalogue()
    families = {label.partition("-")[0] for label in known}
    assert {label for label in GPU_LABELS if not label.startswith(("auto", "cpu"))} == set(known) | families
    for label, board in known.items():
        card = replace(cuda(board.capability, board.name), memory_bytes=int(0.98 * board.memory_bytes))
        for claim in GPU_LABELS:
            device = hardware.find(claim, card)
            right = claim.startswith("cpu") or claim in ("auto", label, label.partition("-")[0])
            assert device.is_claimed == right, (claim, label)


def test_on_cuda_attention_is_not_left_to_cudnn():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        hardware.resolve("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        hardware.resolve("h100", cuda((9, 0), "NVIDIA H100 80GB HBM3"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()  # which takes the masks of packed rows
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_compile_mode_that_does_not_apply_is_off_with_its_reason():
    for mode, card, compiler, used, reason in [
        ("off", CPU, True, "off", "asked for"),
        ("default", CPU, True, "default", "asked for"),
        ("reduce-overhead", CPU, True, "off", "not applicable"),
        ("default", CPU, False, "off", "no C++ compiler"),
        ("reduce-overhead", cuda((8, 0)), False, "reduce-overhead", "asked for"),
    ]:
        choice = hardware.compile_choice(mode, card, compiler)
        assert choice[0] == used
        assert reason in choice[1]


def test_on_a_cpu_denormals_are_zero_in_every_thread_and_products_keep_their_threads():
    code = """
import sys
import torch
from reclib import hardware
if sys.argv[1] == "resolved":
    torch.set_num_threads(2)
    hardware.resolve("cpu")
    small = torch.full((4_000_000,), 1e-20)  # large enough for both threads
    print("denormals:", int((small * small).count_nonzero()))
square = torch.ones(512, 512)
if torch.backends.mkl.is_available():
    with torch.backends.mkl.verbose(torch.backends.mkl.VERBOSE_ON):
        square @ square
"""
    bare, resolved = (python("-c", code, how, check=True).stdout for how in ("bare", "resolved"))
    assert "denormals: 0\n" in resolved
    assert "Dyn:1" not in bare or "Dyn:0" in resolved  # where MKL tells, and may choose the number of threads
