from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from reclib import cli, system
from reclib.config import InputError

STUDY = ("run", "run-all", "status", "collect", "merge", "params", "refresh")
ACTIONS = {"data": ("fetch", "prepare", "show", "verify")}


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which `reclib` is the command."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m {line}"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_help_is_there_and_says_how_it_is_called(capsys):
    calls = [[name] for name in STUDY]
    calls += [
        [name, *filter(None, [action])] for name in cli.COMMANDS for action in ("", *ACTIONS.get(name, ()))
    ]
    for words in [*calls, []]:
        with pytest.raises(SystemExit) as ended:
            cli.entry([*words, "--help"])
        text = capsys.readouterr().out
        assert ended.value.code == 0
        assert text.startswith(" ".join(["usage: python -m reclib", *words[:1]])), text[:80]
        bare = re.findall(r"^  (-[^ ,]+(?: [^ ]+)?)\n(?! {10})", text.split("options:")[-1], re.MULTILINE)
        assert bare == [], "options without a word of help"
    for name in (*STUDY, *cli.COMMANDS):
        assert re.search(rf"^ +{name} ", text, re.MULTILINE), name


def test_a_former_spelling_prints_the_new_one_and_a_wrong_option_one_line():
    done = shell("reclib.planner --size 5m")
    assert done.returncode != 0
    assert done.stderr == "reclib.planner is now: python -m reclib plan\n"
    done = shell("reclib plan --sise 5m")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--help" in done.stderr


def test_a_reader_that_goes_away_is_no_error():
    done = shell("reclib plan --size 5m --gpu l4 | head -n 1")
    assert done.returncode in (0, 141)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    gone = shell("reclib plan --size 5m --gpu l4 | true")
    assert (gone.returncode, gone.stderr) == (141, "")


def test_a_command_gives_its_code_and_tells_an_error_in_one_line(capsys):
    def failing(error: type[BaseException], *arguments: object) -> int:
        raise error(*arguments)

    assert system.exit_code(lambda: 3) == 3
    for error, code, line in (
        ((KeyboardInterrupt,), 130, "interrupted\n"),
        ((InputError, "what is wrong"), 2, "what is wrong\n"),
        ((OSError, 28, "No space left"), 1, "error: [Errno 28] No space left\n"),
    ):
        assert system.exit_code(lambda error=error: failing(*error)) == code
        assert capsys.readouterr().err == line
