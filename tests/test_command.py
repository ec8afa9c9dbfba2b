from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from reclib import system

# Every module that is a command, found by how it ends.
COMMANDS = sorted(
    file.stem
    for file in (ROOT / "reclib").glob("*.py")
    if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
)
ACTIONS = {
    "study": ("run", "run-all", "status", "collect", "merge", "params", "refresh"),
    "data": ("fetch", "prepare", "show", "verify"),
}


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which `reclib.NAME` is a command."""
    line = re.sub(r"^reclib\.", f"{sys.executable} -m reclib.", line)
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_every_command_leaves_through_the_same_door():
    for name in COMMANDS:
        assert "raise SystemExit(exit_code(main))" in (ROOT / f"reclib/{name}.py").read_text(encoding="utf-8")


def test_help_is_there_and_says_how_it_is_called(capsys, monkeypatch):
    for name in COMMANDS:
        main = __import__(f"reclib.{name}", fromlist=["main"]).main
        for action in ("", *ACTIONS.get(name, ())):
            monkeypatch.setattr(sys, "argv", [name, *filter(None, [action]), "--help"])
            with pytest.raises(SystemExit) as ended:
                main()
            said = capsys.readouterr().out
            assert ended.value.code == 0
            assert said.startswith("usage: python -m reclib."), said[:80]
            bare = re.findall(r"^  (-[^ ,]+(?: [^ ]+)?)\n(?! {10})", said.split("options:")[-1], re.MULTILINE)
            assert bare == [], "options without a word of help"


def test_a_reader_that_goes_away_is_no_error():
    done = shell("reclib.planner --size 5m --gpu l4 | head -n 1")
    assert done.returncode in (0, 141)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    gone = shell("reclib.planner --size 5m --gpu l4 | true")
    assert (gone.returncode, gone.stderr) == (141, "")


def test_a_command_gives_its_code_and_an_interrupt_is_told_in_a_word(capsys):
    assert system.exit_code(lambda: 3) == 3

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert system.exit_code(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_wrong_options_are_told_in_one_line():
    done = shell("reclib.planner --sise 5m")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--help" in done.stderr
