"""Saving and loading: checkpoints of a run, adapters in PEFT's layout, and models to recommend with.

Each is a folder of safetensors and JSON, written atomically by a rename. Nothing is unpickled. Damaged files
raise an `InputError` that names the file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
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
from reclib.evaluate.baselines import CountPrior
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import OUTPUT, AdaptedModel, SequenceModel, base_hash
from reclib.system import plain


@contextlib.contextmanager
def _reading(name: str, advice: str = "") -> Iterator[None]:
    """Turn an error of reading into an `InputError` that calls `name` damaged."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"damaged {name}: {_reason(error)}{advice}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or repr(error)


def _relative(path: Path) -> Path:
    """Return the path relative to the working directory if it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _write(folder: Path, file: str, tensors: dict[str, Tensor], documents: dict[str, dict[str, Any]]) -> None:
    """Write a folder of tensors and JSON; it replaces an earlier one once it is complete on disk.

    The sha256 of the tensors is added to the last document.
    """
    with system.fresh_folder(folder) as fresh:
        fresh.chmod(0o755)  # mkdtemp gives 0o700
        save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, fresh / file)
        documents[list(documents)[-1]]["sha256"] = system.file_sha256(fresh / file)
        for name, document in documents.items():
            system.write_json(fresh / name, document)
        for path in (*fresh.iterdir(), fresh):
            _flush(path)
        with system.fresh_folder(folder) if folder.exists() else contextlib.nullcontext() as previous:
            if previous is not None:
                folder.rename(previous / folder.name)
            fresh.rename(folder)
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- checkpoints ---------------------------------------------------------------------------------------------
#
# A checkpoint is `step-<n>/` with `tensors.safetensors` and `state.json`.

TENSORS, STATE = "tensors.safetensors", "state.json"


def save_checkpoint(folder: Path, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write or replace the checkpoint `folder/name`; raise `InputError` if that fails.

    An earlier one is kept until the new one is complete on disk.
    """
    try:
        _write(folder / name, TENSORS, tensors, {STATE: dict(state)})
    except Exception as error:  # safetensors wraps the system's errors in its own type
        before = latest(folder)
        raise InputError(
            f"cannot write checkpoint {_relative(folder / name)}: {_reason(error)}; "
            + (f"the last good one is {before.name}" if before else "there is none before it")
        ) from error
    return folder / name


def whole_checkpoint(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turn errors of reading a checkpoint into an `InputError` that names it."""
    advice = "; delete it to go on from an earlier one, or the run's folder to start anew"
    return _reading(f"checkpoint: {_relative(path)}", advice)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint; raise `InputError` that names it when it is damaged."""
    with whole_checkpoint(path):
        state = json.loads((path / STATE).read_text("utf-8"))
        return _checked(path / TENSORS, state, STATE), state


def _checked(file: Path, document: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Return the tensors of a file after checking its hash against a document."""
    if system.file_sha256(file) != document["sha256"]:
        raise ValueError(f"{file.name} is not the file that {name} names")
    return load_file(file)


def _by_step(folder: Path) -> list[Path]:
    """Return the checkpoints `step-<n>` in `folder`, the newest last."""
    steps = {path: path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()}
    return sorted((path for path, n in steps.items() if n.isdecimal()), key=lambda path: int(steps[path]))


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint `step-<n>` in `folder`, None if there is none."""
    return next(reversed(_by_step(folder)), None)


def prune(folder: Path) -> None:
    """Delete all but the newest two checkpoints, and partial ones of killed runs."""
    for path in [*_by_step(folder)[:-2], *folder.glob("*.partial")]:
        shutil.rmtree(path, ignore_errors=True)


PRIOR = "prior."  # prefix of the names of a prior's tensors


def unique_tensors(model: SequenceModel, frozen: bool = True) -> dict[str, Tensor]:
    """Return the state with tied tensors once, as safetensors requires, with or without frozen ones."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if frozen or p.requires_grad}
    if model.prior is not None and (frozen or model.prior.scale.requires_grad):
        tensors |= {PRIOR + name: value for name, value in model.prior.named_buffers()}
    return tensors


def prior_tensors(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a prior without prefix; names of the model's tensors begin with `prefix`."""
    start = prefix + PRIOR
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


@torch.no_grad()
def load_unique(model: SequenceModel, tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of `unique_tensors`, and their prior, into a model of the same configuration."""
    prior = prior_tensors(tensors)
    if prior and model.prior is None:
        model.prior = CountPrior(prior)  # type: ignore[misc]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or name in tensors:
            parameter.copy_(tensors[name])


def refuse_other(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    """Raise `InputError` with all differences between the identities of a checkpoint and this run."""
    differs = [
        f"{part}.{key} is {before.get(key)!r} there and {after.get(key)!r} here"
        for part in ("model", "train", "origin")
        for before, after in [(saved.get(part, {}), current.get(part, {}))]
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if saved["data"] != current["data"]:
        differs.append(f"the dataset is {saved['data'][:12]} there and {current['data'][:12]} here")
    if differs:
        raise InputError(
            f"the checkpoint in {folder.name} is of another run: {'; '.join(differs)}; use another folder"
        )


# -- adapters, in PEFT's layout ------------------------------------------------------------------------------
#
# `lora` and `rslora` adapters are exchangeable with PEFT: keys are `base_model.model.<module>.lora_A.weight`
# and so on, without the adapter's name. Kinds unknown to PEFT have their own `peft_type`, so that PEFT does
# not read them as plain LoRA. So do adapters of the output table, which is no module. The file has the hash
# of the base; an adapter of another base is refused.

ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
GATE = "instance_gate.weight"  # key of the gate's W, after PREFIX
OWN = "reclib"  # key of fields that PEFT does not have
OWN_TYPES = {"ilora": "RECLIB_ILORA", "gated": "RECLIB_GATED", "lora": "RECLIB_LORA", "rslora": "RECLIB_LORA"}
BASE = "sha256:"  # before the base's hash, in PEFT's field for a base model's name

# Fields of PEFT's configuration that are read, and those without effect on the tensors' function. Plain LoRA
# has no others, and no value of `init_lora_weights` that changes the base.
READ = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias"}
IDLE = {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules"}
IDLE |= {"exclude_modules", "megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"}
PLAIN_START = (True, False, "gaussian", "orthogonal")  # of A and B, before training


class AdapterFile(NamedTuple):
    """The content of the two files of an adapter."""

    config: AdapterConfig
    tensors: dict[str, Tensor]  # by path and name inside the model
    base_sha256: str | None  # None: PEFT wrote it, and the base was not recorded
    reader_sha256: str | None  # of the causal model that the gate's representation is read from


def save_adapter(adapted: AdaptedModel, folder: Path, name: str | None = None) -> Path:
    """Write an adapter (default: the active one) to `folder`; return the folder.

    Existing files are replaced when the new ones are complete. Raises `InputError` for an unknown adapter and
    for a folder that cannot be written.
    """
    chosen = adapted.active if name is None else name
    if chosen is None:
        raise InputError("no adapter is active: name the one to save")
    adapted.demand_known(chosen)
    config, reader = adapted.configs[chosen], adapted.reader(chosen)
    paths = [path for path, layer in adapted.layers().items() if chosen in layer.adapters]
    document: dict[str, Any] = {
        "peft_type": OWN_TYPES[config.kind],
        "base_model_name_or_path": BASE + adapted.base_sha256,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": paths,
        "inference_mode": True,
    }
    if config.kind in ("lora", "rslora") and OUTPUT not in paths:
        document |= {"peft_type": "LORA", "task_type": None, "bias": "none", "fan_in_fan_out": False}
        document["use_rslora"] = config.kind == "rslora"
    else:
        document[OWN] = {
            "config": asdict(config),
            "reader_sha256": None if reader is None else base_hash(reader),
        }
    tensors = {PREFIX + key: tensor.contiguous() for key, tensor in _tensors(adapted, chosen).items()}
    try:
        with system.fresh_folder(folder) as fresh:
            save_file(tensors, fresh / ADAPTER_TENSORS, metadata={"format": "pt"})
            (fresh / ADAPTER_CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
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
    """Add the adapter of `folder` to a model as `name`, and activate it.

    Raises `InputError` for files that are damaged or of another base, for a file of PEFT that is not plain
    LoRA and, unless `any_base`, for one that does not name its base. The model is unchanged then.
    """
    file = read_adapter(folder)
    adapted = model if isinstance(model, AdaptedModel) else AdaptedModel(model)
    before, names = adapted.active, set(adapted.configs)
    try:
        if file.base_sha256 is None and not any_base:
            raise InputError(f"{folder} does not say which base it belongs to: any_base=True takes this one")
        hashes = {"the base": (file.base_sha256, adapted.base_sha256)}
        if causal_model is not None:
            hashes["the causal model that the gate reads"] = (file.reader_sha256, base_hash(causal_model))
        for role, (expected, actual) in hashes.items():
            if expected not in (None, actual):
                raise InputError(
                    f"{folder} is an adapter of another model: {role} has sha256 {actual[:12]}, "
                    f"expected {str(expected)[:12]}"
                )
        adapted.add(name, file.config, causal_model)
        tensors = _tensors(adapted, name)
        for key in sorted(tensors.keys() | file.tensors.keys()):
            stored, shape = (getattr(t.get(key), "shape", None) for t in (file.tensors, tensors))
            if stored != shape:
                raise InputError(f"{folder / ADAPTER_TENSORS}: {key!r} is {stored}, expected {shape}")
            tensors[key].copy_(file.tensors[key])
    except InputError:
        if adapted is not model:
            adapted.unload()
        elif name in adapted.configs and name not in names:
            adapted.delete(name)
            adapted.use(before)
        raise
    return adapted


def _tensors(adapted: AdaptedModel, name: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter and its gate, by path and name."""
    tensors = {
        f"{path}.{key}": tensor.detach()
        for path, layer in adapted.layers().items()
        if name in layer.adapters
        for key, tensor in layer.adapters[name].named_parameters()
    }
    gates: Any = adapted.gates
    return tensors | ({GATE: gates[name].linear.weight.detach()} if name in gates else {})


def read_adapter(folder: Path) -> AdapterFile:
    """Read an adapter's files; raise `InputError` that names the file when it is missing or damaged."""
    file = folder / ADAPTER_CONFIG
    with _reading(f"adapter: {folder / ADAPTER_TENSORS}"):
        tensors = {}
        for key, tensor in load_file(folder / ADAPTER_TENSORS).items():
            if not key.startswith(PREFIX):
                raise ValueError(f"key {key!r}; expected {PREFIX}...")
            tensors[key.removeprefix(PREFIX)] = tensor
    with _reading(f"adapter: {file}"):
        document = json.loads(file.read_text("utf-8"))
        if document["peft_type"] not in ("LORA", *OWN_TYPES.values()):
            allowed = ", ".join(dict.fromkeys(["LORA", *OWN_TYPES.values()]))
            raise InputError(f"{file}: peft_type {document['peft_type']!r}; allowed: {allowed}")
        digest = str(document.get("base_model_name_or_path"))
        base = digest.removeprefix(BASE) if digest.startswith(BASE) else None
        if document["peft_type"] != "LORA":
            settings = document[OWN]
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["config"].items()}
            return AdapterFile(validated(AdapterConfig, values), tensors, base, settings.get("reader_sha256"))
        wrong = {key: value for key, value in document.items() if value and key not in READ | IDLE}
        if document.get("init_lora_weights") in PLAIN_START:
            wrong.pop("init_lora_weights", None)
        if wrong:
            raise InputError(
                f"{file}: {wrong} is not plain LoRA, which has {', '.join(sorted(READ))} and an "
                "init_lora_weights that leaves the base as it is"
            )
        if document.get("bias", "none") != "none":
            raise InputError(f"{file}: bias={document['bias']!r}; allowed: 'none'")
        values = {
            "kind": "rslora" if document.get("use_rslora") else "lora",
            "rank": document["r"],
            "alpha": float(document["lora_alpha"]),
            "dropout": float(document.get("lora_dropout") or 0.0),
            "targets": tuple(dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in tensors)),
        }
        return AdapterFile(validated(AdapterConfig, values), tensors, base, None)


# -- models to recommend with --------------------------------------------------------------------------------
#
#     from reclib import load
#     model = load("w64d2-ml-100k")
#     model.recommend(["50", "181", "172"])
#
# A folder `models/<size>-<dataset>` holds `model.safetensors`, `config.json` (fields of `ModelConfig`) and
# `manifest.json`: keys and titles of the items, training data and configuration, metrics on validation, and
# the sha256 of the weights.

WEIGHTS, MODEL_CONFIG, MANIFEST = "model.safetensors", "config.json", "manifest.json"
MODEL = "model"  # folder of a finished run's model, inside the folder of its checkpoints


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
    def from_dataset(
        cls, model: Bert4Rec | AdaptedModel, dataset: Dataset, about: dict[str, Any]
    ) -> Recommender:
        """Return a recommender of a model and the catalogue of its dataset."""
        titles = [dataset.title(item) for item in range(1, dataset.num_items + 1)]
        return cls(model, dataset.item_keys.tolist()[1:], titles, about)

    def recommend(self, history: Iterable[str | int], k: int = 10) -> list[Recommendation]:
        """Return the k best items that are not in a history, which lists items oldest first.

        An item is given by its raw id (a number stands for its digits) or by its full title, ignoring case.
        If fewer than k items remain, all are returned, with a warning. Raises `InputError` for a history that
        is empty or no list, an unknown item, a title of several items and a k below 1.
        """
        if isinstance(history, str | bytes | Set | Mapping) or not isinstance(history, Iterable):
            raise InputError(f"the history is {history!r}: expected a list of items, oldest first")
        entries = list(history)
        if not entries:
            raise InputError("the history is empty: expected at least one item id")
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise InputError(f"k is {k!r}: expected a whole number of at least 1")
        items = np.array([self._item(entry) for entry in entries], dtype=np.int32)
        unseen = np.setdiff1d(np.arange(1, len(self.keys) + 1, dtype=np.int32), items)
        if len(unseen) < k:
            warnings.warn(f"{len(unseen)} items are not in the history: fewer than k={k}", stacklevel=2)
        if not len(unseen):
            return []
        histories = Histories(items, np.array([0]), np.array([len(items)]))
        evaluation = Evaluation(histories, unseen[:1])  # the target is not used
        scores = metrics.model_scores(self.model, evaluation, self.model.output_weight.device)
        top = metrics.rank(scores, evaluation, remove_seen=True, top_k=min(int(k), len(unseen))).top
        assert top is not None
        return [Recommendation(self.keys[i - 1], self.titles[i - 1]) for i in top[0]]

    def _item(self, entry: str | int) -> int:
        """Return the number of the item with this raw id or title."""
        if (item := self._numbers.get(str(entry))) is not None:
            return item
        matches = [i for i, title in enumerate(self.titles, 1) if title.casefold() == str(entry).casefold()]
        if len(matches) == 1:
            return matches[0]
        if matches:
            keys = ", ".join(self.keys[i - 1] for i in matches[:5])
            count = len(matches)
            raise InputError(f"the title {entry!r} is that of {count} items: give an id, such as {keys}")
        close = nearest(str(entry), self.titles) or nearest(str(entry), self.keys)
        raise InputError(
            f"unknown item {entry!r}{close}: the model knows {len(self.keys):,} items of its data"
        )

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self.keys, 1)}


def save_model(
    model: Bert4Rec, train: TrainConfig, dataset: Dataset, name: str | Path, about: Mapping[str, Any]
) -> Path:
    """Write or replace a trained model under `models/<name>`, atomically.

    `name` may be the path of a folder instead. `about` is added to its manifest: metrics, code version and
    other provenance.
    """
    folder = system.models() / name
    recommender = Recommender.from_dataset(model, dataset, dict(about))
    manifest = {
        "data": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        "items": recommender.keys,
        "titles": recommender.titles,
        "train": asdict(train),
        "about": recommender.about,
    }
    documents = {MODEL_CONFIG: asdict(model.config), MANIFEST: plain(manifest)}
    _write(folder, WEIGHTS, unique_tensors(model), documents)
    return folder


def load_model(name: str | Path) -> Recommender:
    """Load a trained model from a name under models/, its folder, or the folder of a finished `fit`.

    Raises `InputError` for a missing or damaged model.
    """
    places = [system.models() / name, Path(name), Path(name) / MODEL]
    folder = next((place for place in places if (place / MANIFEST).is_file()), None)
    if folder is None:
        if latest(Path(name)) is not None:
            raise InputError(f"{name} holds a run that is not finished: {system.AGAIN}")
        names = ", ".join(sorted(f.parent.name for f in system.models().glob(f"*/{MANIFEST}")))
        raise InputError(f"no model {str(name)!r} is kept; here: {names or 'none'}")
    with _reading(f"model {name}"):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        config = validated(ModelConfig, json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8")))
        model = Bert4Rec(config)
        load_unique(model, _checked(folder / WEIGHTS, manifest, MANIFEST))
        return Recommender(model.eval(), manifest["items"], manifest["titles"], manifest["about"])


def recommend_main(argv: Sequence[str] | None = None) -> int:
    """Print the recommendations of a trained model after a history."""
    parser = system.Parser(prog="python -m reclib recommend", description="Recommend items after a history.")
    parser.add_argument("model", help="a folder that `fit --out` wrote, or a name under models/")
    parser.add_argument("history", nargs="+", metavar="ITEM", help="raw ids or titles, oldest first")
    parser.add_argument("-k", type=int, default=10, help="how many (10)")
    options = parser.parse_args(argv)
    with warnings.catch_warnings(record=True) as notes:
        items = load_model(options.model).recommend(options.history, options.k)
    for item in items:
        print(f"{item.key}\t{item.title}")
    for note in notes:
        print(note.message, file=sys.stderr)
    return 0
