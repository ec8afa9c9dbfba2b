"""PNGs of the main figures, for the README and for slides: drawn by a browser from the same records.

    python -m reclib.pictures               figures/readme.png and one for each notebook's main figure
    python -m reclib.pictures --out slides

Needs Chromium or Chrome; `RECLIB_CHROMIUM` names another browser of that family.
"""

from __future__ import annotations

import argparse
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from reclib import claims, figures, paths, record
from reclib.answers import CHAPTERS
from reclib.command import Parser, exit_code
from reclib.config import InputError
from reclib.look import HEIGHT
from reclib.tables import PROFILES, Record

WIDTH = 1000  # pixels
README = "step_ladder"  # the figure at the top of the README, readme.png
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SECONDS = 60  # for one picture


def browser() -> str:
    """Return the browser that draws; `InputError` where there is none."""
    given = os.environ.get("RECLIB_CHROMIUM")
    for name in [given] if given else BROWSERS:
        if found := shutil.which(name):
            return found
    if given:
        raise InputError(f"RECLIB_CHROMIUM={given}: no such program; pictures need Chromium or Chrome")
    raise InputError(
        f"no browser to draw pictures with: none of {', '.join(BROWSERS)} is installed; "
        "install Chromium or Chrome, or name one in RECLIB_CHROMIUM"
    )


def main_figures(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the figure to draw for each notebook that has records: its file's name, and its records.

    Of several datasets or devices it is the one of the most work: a long run before one at quick, then one
    with seeds enough for a claim, then the most recent.
    """
    found: dict[str, tuple[tuple[int, bool, str], list[Record]]] = {}
    leads = {(notebook, chapter.lead) for notebook, chapter in CHAPTERS.items()}
    for spec, _, _, some, besides in figures.drawings(records):
        if (spec.notebook, spec.name) not in leads:
            continue
        rank = max((PROFILES.index(r["profile"]), _may_claim(r), r["time"]) for r in some)
        if spec.name not in found or rank > found[spec.name][0]:
            found[spec.name] = rank, [*some, *besides]
    return {name: some for name, (_, some) in found.items()}


def _may_claim(row: Record) -> bool:
    """Whether a record that compares has seeds enough to say more than that it has too few."""
    return claims.enough(row["metrics"].get(name, 0) for name in ("seeds", "reference_seeds"))


def file_name(figure: str) -> str:
    """Return the name of a figure's picture: that of its notebook, or the README's."""
    if figure == README:
        return "readme.png"
    return next(f"{name}.png" for name, chapter in CHAPTERS.items() if chapter.lead == figure)


def draw(records: Sequence[Record], out_dir: Path) -> list[Path]:
    """Draw the main figure of each notebook that has records; return the files written."""
    program = browser()  # before anything is written
    out_dir.mkdir(parents=True, exist_ok=True)
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for name, some in main_figures(records).items():
            figure = figures.show(name, *some)
            html = figures.write(figure, name, Path(folder))
            drawn = Path(folder) / f"{name}.png"
            photograph(program, html, drawn, figure.layout.height or HEIGHT)
            partial = out_dir / f"{file_name(name)}.partial"
            shutil.copyfile(drawn, partial)
            os.replace(partial, out_dir / file_name(name))
            files.append(out_dir / file_name(name))
    return files


def photograph(program: str, html: Path, picture: Path, height: int, width: int = WIDTH) -> None:
    """Write what a browser shows of a local page as a PNG of `width` by `height` pixels, in light colours.

    Raises `InputError` when the browser fails, takes too long or gives another size.
    """
    with tempfile.TemporaryDirectory() as profile:  # nothing of a person's own browser
        command = [program, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += [f"--user-data-dir={profile}", "--virtual-time-budget=10000", f"--screenshot={picture}"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # it refuses root otherwise
        command += [f"--window-size={width},{height}", html.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise InputError(f"{Path(program).name} took over {_SECONDS} s to draw {html.name}") from None
    if done.returncode or not picture.is_file():
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"{Path(program).name} could not draw {html.name}: {said}")
    if (got := size(picture)) != (width, height):
        raise InputError(
            f"{Path(program).name} drew {html.name} as {got[0]} x {got[1]}, not {width} x {height}"
        )


def size(picture: Path) -> tuple[int, int]:
    """Return width and height of a PNG in pixels, from its header."""
    header = picture.read_bytes()[:24]
    if header[:8] != b"\x89PNG\r\n\x1a\n" or len(header) < 24:
        raise InputError(f"{picture.name}: not a PNG")
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def _said(files: Iterable[Path]) -> str:
    return ", ".join(file.name for file in files) or "no picture: there are no records, run `make study`"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 where there is no browser."""
    parser = Parser(
        prog="python -m reclib.pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (figures/)")
    given = parser.parse_args(arguments)
    try:
        files = draw(record.latest(record.read(paths.executed())), given.out or paths.figures())
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(_said(files))
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
