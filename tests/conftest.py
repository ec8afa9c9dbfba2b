import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "peers")]  # tests import them as modules
# No test writes into the committed records, keeps models beside them or sends curves anywhere, not even where
# it forgets to name a folder of its own. Compute threads that wait give their core away soon, as in the
# Makefile: a training step takes six times as long without, where other processes run. Kernels inherit this.
for _name, _value in {
    "RECLIB_RECORDS": str(Path(tempfile.gettempdir()) / "reclib-test-records"),
    "RECLIB_MODELS": str(Path(tempfile.gettempdir()) / "reclib-test-models"),
    "WANDB_MODE": "disabled",
    "GOMP_SPINCOUNT": "10000",
}.items():
    os.environ.setdefault(_name, _value)
os.environ["PYTHONPATH"] = str(ROOT)  # every process that a test starts runs this checkout

import torch  # noqa: E402  # reads GOMP_SPINCOUNT as it is loaded

from reclib import parameters, records  # noqa: E402
from reclib.config import InputError  # noqa: E402

# A whole notebook in the form that the study's own have, small enough to run in a second or two.
_CODE = """from reclib import parameters
from reclib import records
p = parameters.read("02_baseline", globals())
p = parameters.fill(p, "cpu")
card = dict.fromkeys(records.CARD) | {"label": "cpu", "name": "test"}
run = records.Run("02_baseline", p, card, {"name": "none", "fingerprint": "0"})"""
RESULT = 'run.result("answer", {"hr_10": 0.123456 + p.epochs}, seed=0)'


def make_notebook(file: Path, defaults: dict[str, object], cells: list[str]) -> None:
    """Write a notebook with a parameters cell of `defaults` and code `cells`."""
    new = nbformat.v4
    lines = [f"{name} = {value!r}  # a parameter" for name, value in defaults.items()]
    parameters = new.new_code_cell("\n".join(lines), metadata={"tags": ["parameters"]})
    cells = [new.new_markdown_cell("# A question"), parameters, *map(new.new_code_cell, cells)]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new.new_notebook(cells=cells, metadata={"kernelspec": kernel}), file)


def smoke(notebook: str, **changes: object) -> Any:
    """Return the parameters of a notebook at its smallest profile, with these changes."""
    return parameters.build(notebook, parameters.profile(notebook, "smoke") | changes)


def rows_of(project: Path) -> list[dict[str, Any]]:
    """Return the records of a project's own runs."""
    return records.read(project / "runs/executed")


def python(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with these words in a process of its own, and wait for its end."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, **({"capture_output": True, "text": True, "timeout": 300} | options))


def commit(folder: Path, **variables: str) -> str:
    """Commit all files of a folder with git; return the commit."""
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init"], ["add", "."], ["commit", "-m", "a"]):
        subprocess.run([*git, *words], env=os.environ | variables, capture_output=True, check=True)
    return subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()


def refused(problem: str | None, call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """Check that a call raises an InputError of one line, which matches `problem` if given; return it."""
    with pytest.raises(InputError, match=problem) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def until(condition: Callable[[], object], seconds: float) -> None:
    """Wait until a condition holds; fail if it does not within these seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def sample(name: str) -> Path:
    """Return a real file of `shared/data`; the test is skipped where there is no copy of it."""
    for folder in (ROOT, ROOT.parent):
        if (folder / "shared/data" / name).is_file():
            return folder / "shared/data" / name
    pytest.skip(f"no shared/data/{name} in the project or beside it: nothing was compared with it")


@contextlib.contextmanager
def disk_of(megabytes: int, place: Path) -> Iterator[Path]:
    """Have a file system of this size at a folder; the test is skipped where none can be mounted."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root on Linux")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(autouse=True)
def denormals() -> None:
    """Start with denormal numbers: what resolved a CPU before flushes them in this thread from there on."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def dataset() -> Any:
    """Synthetic histories whose users live in different parts of the time."""
    from spread import spread  # with pandas, which most tests do not need

    return spread()


PLACES = ("RECLIB_ROOT", "RECLIB_DATA", "RECLIB_RUNS", "RECLIB_RECORDS")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a place of its own for all that the project reads and writes."""
    for name in PLACES:
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root of its own: the real parameter files and a small `02_baseline`; it records in runs/."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("RECLIB_ROOT", str(tmp_path))
    monkeypatch.delenv("RECLIB_RECORDS")
    _write_baseline(tmp_path, RESULT)
    return tmp_path


def _write_baseline(root: Path, *cells: str) -> None:
    defaults = yaml.safe_load((root / "params/smoke.yaml").read_text())["02_baseline"]
    make_notebook(root / "notebooks/02_baseline.ipynb", defaults, [_CODE, *cells])


@pytest.fixture
def set_cells(project: Path) -> Callable[..., None]:
    """Replace the cells after the parameters and the set-up of the project's `02_baseline`."""
    return functools.partial(_write_baseline, project)


@pytest.fixture
def study(project: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m reclib` as a user does, in a process of its own."""
    return functools.partial(python, "-m", "reclib", cwd=project)
