"""Datasets ready to be split: prepared once, cached under a hash of source and rules, loaded at once.

    python -m reclib.data prepare SOURCE [--out DIR] [--min-user 5] [--min-item 5] ...
    python -m reclib.data fetch NAME
    python -m reclib.data show DIR
    python -m reclib.data verify DIR

SOURCE is the name of a dataset or a file. The rules of the preparation are in `prepare`, those of the
splits in `splits`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

if __name__ == "__main__":  # while the modules below are imported, there is nothing to clean up
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(os.write(2, b"interrupted\n") and 130))

from reclib import cache, fetch, paths, sources, splits, synthetic
from reclib import prepare as preparation
from reclib.command import Parser, exit_code
from reclib.config import DataConfig, InputError, validated
from reclib.dataset import (
    Dataset,
    Evaluation,
    Histories,
    Keys,
    content_hash,
    described,
    evaluated_users,
    evaluation,
    load,
    ties,
    train_histories,
)
from reclib.reading import READING_VERSION

__all__ = [
    "DataConfig",
    "Dataset",
    "Evaluation",
    "Histories",
    "evaluated_users",
    "evaluation",
    "folder_of",
    "load",
    "prepare",
    "synthetic_dataset",
    "train_histories",
]

COLUMNS = ("user", "item", "time", "rating")


def prepare(config: DataConfig) -> Dataset:
    """Return the dataset of `config`, prepared unless it is whole in the data folder.

    Raises `InputError` for a source that is unknown, unreachable or malformed, and where the k-core
    leaves nothing; then nothing is written.
    """
    return load(folder_of(config))


def folder_of(config: DataConfig, out: Path | None = None) -> Path:
    """Return the folder of the prepared dataset, after preparing it unless it is whole there.

    The folder is `out`, else one in the data folder named by a hash of source and rules. Where
    `config.dataset` is a prepared folder it is that one, as it is.
    """
    given = sources.prepared_folder(config)
    if given is not None:
        if out is not None:
            raise InputError(f"{given} is prepared already: give the file that it was made from")
        return given
    origin = sources.source(config)
    key = _key(origin, config)
    folder = out or paths.data() / "prepared" / f"{origin.name}-{key}"
    if out is not None:
        _refuse_foreign(out)
    if not cache.holds(folder, key):
        preparation.build(origin, config, folder, key)
    return folder


def synthetic_dataset(num_users: int, num_items: int, mean_len: float, seed: int) -> Dataset:
    """Return synthetic histories without filter or cache, for benchmarks and tests.

    The catalogue is exactly 1..num_items, met or not. Lengths are geometric-like from 5
    interactions.
    """
    made = synthetic.generate(users=num_users, items=num_items, mean_len=mean_len, seed=seed)
    asked = {"users": num_users, "items": num_items, "mean_len": mean_len, "seed": seed}
    item_keys = Keys.of(["", *map(str, range(1, num_items + 1))])
    user_keys = Keys.of(list(map(str, range(num_users))))
    dataset = Dataset("synthetic", made.items, made.offsets, item_keys, user_keys, {}, {})
    rules = {"version": preparation.RULES_VERSION, "order": preparation.ORDER_BY, "split": preparation.SPLIT}
    source = {"origin": "synthetic, unfiltered", **asked}
    about = {"rules": rules, "source": source, "time_unit": "order", "ties": ties(dataset)}
    dataset.manifest.update(described(dataset, about))
    return dataset


def _key(source: sources.Source, config: DataConfig) -> str:
    """Return what tells prepared folders apart: the source's rows and all that decides what is kept."""
    rules = [config.min_user, config.min_item, config.core, config.duplicates]
    reading = [READING_VERSION, config.strict, config.max_rejected_share]
    told = [preparation.RULES_VERSION, source.name, source.identity, rules, reading]
    return content_hash(*map(str, told))[:16]


def _refuse_foreign(folder: Path) -> None:
    """Refuse to put a dataset in the place of what is none: a file, or a folder with other content."""
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not free and not (folder / cache.SEAL).is_file():
        raise InputError(f"{folder} exists and is no prepared dataset: give a new folder")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m reclib.data", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="make a dataset of a file or a name")
    command.set_defaults(act=_prepare_command)
    default = DataConfig()
    kinds = get_type_hints(DataConfig)
    command.add_argument("source", help="a file, or the name of a dataset")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: the data folder)")
    command.add_argument("--format", default=default.format, help="of the file (default: auto)")
    command.add_argument("--columns", type=_columns, metavar="user=A,item=B,time=C", help="of an own table")
    for name, text in (
        ("min_user", "interactions that a user must have"),
        ("min_item", "interactions that an item must have"),
    ):
        given = getattr(default, name)
        command.add_argument(_option(name), type=int, default=given, metavar="N", help=f"{text} ({given})")
    for name, text in (("core", "how the two are applied"), ("duplicates", "what stays of repeated rows")):
        allowed, given = get_args(kinds[name]), getattr(default, name)
        command.add_argument(_option(name), choices=allowed, default=given, help=f"{text} ({given})")
    command.add_argument("--strict", action="store_true", help="stop at the first bad line")
    share, memory = default.max_rejected_share, default.memory_limit_mb
    text = f"bad lines at which it stops, a share of all ({share:g})"
    command.add_argument("--max-rejected-share", type=float, default=share, metavar="X", help=text)
    text = f"megabytes that the database may take ({memory})"
    command.add_argument("--memory-mb", type=int, default=memory, metavar="N", help=text)
    for name, act, text in (
        ("show", _show_command, "print counts and splits of a prepared folder"),
        ("verify", _verify_command, "read every byte of a prepared folder and compare"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path, help="what `prepare` wrote")
        command.set_defaults(act=act)
    command = commands.add_parser("fetch", help="download a dataset by name, or list them")
    fetch.add_arguments(command)
    command.set_defaults(act=fetch.run)
    return parser


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _columns(text: str) -> dict[str, str]:
    pairs = dict(part.partition("=")[::2] for part in text.split(","))
    wrong = [name for name, column in pairs.items() if name not in COLUMNS or not column]
    if wrong:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected NAME=COLUMN with a name of {', '.join(COLUMNS)}"
        )
    return pairs


def _prepare_command(given: argparse.Namespace) -> int:
    path = Path(given.source)
    values: dict[str, Any] = {
        # a file as the shell sees it: a relative name in a configuration counts from the project's root
        "dataset": str(path.resolve()) if path.exists() else given.source,
        "memory_limit_mb": given.memory_mb,
    }
    names = (
        "format",
        "columns",
        "min_user",
        "min_item",
        "core",
        "duplicates",
        "strict",
        "max_rejected_share",
    )
    values |= {name: getattr(given, name) for name in names}
    config = validated(DataConfig, values)
    folder = folder_of(config, given.out and given.out.resolve())
    print("\n".join(_report(load(folder))))
    print(folder / "manifest.json")
    return 0


def _show_command(given: argparse.Namespace) -> int:
    dataset = load(given.folder)
    print("\n".join(_report(dataset)))
    kinds = [splits.leave_one_out] + ([splits.global_time] if dataset.times is not None else [])
    for kind in kinds:
        try:
            split = kind(dataset)
        except InputError as error:  # all times may coincide, say
            print(f"{kind.__name__}: {error}")
            continue
        print(f"{split.name}:")
        for name, value in split.about.items():
            print(f"  {name}: {value}")
    return 0


def _verify_command(given: argparse.Namespace) -> int:
    found = cache.damage(given.folder)
    if found:
        raise InputError(f"{given.folder}: {'; '.join(found)}; {cache.remedy(given.folder)}")
    print(f"{given.folder}: every file is as it was written; fingerprint {load(given.folder).fingerprint}")
    return 0


def _report(dataset: Dataset) -> list[str]:
    manifest = dataset.manifest
    lines = [f"{dataset.name}, fingerprint {dataset.fingerprint}, times: {manifest['time_unit']}"]
    lines.append(f"{'':<16}{'users':>14}{'items':>14}{'interactions':>16}")
    for row in manifest["steps"]:
        lines.append(f"{row['step']:<16}{row['users']:>14,}{row['items']:>14,}{row['interactions']:>16,}")
    core = manifest["core"]
    lines.append(f"k-core ({core['rule']}): {len(core['passes'])} passes")
    for what, published in manifest["source"].get("published_counts", {}).items():
        found = manifest["steps"][0][what]
        agrees = "as published" if found == published else f"but {published:,} are published"
        lines.append(f"{what} of the source: {found:,}, {agrees}")
    for reason, count in manifest["reading"]["rejected"].items():
        lines.append(f"rejected, {reason}: {count:,} of {manifest['reading']['lines']:,} lines")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = _parser().parse_args(arguments)
    try:
        return given.act(given)
    except BrokenPipeError:
        raise
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # temporary files are removed then, too
    raise SystemExit(exit_code(main))
