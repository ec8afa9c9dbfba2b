"""Checkpoints that are whole or not there: safetensors and JSON in a folder that appears by one rename.

A checkpoint is `step-<n>/` with `tensors.safetensors` and `state.json`, which holds the sha256 of the former.
Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reclib import system
from reclib.config import AdapterConfig, InputError, ModelConfig, TrainConfig, nearest, validated
from reclib.data.dataset import Dataset, Evaluation, Histories
from reclib.evaluate import metrics
from reclib.evaluate.prior import CountPrior
from reclib.model.bert4rec import Bert4Rec, SequenceModel
from reclib.model.ilora import OUTPUT, AdaptedModel, base_hash
from reclib.system import plain

TENSORS, STATE = "tensors.safetensors", "state.json"


def save_checkpoint(folder: Path, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write the checkpoint `folder/name`, replacing one of that name; raise `InputError` if it can't be.

    What was there before is untouched until the new one is complete on disk.
    """
    target, partial = folder / name, folder / f"{name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial / TENSORS)
        body = state | {"sha256": system.file_sha256(partial / TENSORS)}
        (partial / STATE).write_text(json.dumps(body, indent=1) + "\n")
        for file in (partial / TENSORS, partial / STATE, partial):
            _flush(file)
        if target.exists():
            old = folder / f"{name}.old"
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(target)
        _flush(folder)
    except Exception as error:  # safetensors wraps the system's errors in its own type
        shutil.rmtree(partial, ignore_errors=True)
        kept = latest(folder)
        raise InputError(
            f"cannot write checkpoint {_shown(target)}: {_reason(error)}; "
            + (f"the last good one is {kept.name}" if kept else "there is none before it")
        ) from error
    return target


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint; raise `InputError` that names the file when it is damaged."""
    advice = f"delete {_shown(path)} to go on from an earlier one, or the run's folder to start anew"
    try:
        state = json.loads((path / STATE).read_text())
        expected = state["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"damaged checkpoint: {_shown(path / STATE)}: {_reason(error)}; {advice}") from error
    try:
        found = system.file_sha256(path / TENSORS)
    except OSError as error:
        raise InputError(
            f"damaged checkpoint: {_shown(path / TENSORS)}: {_reason(error)}; {advice}"
        ) from error
    if found != expected:
        raise InputError(
            f"damaged checkpoint: {_shown(path / TENSORS)} has sha256 {found[:12]}, "
            f"expected {expected[:12]}; {advice}"
        )
    return load_file(path / TENSORS), state


def latest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint `step-<n>` in `folder`."""
    found = [p for p in folder.glob("step-*") if p.suffix == "" and p.is_dir()]
    return max(found, default=None, key=lambda p: int(p.name.removeprefix("step-")))


def prune(folder: Path, keep: int = 2) -> None:
    """Delete all but the newest `keep` checkpoints and what a killed run left half written."""
    found = sorted(
        (p for p in folder.glob("step-*") if p.suffix == ""),
        key=lambda p: int(p.name.removeprefix("step-")),
    )
    for path in [*found[:-keep], *folder.glob("*.partial"), *folder.glob("*.old")]:
        shutil.rmtree(path, ignore_errors=True)


PRIOR = "prior."


def unique_tensors(model: SequenceModel, frozen: bool = True) -> dict[str, Tensor]:
    """Return the state with tied tensors once, as safetensors wants it, with or without frozen ones."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if frozen or p.requires_grad}
    if model.prior is not None and (frozen or model.prior.scale.requires_grad):
        tensors |= {PRIOR + name: value for name, value in model.prior.named_buffers()}
    return tensors


def load_unique(model: SequenceModel, tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of `unique_tensors` into a model of the same configuration; give it their prior."""
    given = {name.removeprefix(PRIOR): value for name, value in tensors.items() if name.startswith(PRIOR)}
    if given and model.prior is None:
        model.prior = CountPrior(given)  # type: ignore[misc]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name in tensors:
                parameter.copy_(tensors[name])


def save_weights(model: SequenceModel, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write weights and configuration under `folder`, for `load_weights`."""
    state = {"model": asdict(model.config), **about}
    return save_checkpoint(folder.parent, folder.name, unique_tensors(model), state)


def load_weights(folder: Path) -> Bert4Rec:
    """Read a model that `save_weights` wrote; raise `InputError` if it is damaged."""
    tensors, state = load_checkpoint(folder)
    if "model" not in state:
        raise InputError(f"{folder.name} holds a training state, not a saved model")
    model = Bert4Rec(ModelConfig(**state["model"]))
    load_unique(model, tensors)
    return model.eval()


def refuse_other(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise `InputError` naming what differs between a checkpoint's identity and this run's."""
    differs = [
        f"{part}.{key} is {old.get(key)!r} there and {new.get(key)!r} here"
        for part in ("model", "train", "origin")
        for old, new in [(found.get(part, {}), wanted.get(part, {}))]
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if found["data"] != wanted["data"]:
        differs.append(f"the dataset is {found['data'][:12]} there and {wanted['data'][:12]} here")
    if differs:
        raise InputError(
            f"the checkpoint in {folder.name} is of another run: {'; '.join(differs)}; use another folder"
        )


def _shown(path: Path) -> str:
    """Return the path relative to the working directory where it lies below it."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or repr(error)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------
# Adapters on disk, in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.
#
# A `lora` or `rslora` adapter written here loads in PEFT, and one that PEFT wrote loads here: the keys are
# `base_model.model.<module>.lora_A.weight`, and so on, without the adapter's name. Kinds that PEFT does not
# know have a `peft_type` of their own, so that it refuses them instead of reading them as plain LoRA; so
# has an adapter of the output table, which is no module.
#
# The base is not in the file, only its hash; an adapter of another base is refused.

ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"

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
    try:
        with system.fresh_folder(folder) as fresh:
            save_file(tensors, fresh / ADAPTER_TENSORS, metadata={"format": "pt"})
            said = _peft_config(adapted, chosen)
            (fresh / ADAPTER_CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
            folder.mkdir(exist_ok=True)
            for file in (ADAPTER_TENSORS, ADAPTER_CONFIG):
                os.replace(fresh / file, folder / file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write adapter {folder}: {error}") from None
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
                f"{folder / ADAPTER_CONFIG}: the gate reads the causal model {found.reader_sha256[:12]}, "
                f"and the one given is {given[:12]}"
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
        said = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
        if not isinstance(said, dict) or "peft_type" not in said:
            raise ValueError("it is no object with a 'peft_type'")
    except (OSError, ValueError) as error:
        raise InputError(f"damaged adapter: {folder / ADAPTER_CONFIG}: {_reason(error)}") from None
    try:
        tensors = load_file(folder / ADAPTER_TENSORS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"damaged adapter: {folder / ADAPTER_TENSORS}: {_reason(error)}") from None
    wrong = [key for key in tensors if not key.startswith(PREFIX)]
    if wrong or not tensors:
        raise InputError(
            f"{folder / ADAPTER_TENSORS}: key {wrong[0] if wrong else None!r}; expected {PREFIX}..."
        )
    plain = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    digest = str(said.get("base_model_name_or_path"))
    base = digest.removeprefix(BASE) if digest.startswith(BASE) else None
    if said["peft_type"] in OWN_TYPES.values():
        own = said.get(OWN)
        if not isinstance(own, dict) or not isinstance(own.get("config"), dict):
            raise InputError(f"damaged adapter: {folder / ADAPTER_CONFIG}: {OWN!r} holds no 'config'")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in own["config"].items()}
        return AdapterFile(validated(AdapterConfig, values), plain, base, own.get("reader_sha256"))
    if said["peft_type"] != "LORA":
        raise InputError(
            f"{folder / ADAPTER_CONFIG}: peft_type {said['peft_type']!r}; allowed: LORA, "
            f"{', '.join(dict.fromkeys(OWN_TYPES.values()))}"
        )
    return AdapterFile(_plain_lora(said, plain, folder), plain, base, None)


def _plain_lora(said: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> AdapterConfig:
    """Return the configuration of a file of PEFT's LoRA; its modules are read off the keys."""
    for field, allowed in PLAIN.items():
        if field in said and said[field] not in allowed:
            raise InputError(f"{folder / ADAPTER_CONFIG}: {field}={said[field]!r}; allowed: {allowed[0]!r}")
    try:
        values = {"rank": said["r"], "alpha": float(said["lora_alpha"])}
        values |= {"dropout": float(said.get("lora_dropout") or 0.0)}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"damaged adapter: {folder / ADAPTER_CONFIG}: {error!r}") from None
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
            f"{folder / ADAPTER_CONFIG} does not say which base it belongs to: "
            "give any_base=True to take this one"
        )
    if found.base_sha256 is not None and found.base_sha256 != adapted.base_sha256:
        raise InputError(
            f"{folder / ADAPTER_CONFIG} is an adapter of base {found.base_sha256[:12]}, and this model is "
            f"{adapted.base_sha256[:12]}: its weights are others"
        )


def _refuse_other_shapes(found: dict[str, Tensor], wanted: dict[str, Tensor], folder: Path) -> None:
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or unknown:
        said = f"lacks {min(missing)!r}" if missing else f"has {min(unknown)!r}, which this model has not"
        raise InputError(f"{folder / ADAPTER_TENSORS} {said}")
    for key, tensor in wanted.items():
        if found[key].shape != tensor.shape:
            raise InputError(
                f"{folder / ADAPTER_TENSORS}: {key!r} has shape {tuple(found[key].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )


# ------------------------------------------------------------------------------------------------
# Models to recommend with: weights, configuration and the catalogue, in a folder; used in three lines.
#
#     from reclib import load
#     model = load("w64d2-ml-100k")
#     model.recommend(["50", "181", "172"])
#
# A folder `models/<size>-<dataset>` holds `model.safetensors`, `config.json` (fields of `ModelConfig`) and
# `manifest.json`: the items' keys and titles, what it was trained on and how well it ranked validation, and
# the sha256 of the weights.

WEIGHTS, MODEL_CONFIG, MANIFEST = "model.safetensors", "config.json", "manifest.json"

MODEL = "model"  # the folder of a finished run's model in the folder of its checkpoints


class Recommendation(NamedTuple):
    """One recommended item."""

    key: str  # raw id, as in the interactions
    title: str


@dataclass
class Recommender:
    """A trained model and its catalogue."""

    model: Bert4Rec | AdaptedModel
    keys: list[str]  # of items 1..num_items
    titles: list[str]
    about: dict[str, Any]

    @classmethod
    def of(cls, model: Bert4Rec | AdaptedModel, dataset: Dataset, about: dict[str, Any]) -> Recommender:
        """Return a model with the catalogue of the dataset that it was trained on."""
        titles = [dataset.title(item) for item in range(1, dataset.num_items + 1)]
        return cls(model, dataset.item_keys.tolist()[1:], titles, about)

    def recommend(self, history: Sequence[str | int], k: int = 10) -> list[Recommendation]:
        """Return the k best items after a history, oldest first, without those of the history.

        An item is given by its raw id (a number stands for its digits) or by its whole title, in capitals or
        not. Where fewer than k items are left, these are returned, with a warning. Raises `InputError` for an
        empty history, an unknown item, a title of several items and a k below 1.
        """
        if isinstance(history, str | bytes):
            raise InputError(f"the history is the text {history!r}: expected a list of items")
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise InputError(f"k is {k!r}: expected a whole number of at least 1")
        if not len(history):
            raise InputError("the history is empty: expected at least one item id")
        items = np.array([self._item(given) for given in history], dtype=np.int32)
        unseen = np.setdiff1d(np.arange(1, len(self.keys) + 1, dtype=np.int32), items)
        if len(unseen) < k:
            warnings.warn(f"{len(unseen)} items are not in the history: fewer than k={k}", stacklevel=2)
        if not len(unseen):
            return []
        known = Histories(items, np.array([0]), np.array([len(items)]))
        evaluation = Evaluation(known, unseen[:1])  # ranking wants a target; it is not looked at
        scores = metrics.model_scores(self.model, evaluation, self.model.output_weight.device)
        top = metrics.rank(scores, evaluation, remove_seen=True, top_k=min(int(k), len(unseen))).top
        assert top is not None
        return [Recommendation(self.keys[i - 1], self.titles[i - 1]) for i in top[0]]

    def _item(self, given: str | int) -> int:
        """Return the number of the item with this raw id or title."""
        if (item := self._numbers.get(str(given))) is not None:
            return item
        named = [i for i, title in enumerate(self.titles, 1) if title.casefold() == str(given).casefold()]
        if len(named) == 1:
            return named[0]
        if named:
            keys = ", ".join(self.keys[i - 1] for i in named[:5])
            raise InputError(f"the title {given!r} is that of {len(named)} items: give an id, such as {keys}")
        close = nearest(str(given), self.titles) or nearest(str(given), self.keys)
        raise InputError(
            f"unknown item {given!r}{close}: the model knows {len(self.keys):,} items of its data"
        )

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self.keys, 1)}


def save_model(
    model: Bert4Rec, train: TrainConfig, dataset: Dataset, name: str | Path, about: Mapping[str, Any]
) -> Path:
    """Write a trained model under `models/<name>`, in place of an earlier one, whole or not at all.

    `name` may be the path of a folder instead. `about` goes into its manifest: metrics, code version,
    whatever tells where the model comes from.
    """
    folder = system.models() / name
    with system.fresh_folder(folder) as fresh:
        fresh.chmod(0o755)  # mkdtemp gives 0o700
        tensors = {key: value.cpu().contiguous() for key, value in unique_tensors(model).items()}
        save_file(tensors, fresh / WEIGHTS)
        system.write_json(fresh / MODEL_CONFIG, asdict(model.config))
        kept = Recommender.of(model, dataset, dict(about))
        manifest = {
            "sha256": system.file_sha256(fresh / WEIGHTS),
            "data": {"name": dataset.name, "fingerprint": dataset.fingerprint},
            "items": kept.keys,
            "titles": kept.titles,
            "train": asdict(train),
            "about": kept.about,
        }
        system.write_json(fresh / MANIFEST, plain(manifest))
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    return folder


def load_model(name: str | Path) -> Recommender:
    """Open a trained model: a name under models/, its folder, or the folder of a run that `fit` finished.

    Raises `InputError` where there is none, or it is damaged.
    """
    places = [system.models() / name, Path(name), Path(name) / MODEL]
    folder = next((place for place in places if (place / MANIFEST).is_file()), None)
    if folder is None:
        if latest(Path(name)) is not None:
            raise InputError(f"{name} holds a run that is not finished: {system.AGAIN}")
        known = ", ".join(sorted(f.parent.name for f in system.models().glob(f"*/{MANIFEST}")))
        raise InputError(f"no model {str(name)!r} is kept; here: {known or 'none'}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        config = validated(ModelConfig, json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8")))
        if system.file_sha256(folder / WEIGHTS) != manifest["sha256"]:
            raise InputError(f"damaged model {name}: {WEIGHTS} is not the file that {MANIFEST} names")
        model = Bert4Rec(config)
        load_unique(model, load_file(folder / WEIGHTS))
        return Recommender(model.eval(), manifest["items"], manifest["titles"], manifest["about"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"damaged model {name}: {type(error).__name__}: {error}") from error


def recommend_main(argv: Sequence[str] | None = None) -> int:
    """Print what a trained model recommends after a history."""
    parser = system.Parser(prog="python -m reclib recommend", description="Recommend items after a history.")
    parser.add_argument("model", help="a folder that `fit --out` wrote, or a name under models/")
    parser.add_argument("history", nargs="+", metavar="ITEM", help="raw ids or titles, oldest first")
    parser.add_argument("-k", type=int, default=10, help="how many (10)")
    given = parser.parse_args(argv)
    try:
        with warnings.catch_warnings(record=True) as notes:
            items = load_model(given.model).recommend(given.history, given.k)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    for item in items:
        print(f"{item.key}\t{item.title}")
    for note in notes:
        print(note.message, file=sys.stderr)
    return 0
