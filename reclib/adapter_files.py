"""Adapters on disk, in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

A `lora` or `rslora` adapter written here loads in PEFT, and one that PEFT wrote loads here: the keys are
`base_model.model.<module>.lora_A.weight`, and so on, without the adapter's name. Kinds that PEFT does not
know have a `peft_type` of their own, so that it refuses them instead of reading them as plain LoRA; so has an
adapter of the output table, which is no module.

The base is not in the file, only its hash; an adapter of another base is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reclib.adapters import OUTPUT, base_hash
from reclib.config import InputError, validated
from reclib.ilora import AdaptedModel
from reclib.lowrank import AdapterConfig
from reclib.model import Bert4Rec

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
GATE = "instance_gate.weight"  # of the key of W, after PREFIX
OWN = "reclib"  # the key of what PEFT has no field for
OWN_TYPES = {"ilora": "RECLIB_ILORA", "gated": "RECLIB_GATED", "lora": "RECLIB_LORA", "rslora": "RECLIB_LORA"}
BASE = "sha256:"  # before the base's hash, in PEFT's field for a base model's name
# Fields of PEFT's configuration that change the function, with the values of plain LoRA.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "target_parameters": ([], None),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
}


class AdapterFile(NamedTuple):
    """What the two files of an adapter say."""

    config: AdapterConfig
    tensors: dict[str, Tensor]  # by path and name inside the model
    base_sha256: str | None  # None: PEFT wrote it, and the base was not recorded
    reader_sha256: str | None  # of the causal model that the gate's representation is read from


def save_adapter(adapted: AdaptedModel, folder: Path, name: str | None = None) -> Path:
    """Write an adapter, the active one where no name is given, to `folder`; return the folder.

    What was there is replaced when the new files are complete. Raises `InputError` where there is no such
    adapter or the folder cannot be written.
    """
    chosen = adapted.active if name is None else name
    if chosen is None or chosen not in adapted.configs:
        raise InputError(f"unknown adapter {chosen!r}; there are: {', '.join(adapted.configs) or 'none'}")
    tensors = {PREFIX + key: tensor.contiguous() for key, tensor in _tensors(adapted, chosen).items()}
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        said = _peft_config(adapted, chosen)
        (partial / CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
        folder.mkdir(exist_ok=True)
        for file in (TENSORS, CONFIG):
            os.replace(partial / file, folder / file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write adapter {folder}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load_adapter(
    model: Bert4Rec | AdaptedModel,
    folder: Path,
    name: str = "default",
    any_base: bool = False,
    causal_model: Bert4Rec | None = None,
) -> AdaptedModel:
    """Put the adapter of `folder` around a model, as `name`, and make it the active one.

    Raises `InputError` for files that are damaged or of another base, and for a file of PEFT that is not
    plain LoRA or, unless `any_base`, does not say of what base it is.
    """
    found = read_adapter(folder)
    if isinstance(model, AdaptedModel):
        _put(model, found, folder, name, any_base, causal_model)
        return model
    adapted = AdaptedModel(model)
    try:
        _put(adapted, found, folder, name, any_base, causal_model)
    except InputError:
        adapted.unload()  # the model is as it was given
        raise
    return adapted


def _put(
    adapted: AdaptedModel,
    found: AdapterFile,
    folder: Path,
    name: str,
    any_base: bool,
    causal_model: Bert4Rec | None,
) -> None:
    """Add what a file holds as the adapter `name`, or nothing."""
    _refuse_other_base(found, adapted, folder, any_base)
    if found.reader_sha256 is not None and causal_model is not None:
        given = base_hash(causal_model)
        if given != found.reader_sha256:
            raise InputError(
                f"{folder / CONFIG}: the gate reads the causal model {found.reader_sha256[:12]}, and the "
                f"one given is {given[:12]}"
            )
    before = adapted.active
    adapted.add(name, found.config, causal_model)
    wanted = _tensors(adapted, name)
    try:
        _refuse_other_shapes(found.tensors, wanted, folder)
    except InputError:
        adapted.delete(name)
        adapted.use(before)
        raise
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(found.tensors[key])


def read_adapter(folder: Path) -> AdapterFile:
    """Read an adapter's files; raise `InputError` that names the file when it is missing or damaged."""
    try:
        said = json.loads((folder / CONFIG).read_text("utf-8"))
        if not isinstance(said, dict) or "peft_type" not in said:
            raise ValueError("it is no object with a 'peft_type'")
    except (OSError, ValueError) as error:
        raise InputError(f"damaged adapter: {folder / CONFIG}: {_reason(error)}") from None
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"damaged adapter: {folder / TENSORS}: {_reason(error)}") from None
    wrong = [key for key in tensors if not key.startswith(PREFIX)]
    if wrong or not tensors:
        raise InputError(f"{folder / TENSORS}: key {wrong[0] if wrong else None!r}; expected {PREFIX}...")
    plain = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    digest = str(said.get("base_model_name_or_path"))
    base = digest.removeprefix(BASE) if digest.startswith(BASE) else None
    if said["peft_type"] in OWN_TYPES.values():
        own = said.get(OWN)
        if not isinstance(own, dict) or not isinstance(own.get("config"), dict):
            raise InputError(f"damaged adapter: {folder / CONFIG}: {OWN!r} holds no 'config'")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in own["config"].items()}
        return AdapterFile(validated(AdapterConfig, values), plain, base, own.get("reader_sha256"))
    if said["peft_type"] != "LORA":
        raise InputError(
            f"{folder / CONFIG}: peft_type {said['peft_type']!r}; allowed: LORA, "
            f"{', '.join(dict.fromkeys(OWN_TYPES.values()))}"
        )
    return AdapterFile(_plain_lora(said, plain, folder), plain, base, None)


def _plain_lora(said: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> AdapterConfig:
    """Return the configuration of a file of PEFT's LoRA; its modules are read off the keys."""
    for field, allowed in PLAIN.items():
        if field in said and said[field] not in allowed:
            raise InputError(f"{folder / CONFIG}: {field}={said[field]!r}; allowed: {allowed[0]!r}")
    try:
        values = {"rank": said["r"], "alpha": float(said["lora_alpha"])}
        values |= {"dropout": float(said.get("lora_dropout") or 0.0)}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"damaged adapter: {folder / CONFIG}: {error!r}") from None
    values |= {"kind": "rslora" if said.get("use_rslora") else "lora"}
    paths = dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in tensors)
    return validated(AdapterConfig, values | {"targets": tuple(paths)})


def _peft_config(adapted: AdaptedModel, name: str) -> dict[str, Any]:
    """Return what `adapter_config.json` holds."""
    config = adapted.configs[name]
    paths = [path for path, layer in adapted.layers().items() if name in layer.adapters]
    said: dict[str, Any] = {
        "peft_type": OWN_TYPES[config.kind],
        "base_model_name_or_path": BASE + adapted.base_sha256,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": paths,
        "inference_mode": True,
    }
    if config.kind in ("lora", "rslora") and OUTPUT not in paths:
        plain = {field: allowed[0] for field, allowed in PLAIN.items() if field in ("bias", "fan_in_fan_out")}
        return said | plain | {"peft_type": "LORA", "use_rslora": config.kind == "rslora", "task_type": None}
    own: dict[str, Any] = {"config": asdict(config)}
    reader = adapted.reader(name)
    own["reader_sha256"] = None if reader is None else base_hash(reader)
    return said | {OWN: own}


def _tensors(adapted: AdaptedModel, name: str) -> dict[str, Tensor]:
    """Return an adapter's tensors by path and name, its gate's included."""
    found = {}
    for path, layer in adapted.layers().items():
        if name in layer.adapters:
            for key, tensor in layer.adapters[name].named_parameters():
                found[f"{path}.{key}"] = tensor.detach()
    if name in adapted.gates:
        gate: Any = adapted.gates[name]
        found[GATE] = gate.linear.weight.detach()
    return found


def _refuse_other_base(found: AdapterFile, adapted: AdaptedModel, folder: Path, any_base: bool) -> None:
    if found.base_sha256 is None and not any_base:
        raise InputError(
            f"{folder / CONFIG} does not say which base it belongs to: give any_base=True to take this one"
        )
    if found.base_sha256 is not None and found.base_sha256 != adapted.base_sha256:
        raise InputError(
            f"{folder / CONFIG} is an adapter of base {found.base_sha256[:12]}, and this model is "
            f"{adapted.base_sha256[:12]}: its weights are others"
        )


def _refuse_other_shapes(found: dict[str, Tensor], wanted: dict[str, Tensor], folder: Path) -> None:
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or unknown:
        said = f"lacks {min(missing)!r}" if missing else f"has {min(unknown)!r}, which this model has not"
        raise InputError(f"{folder / TENSORS} {said}")
    for key, tensor in wanted.items():
        if found[key].shape != tensor.shape:
            raise InputError(
                f"{folder / TENSORS}: {key!r} has shape {tuple(found[key].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or repr(error)
