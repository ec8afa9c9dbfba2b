import gzip
import json

import pytest

from reclib import system
from reclib.config import InputError
from reclib.data import formats

SAMPLES = system.root().parent / "shared" / "data"
REVIEW = '{"reviewerID": "A2IBPI20UZIR0U", "asin": "1384719342", "overall": 5.0, "unixReviewTime": 1393545600'
REVIEW_2023 = (
    '{"user_id": "AE", "parent_asin": "B0", "asin": "B1", "rating": 5.0, "timestamp": 1602133857705}'
)
USERS = ["A2IBPI20UZIR0U", "AKM1MP6P0OYPR", "A14VAT5EAX3D9S"]
ITEMS = ["1384719342", "B00005N7P0", "013279304X"]

CONTENTS = {
    "ml-100k": "196\t242\t3\t881250949\n186\t302\t3\t891717742\n",
    "ml-1m": "1::1193::5::978300760\n1::661::3::978302109\n",
    "movielens-csv": "userId,movieId,rating,timestamp\r\n1,1,4.0,964982703\r\n",
    "amazon-2014-json": REVIEW + ', "helpful": [0, 0]}\n',
    "amazon-2018-json": REVIEW + ', "verified": true}\n',
    "amazon-2023-json": REVIEW_2023 + "\n",
    "amazon-2014-csv": "".join(f"{u},{i},5.0,1365811200\n" for u, i in zip(USERS, ITEMS, strict=True)),
    "amazon-2018-csv": "".join(f"{i},{u},5.0,1365811200\n" for u, i in zip(USERS, ITEMS, strict=True)),
    "amazon-2023-csv": "user_id,parent_asin,rating,timestamp\nAE,B0,5.0,1547589356557\n",
    "inter": "user_id:token\titem_id:token\ttimestamp:float\n1\t2\t881250949\n",
    "user-per-line": "1 5 6 7\n2 5\n",
    "pair-per-line": "1 5\n1 6\n2 5\n",
    "table": "customer;product;when\nme;it;964982703\n",
}


def test_what_is_not_clear_is_asked_for(tmp_path):
    whose = "does not show which column is the user's"
    both = CONTENTS["amazon-2014-csv"] + CONTENTS["amazon-2018-csv"]
    for text, problem in (
        ("1384719342,B00005N7P0,5.0,1365811200\n", "amazon-2014-csv .USER,ITEM,.*, amazon-2018-csv"),
        (both, whose),
        ("1 5\n2 6\n3 5\n", "every line has two fields and no user has two lines.*give format"),
        ("1 5 6\n1 7 8\n", "format was not recognised .line 1: '1 5 6'"),
        ("{'asin': '1'}\n", "line 1: .*a Python dictionary is none"),
        ("1 1318896000 1318896000\n2 1318896000\n", "holds the times of Beauty_item_org_rank.txt"),
        ("1\t2\t1400457600\n", f"{whose}.*user=1,item=2,time=3"),
    ):
        path = tmp_path / ("Beauty_time_org_rank.txt" if "times" in problem else "file")
        path.write_text(text)
        with pytest.raises(InputError, match=f"^{path.name}.*{problem}.*$"):
            formats.detect(path)


def test_a_named_format_is_taken_and_a_wrong_name_is_told(tmp_path):
    path = tmp_path / "file"
    path.write_text("1 5\n2 6\n")
    assert formats.named("pair-per-line", path).name == "pair-per-line"
    assert formats.named("auto", path, {"user": "1"}).name == "table"
    with pytest.raises(InputError, match="'ml-10m', expected auto or one of ml-100k, ml-1m"):
        formats.named("ml-10m", path)
    with pytest.raises(InputError, match="'columns' is for format='table', and format is 'inter'"):
        formats.named("inter", path, {"user": "1"})


# ---- titles -------------------------------------------------------------------------------------------


def test_where_titles_lie(tmp_path):
    for data, side in (
        ("u.data.gz", "u.item.gz"),
        ("ratings.csv.gz", "movies.csv"),
        ("own.inter", "own.item"),
        ("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"),
        ("All_Beauty.jsonl.gz", "meta_All_Beauty.jsonl.gz"),
    ):
        folder = tmp_path / side
        folder.mkdir()
        (folder / data).touch()
        (folder / "meta_Other.json").touch()
        assert formats.titles_beside(folder / data) is None
        (folder / side).touch()
        assert formats.titles_beside(folder / data) == folder / side


def test_titles_of_the_wanted_items(tmp_path):
    cafe, films = "Café (1995)", "1::Café (1995)::Drama\n2::Other::x\n"
    csv = 'movieId,title,genres\r\n1,"Café, The (1995)",x\r\n2,O,y\r\n'
    product = json.dumps({"parent_asin": "1", "title": "A\nB", "x": [1]}) + "\nbroken\n"
    for name, data, expected in (
        ("u.item", "1|Café (1995)|x\n2|Other|y\n".encode("latin-1"), cafe),
        ("movies.dat", films.encode("latin-1"), cafe),
        ("movies.dat", films.replace("Other", "Amélie").encode(), cafe),
        ("movies.csv", csv.encode(), "Café, The (1995)"),
        ("x.item", b"item_id:token\ttitle:token_seq\n1\tCaf\n2\tO\n", "Caf"),
        ("meta_X.jsonl", product.encode(), "A B"),
        ("meta_X.json", json.dumps({"asin": "1", "title": "Old"}).encode() + b"\n", "Old"),
        ("meta_X.json", b"{'asin': '1', 'title': \"It's\", 'price': 3.5}\n{'asin': '2'}\n", "It's"),
    ):
        for path, content in ((tmp_path / name, data), (tmp_path / f"{name}.gz", gzip.compress(data))):
            path.write_bytes(content)
            assert formats.read_titles(path, ["1", "9"]) == {"1": expected}
            assert formats.read_titles(path, set()) == {}


def test_odd_lines_of_titles(tmp_path):
    path = tmp_path / "u.item"
    path.write_text("1|Toy Story|x\n2|Golden\n")
    with pytest.raises(InputError, match=r"u\.item, line 2: expected '\|'-separated item, title"):
        formats.read_titles(path, ["1"])
    path = tmp_path / "ml-100k.item"  # RecBole's spelling of unknown, and the year in a column apart
    path.write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\n"
        "1\tToy Story\t1995\n267\tunkonwn\tunkonwn\n1412\tLand (1995)\tV\n"
    )
    expected = {"1": "Toy Story (1995)", "267": "unknown", "1412": "Land (1995) (V)"}
    assert formats.read_titles(path, set(expected)) == expected
    path.write_text("item_id:token\ttitle:token_seq\n1\n")
    with pytest.raises(InputError, match=r"ml-100k\.item, line 2: 1 fields, expected 2"):
        formats.read_titles(path, ["1"])


def test_titles_of_variants_share_their_words():
    def same(first, second):
        return formats.product_of(first) == formats.product_of(second) != ()

    assert same("Tiffen 58mm UV Protection Filter", "Tiffen 62mm UV Protection Filter")
    assert same("Foscam Wi-Fi Camera (Black) 1.3 MP", "Foscam Wi-Fi Camera 1.3 MP - Sky Blue")
    assert same("Kingston 4 GB SDHC Card SD4/4GB", "Kingston 32 GB SDHC Card SD4/32GB")
    assert not same("Nikon DK-17M Magnifying Eyepiece", "Nikon DK-21M Magnifying Eyepiece")
    assert not same("Blank DVD-R media, 100 Pack", "Blank DVD+R media, 100 Pack")
    assert formats.product_of("Black Cable 6ft") == ()
