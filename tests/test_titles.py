import gzip
import json

import pytest
from test_formats import SAMPLES

from reclib.config import InputError
from reclib.data import formats


@pytest.mark.parametrize(
    ("data", "side"),
    [
        ("u.data", "u.item"),
        ("u.data.gz", "u.item.gz"),
        ("ratings.dat", "movies.dat"),
        ("ratings.csv.gz", "movies.csv"),
        ("own.inter", "own.item"),
        ("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"),
        ("ratings_Beauty.csv", "meta_Beauty.json"),
        ("Beauty_5.json.gz", "meta_Beauty.json.gz"),
        ("All_Beauty.jsonl.gz", "meta_All_Beauty.jsonl.gz"),
    ],
)
def test_where_titles_lie(tmp_path, data, side):
    (tmp_path / data).touch()
    (tmp_path / "meta_Other.json").touch()
    assert formats.titles_beside(tmp_path / data) is None
    (tmp_path / side).touch()
    assert formats.titles_beside(tmp_path / data) == tmp_path / side


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("u.item", "1|Café (1995)|x\n2|Other|y\n".encode("latin-1"), "Café (1995)"),
        ("movies.dat", "1::Café (1995)::Drama\n2::Other::x\n".encode("latin-1"), "Café (1995)"),
        ("movies.dat", "1::Café (1995)::Drama\n2::Amélie::x\n".encode(), "Café (1995)"),
        (
            "movies.csv",
            'movieId,title,genres\r\n1,"Café, The (1995)",x\r\n2,O,y\r\n'.encode(),
            "Café, The (1995)",
        ),
        ("x.item", b"item_id:token\ttitle:token_seq\n1\tCaf\n2\tO\n", "Caf"),
        (
            "meta_X.jsonl",
            json.dumps({"parent_asin": "1", "title": "A\nB", "x": [1]}).encode() + b"\nbroken\n",
            "A B",
        ),
        ("meta_X.json", json.dumps({"asin": "1", "title": "Old"}).encode() + b"\n", "Old"),
        ("meta_X.json", b"{'asin': '1', 'title': \"It's\", 'price': 3.5}\n{'asin': '2'}\n", "It's"),
    ],
)
def test_titles_of_the_items_that_are_asked_for(tmp_path, name, data, expected):
    for path, content in ((tmp_path / name, data), (tmp_path / f"{name}.gz", gzip.compress(data))):
        path.write_bytes(content)
        assert formats.read_titles(path, ["1", "9"]) == {"1": expected}
        assert formats.read_titles(path, set()) == {}


def test_a_short_line_is_told(tmp_path):
    path = tmp_path / "u.item"
    path.write_text("1|Toy Story|x\n2|Golden\n")
    with pytest.raises(InputError, match=r"u\.item, line 2: expected '\|'-separated item, title"):
        formats.read_titles(path, ["1"])


def test_recbole_spelling_of_unknown(tmp_path):
    path = tmp_path / "ml-100k.item"
    path.write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\n"
        "1\tToy Story\t1995\n267\tunkonwn\tunkonwn\n1412\tLand (1995)\tV\n"
    )
    expected = {"1": "Toy Story (1995)", "267": "unknown", "1412": "Land (1995) (V)"}
    assert formats.read_titles(path, set(expected)) == expected


@pytest.mark.parametrize(
    ("name", "items", "title"),
    [
        ("ml-100k/u.item.gz", 1682, "Toy Story (1995)"),
        ("ml-1m/movies.dat.gz", 3883, "Toy Story (1995)"),
        ("ml-latest-small-2018/movies.csv.gz", 9742, "Toy Story (1995)"),
    ],
)
def test_real_titles(name, items, title):
    path = SAMPLES / name
    if not path.is_file():
        pytest.skip(f"no sample of a real file at {path}")
    found = formats.read_titles(path, {str(n) for n in range(200_000)})
    assert len(found) == items
    assert found["1"] == title
