import re
import subprocess
import sys

import pytest

from reclib import cli, system


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which `reclib` is the command."""
    command = ["bash", "-c", f"set -o pipefail; {sys.executable} -m {line}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_every_command_has_help_and_help_names_every_command(capsys):
    study = ("run", "run-all", "status", "collect", "merge", "params", "refresh")
    data = [["data", action] for action in ("fetch", "prepare", "show", "verify")]
    for words in [*([name] for name in (*study, *cli.COMMANDS)), *data, []]:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.entry([*words, "--help"])
        text = capsys.readouterr().out
        assert text.startswith(" ".join(["usage: python -m reclib", *words[:1]])), text[:80]
    for name in (*study, *cli.COMMANDS):
        assert re.search(rf"^ +{name} ", text, re.MULTILINE), name


def test_a_wrong_option_is_an_error_of_one_line():
    process = shell("reclib plan --sise 5m")
    assert process.returncode == 2
    assert re.fullmatch(".*--help.*\n", process.stderr)


def test_a_reader_that_goes_away_is_no_error():
    process = shell("reclib plan --size 5m --gpu l4 | true")
    assert (process.returncode, process.stderr) == (141, "")


def test_a_failing_system_is_an_error_of_one_line(capsys):
    def failing() -> int:
        raise OSError(28, "No space left")

    assert (system.exit_code(lambda: 3), system.exit_code(failing)) == (3, 1)
    assert capsys.readouterr().err == "error: [Errno 28] No space left\n"
