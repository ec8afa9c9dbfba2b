"""What is published says nothing about who ran it where, and nothing that comes from outside is unpickled."""

from __future__ import annotations

import ast
import getpass
import re
import socket
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from conftest import ROOT

FOLDERS = ("notebooks", "executed", "figures", "params")
# Folders of people and of machines, wherever a path begins; addresses of pages are none.
PLACES = re.compile(r"(?<![\w.:/<\\-])/(?:home|root|Users|tmp|work|mnt|content|var|private)/[\w.-]+")
SECRETS = re.compile(
    r"\b(?:ghp|gho|github_pat|hf|glpat|xox[bp])[_-][A-Za-z0-9_-]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|(?i:api[_-]?key|access[_-]?token|password)[\"']?\s*[:=]\s*[\"'][^\"']{8,}|[?&]token=[0-9a-f]{16,}"
)
ENVIRONMENT = re.compile(
    r"\b(?:LS_COLORS|SSH_CONNECTION|XDG_[A-Z_]+|OLDPWD|HOSTNAME|LOGNAME|WANDB_API_KEY)\b"
)


def private_words() -> list[str]:
    """Return names of this machine and its user that are no words of the language."""
    names = {getpass.getuser(), socket.gethostname(), str(Path.home()), str(ROOT)}
    return [name for name in names if len(name) > 4]


def committed() -> list[Path]:
    """Return the files under the published folders that git knows, or all where there is no git."""
    done = subprocess.run(["git", "ls-files", "-z", *FOLDERS], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    return files or [file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.is_file()]


def texts(file: Path) -> Iterator[str]:
    """Yield a file's content as text, that of the members of an archive one by one."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                yield name
                yield archive.read(name).decode("latin-1")
    else:
        yield file.read_bytes().decode("utf-8", errors="replace")


def findings(text: str, private: list[str]) -> list[str]:
    """Return what in a text should not be there."""
    matches = [match[0] for rule in (PLACES, SECRETS, ENVIRONMENT) for match in rule.finditer(text)]
    return matches + [word for word in private if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text)]


def test_committed_notebooks_records_and_figures_tell_nothing_about_who_ran_them():
    files = [file for file in committed() if file.name != "plotly.min.js"]  # a library's own strings
    assert len(files) > 30
    private = private_words()
    wrong = {
        str(file.relative_to(ROOT)): faults[:3]
        for file in files
        if (faults := [fault for text in texts(file) for fault in findings(text, private)])
    }
    assert not wrong


def test_the_search_finds_what_it_is_for_and_nothing_else():
    for text in [
        'read "/home/somebody/data.csv"',
        "saved to /tmp/abc/x",
        "WANDB_API_KEY=1",
        f"hf_{'a' * 36}",
        f"glpat-{'1' * 20}",
        '"api_key": "abcdefghijkl"',
        "http://127.0.0.1:8888/lab?token=" + "0" * 48,
        "ran on some-host-name today",
    ]:
        assert findings(text, ["some-host-name"]), text
    for text in [
        "see https://github.com/home/x, notebooks/02_baseline.ipynb, 1/2, a commit 0123456789abcdef, </div>",
        "/hfFUDFHabZFEIVQDTm0WwAJhVAA7j77",  # base64 from a figure: a token has a separator
    ]:
        assert findings(text, []) == []


UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unpickles(source: str) -> list[str]:
    """Return the places of a source that could run code out of a file."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            faults += [a.name for a in node.names if a.name.split(".")[0] in UNSAFE]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE:
            faults.append(str(node.module))
        elif isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            wrong = name.endswith("read_pickle") or options.get("allow_pickle", "False") != "False"
            wrong |= name == "torch.load" and options.get("weights_only") != "True"
            wrong |= name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec")
            faults += [ast.unparse(node)] if wrong else []
    return faults


def test_nothing_unpickles_a_file():
    sources = [file for folder in ("reclib", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    for file in sources:
        # `fetch` reads pinned tables by an unpickler that knows a fixed list of names; test_fetch attacks it.
        allowed = ["pickle"] if file.name == "fetch.py" else []
        assert unpickles(file.read_text(encoding="utf-8")) == allowed, file.relative_to(ROOT)
    entries = yaml.safe_load((ROOT / "params/datasets.yaml").read_text(encoding="utf-8")).values()
    pickled = [entry for entry in entries if any(name.endswith(".pkl") for name in entry.get("members", ()))]
    assert pickled
    assert all(entry["checksum"].startswith("sha256:") for entry in pickled)
    for source in ("from joblib import load", "torch.load(f)", "load(f, allow_pickle=True)", "yaml.load(f)"):
        assert unpickles(source)


def test_jupyterlab_is_started_on_loopback_and_keeps_its_token():
    said = (ROOT / "Makefile").read_text() + (ROOT / "README.md").read_text()
    started = [line for line in said.splitlines() if re.search(r"jupyter[ -](?:lab|notebook)\b", line)]
    assert any("--ip 127.0.0.1" in line for line in started)
    assert not re.findall(
        r"0\.0\.0\.0|--(?:ip|ServerApp\.ip)[ =]\*|token *= *['\"]{2}|disable_check_xsrf", said
    )
    assert not re.findall(r"(?:IdentityProvider|ServerApp|NotebookApp)\.(?:token|password) *=", said)
