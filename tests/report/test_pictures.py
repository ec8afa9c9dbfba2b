from __future__ import annotations

import shutil
import struct

import pytest
from figure_records import compared, of_sizes, record

from reclib.config import InputError
from reclib.report import figures


@pytest.mark.skipif(
    not any(shutil.which(name) for name in figures.BROWSERS), reason="no Chromium or Chrome is installed"
)
def test_the_first_figure_is_drawn_and_is_not_blank(tmp_path):
    file, *_ = figures.draw(of_sizes(), tmp_path / "out")
    assert file == tmp_path / "out" / "readme.png"
    width, height = struct.unpack(">II", file.read_bytes()[16:24])
    assert width == figures.WIDTH
    assert height > 200
    assert file.stat().st_size > 15_000  # a blank page of this size has 5,000 bytes
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"readme.png", "03_scaling.png"}


def test_without_a_browser_it_says_what_to_install_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("RECLIB_CHROMIUM", raising=False)
    assert figures.pictures_main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "no browser to draw pictures with" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("RECLIB_CHROMIUM", "a-browser")
    with pytest.raises(InputError, match="none of a-browser is installed"):
        figures.browser()


def test_a_browser_that_fails_is_told_in_one_line(tmp_path):
    browser = tmp_path / "broken"
    browser.write_text("#!/bin/sh\necho first >&2\necho 'no display' >&2\nexit 1\n")
    browser.chmod(0o755)
    with pytest.raises(InputError, match=r"^broken could not draw page\.html: no display$"):
        figures.photograph(str(browser), tmp_path / "page.html", tmp_path / "page.png", 100)


def test_of_several_runs_that_of_most_work_is_drawn_then_with_enough_seeds_then_the_newest():
    def last(**about):
        return record("01_data_prep", "last_items", metrics={"last_item_by_tie_rule_share": 0.5}, **about)

    old, new = last(label="l4", time="2026-01-01"), last(time="2026-01-02")
    long = last(profile="grid", label="t4", time="2026-01-01")
    assert figures.main_figures([]) == {}
    assert figures.main_figures([new, old]) == {"last_items": [new]}
    assert figures.main_figures([new, old, long]) == {"last_items": [long]}
    runs = [
        compared("causal", 0.1, seeds=seeds, reference_seeds=reference)
        | {"label": label, "time": f"2026-01-0{day}", "profile": "quick"}
        for label, day, seeds, reference in (("cpu", 1, 3, 3), ("l4", 2, 1, 1), ("t4", 3, 3, 2))
    ]
    assert figures.main_figures(runs[::-1]) == {"comparison": [runs[0]]}
