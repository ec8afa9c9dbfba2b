"""Downloads against a server on this machine; every archive and every file is made here."""

import gzip
import hashlib
import http.server
import io
import json
import pickle
import shutil
import stat
import subprocess
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import python, refused

from reclib.config import DataConfig
from reclib.data import fetch, formats
from reclib.data.prepare import data_main, prepare

RATINGS = b"1::10::5::978300760\n" * 500
MOVIES = b"10::A film (1995)::Drama\n"
REVIEWS = gzip.compress(b'{"reviewerID": "A", "asin": "B", "overall": 5.0, "unixReviewTime": 1}\n' * 400)


def zip_of(members: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return held.getvalue()


FILMS = zip_of({"films/movies.dat": MOVIES, "films/ratings.dat": RATINGS, "films/README": b"terms"})
UNPACKED = ["films.zip", "films/movies.dat", "films/ratings.dat", "films/received.json"]


class Server:
    """A server whose answer a test replaces; it keeps the paths of its requests."""

    def __init__(self) -> None:
        self.files = {"/films.zip": FILMS, "/Gadgets_5.json.gz": REVIEWS}
        self.paths: list[str] = []
        self.reply = self.whole
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.paths.append(self.path)
                server.reply(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def send(self, handler, content: bytes, length: int | None, **headers: str) -> None:
        """Send content under a length that may be another, or none."""
        handler.send_response(200)
        if length is not None:
            headers["Content-Length"] = str(length)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    def whole(self, handler, **headers: str) -> None:
        content = self.files.get(handler.path)
        if content is None:
            handler.send_error(404)
        else:
            self.send(handler, content, len(content), **headers)


@pytest.fixture
def server():
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def raw(server, tmp_path, monkeypatch) -> Path:
    """An empty data folder and a list of two small datasets; returns where raw files will be."""
    for name in ("RECLIB_MIRROR", "RECLIB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("RECLIB_ROOT", str(tmp_path))
    monkeypatch.setenv("RECLIB_DATA", str(tmp_path / "data"))
    (tmp_path / "params").mkdir()
    terms = {"licence": "For research; do not pass it on.", "citation": "A. Nobody, 2020", "format": "ml-1m"}
    terms |= {"checksum": None, "bytes": None}
    change_list(tmp_path, "films", **terms, address=f"{server.base}/films.zip", counts={"interactions": 500})
    members = ["films/ratings.dat", "films/movies.dat"]
    change_list(tmp_path, "films", checksum=sha256_of(FILMS), bytes=len(FILMS), members=members)
    address = f"{server.base}/Gadgets_5.json.gz"
    change_list(tmp_path, "gadgets", **terms, address=address, counts={"interactions": 400})
    return tmp_path / "data" / "raw"


def sha256_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def change_list(root: Path, name: str, **values: object) -> None:
    """Add an entry to the list of datasets, or change it."""
    file = root / "params" / "datasets.yaml"
    entries = yaml.safe_load(file.read_text()) if file.is_file() else {}
    entries[name] = entries.get(name, {}) | values
    file.write_text(yaml.safe_dump(entries, sort_keys=False))


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def test_a_zip_is_unpacked_its_terms_are_printed_and_it_is_not_fetched_again(raw, server, capsys):
    path = fetch.fetch("films")
    assert path == raw / "films" / "ratings.dat"
    assert path.read_bytes() == RATINGS
    assert files_in(raw) == UNPACKED
    printed = capsys.readouterr()
    assert printed.out == ""
    for text, is_there in (("do not pass it on", True), ("A. Nobody", True), ("it/s", False), ("B/s", False)):
        assert (text in printed.err) == is_there  # no progress bar where there is no terminal
    assert fetch.fetch("films") == path
    path.unlink()
    assert fetch.fetch("films").read_bytes() == RATINGS  # from the archive that was kept
    assert server.paths == ["/films.zip"]


def test_a_received_file_is_recorded(raw, server):
    path = fetch.fetch("gadgets")
    assert path.read_bytes() == REVIEWS
    digest = hashlib.sha256(REVIEWS).hexdigest()
    assert json.loads((raw / "gadgets" / "received.json").read_text()) == {
        "address": f"{server.base}/Gadgets_5.json.gz",
        "files": {"Gadgets_5.json.gz": {"bytes": len(REVIEWS), "sha256": digest}},
    }
    assert path.stat().st_mode & stat.S_IRGRP  # a data folder may be shared


def test_a_file_that_changed_since_is_refused_and_kept(raw, server):
    path = fetch.fetch("gadgets")
    path.write_bytes(REVIEWS[:-1] + b"x")  # same length
    assert fetch.fetched("gadgets") == path  # size alone: no content is read
    refused(r"Gadgets_5\.json\.gz is truncated or altered", fetch.fetch, "gadgets")
    path.write_bytes(REVIEWS[:-9])
    for call in (fetch.fetched, fetch.fetch):
        refused(f"has {len(REVIEWS) - 9:,} bytes, {len(REVIEWS):,} were rec", call, "gadgets")
    assert path.read_bytes() == REVIEWS[:-9]
    assert len(server.paths) == 1


def test_a_file_put_there_by_hand_is_taken(raw, server):
    (raw / "gadgets").mkdir(parents=True)
    by_hand = raw / "gadgets" / "Gadgets_5.json.gz"
    by_hand.write_bytes(b"anything")
    assert fetch.fetch("gadgets") == fetch.fetched("gadgets") == by_hand
    (raw / "films.zip").write_bytes(FILMS)
    assert fetch.fetch("films").read_bytes() == RATINGS
    assert server.paths == []
    shutil.rmtree(raw / "films")
    (raw / "films.zip").write_bytes(zip_of({"films/ratings.dat": b"other", "films/movies.dat": b""}))
    refused(r"films\.zip is truncated or altered", fetch.fetch, "films")
    assert not (raw / "films").exists()


def test_a_failed_download_is_one_clear_error_and_leaves_nothing(raw, server):
    for name, content, length, problem in (
        ("films", FILMS[: len(FILMS) // 2], 5 * len(FILMS), "the connection broke off"),
        ("gadgets", REVIEWS[: len(REVIEWS) // 2], None, "ended before"),  # of no stated length
        ("films", FILMS[:60] + b"??" + FILMS[62:], len(FILMS), "is truncated or altered"),
        ("gadgets", b"<html>Please log in</html>", None, r"no \.gz file: it begins with b'<html>Please"),
        ("films", b"", 0, "truncated or altered"),
    ):
        server.reply = partial(server.send, content=content, length=length)
        message, entry = refused(problem, fetch.fetch, name), fetch.known(name)
        target = raw / ("films.zip" if name == "films" else "gadgets/Gadgets_5.json.gz")
        assert entry.address in message
        assert f"put a whole {entry.file} at {target}" in message
        assert files_in(raw) == []
        assert fetch.fetched(name) is None
    server.reply = server.whole
    assert fetch.fetch("films").is_file()  # a later try is not hindered


def test_a_silent_server_is_not_waited_for_endlessly(raw, server, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT_SECONDS", 0.2)
    go_on = threading.Event()

    def silent(handler):
        server.send(handler, FILMS[:100], len(FILMS))
        go_on.wait(10)

    server.reply = silent
    refused("timed out", fetch.fetch, "films")
    go_on.set()
    assert files_in(raw) == []


def test_servers_that_redirect_or_call_gz_an_encoding(raw, server):
    def redirect(handler):
        if handler.path.startswith("/elsewhere"):
            handler.path = handler.path.removeprefix("/elsewhere")
            server.whole(handler, Content_Encoding="gzip")
        else:
            handler.send_response(302)
            handler.send_header("Location", f"/elsewhere{handler.path}")
            handler.end_headers()
            handler.close_connection = True

    server.reply = redirect
    assert fetch.fetch("gadgets").read_bytes() == REVIEWS
    assert server.paths == ["/Gadgets_5.json.gz", "/elsewhere/Gadgets_5.json.gz"]


def test_no_server_and_no_connection(raw, server, tmp_path, monkeypatch):
    change_list(tmp_path, "films", address="http://127.0.0.1:9/films.zip")
    refused(r"127\.0\.0\.1:9/films\.zip: .*refused.* put a whole films\.zip at", fetch.fetch, "films")
    assert files_in(raw) == []
    monkeypatch.setenv("RECLIB_OFFLINE", "1")
    refused("RECLIB_OFFLINE is set", fetch.fetch, "gadgets")
    assert server.paths == []


def test_a_mirror_may_be_an_address_or_a_folder(raw, server, tmp_path, monkeypatch):
    server.files = {f"/mirror{path}": content for path, content in server.files.items()}
    monkeypatch.setenv("RECLIB_MIRROR", f"{server.base}/mirror/")
    assert fetch.fetch("gadgets").read_bytes() == REVIEWS
    assert server.paths == ["/mirror/Gadgets_5.json.gz"]
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "films.zip").write_bytes(FILMS)
    monkeypatch.setenv("RECLIB_MIRROR", str(tmp_path / "disk"))
    monkeypatch.setenv("RECLIB_OFFLINE", "1")  # a folder needs no connection
    assert fetch.fetch("films").read_bytes() == RATINGS
    shutil.rmtree(raw)
    refused("No such file", fetch.fetch, "gadgets")


def test_names_that_leave_the_folder_are_not_written(raw, server, tmp_path):
    members = {"films/ratings.dat": RATINGS, "films/movies.dat": MOVIES}
    outside = ["../evil", "films/../../evil", "/tmp/reclib-evil", "..\\evil", "C:\\evil"]
    server.files["/films.zip"] = zip_of(members | dict.fromkeys(outside, b"written outside"))
    change_list(tmp_path, "films", checksum=sha256_of(server.files["/films.zip"]))
    fetch.fetch("films")
    assert files_in(raw) == UNPACKED
    assert not [p for p in tmp_path.rglob("*evil*")]
    assert not Path("/tmp/reclib-evil").exists()


def test_members_that_are_refused(tmp_path):
    link = zipfile.ZipInfo("a/b")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for member, size, problem in (
        (link, 11, "a/b is a symbolic link"),
        ("a/b", 2000, "a/b has 2,000 bytes, more than 1,999"),
        ("a/c", 0, "holds no a/b"),
    ):
        path = tmp_path / f"{size}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, bytes(size))
        refused(problem, fetch.unpack, path, ("a/b",), tmp_path, max_bytes=1999)
        assert not (tmp_path / "b").exists()
    large = tmp_path / "2000.zip"  # declares a smaller size in its central directory, 24 bytes into the entry
    content = large.read_bytes()
    place = content.index(b"PK\x01\x02") + 24
    large.write_bytes(content[:place] + (100).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(zipfile.BadZipFile):
        fetch.unpack(large, ("a/b",), tmp_path)
    assert (tmp_path / "b").stat().st_size <= 100


def test_a_full_disk_leaves_nothing(raw, server, monkeypatch):
    usage = fetch.shutil.disk_usage(Path.cwd())
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage._replace(free=10))
    refused(r"it needs 0\.0 MB, .* has 0\.0 MB free", fetch.fetch, "films")
    assert server.paths == []
    assert files_in(raw) == []


def test_a_pickled_table_becomes_csv_and_nothing_in_it_is_run(raw, server, tmp_path):
    T = 1577836800  # 2020-01-01
    tables = {
        "user2item.pkl": pd.DataFrame({"UserID": [7], "ItemID": [[2, 1]], "Timestamp": [[T, T + 1]]}),
        "item2title.pkl": pd.DataFrame({"ItemID": [1, 2], "Title": ["One, first", "Two"]}, dtype=object),
    }
    for table in tables.values():
        table.columns = table.columns.astype(object)

    def serve(content: dict[str, bytes]) -> None:
        server.files["/films.zip"] = zip_of(content)
        changes = {"kept_as": "sample.zip", "members": list(tables), "format": "table"}
        change_list(tmp_path, "films", checksum=sha256_of(server.files["/films.zip"]), **changes)

    serve({name: pickle.dumps(table) for name, table in tables.items()})
    path = fetch.fetch("films")
    assert path.read_text() == f"UserID,ItemID,Timestamp\n7,2,{T}\n7,1,{T + 1}\n"
    tables_as_csv = ["films/item2title.csv", "films/received.json", "films/user2item.csv"]
    assert files_in(raw) == [*tables_as_csv, "sample.zip"]
    dataset = prepare(DataConfig(dataset="films", min_user=1, min_item=1))
    assert (dataset.items.tolist(), dataset.title(1), dataset.title(2)) == ([2, 1], "One, first", "Two")
    shutil.rmtree(raw)
    serve(dict.fromkeys(tables, pickle.dumps(subprocess.run)))
    refused(r"a table holds subprocess\.run", fetch.fetch, "films")


def test_two_processes_at_once(raw, server):
    both = threading.Barrier(2, timeout=30)

    def together(handler):
        both.wait()  # neither is answered before both requests are there
        server.whole(handler)

    server.reply = together
    code = "from reclib.data import fetch; print(fetch.fetch('films'))"
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(python, ["-c"] * 2, [code] * 2))
    assert [process.stdout.strip() for process in done] == [str(raw / "films" / "ratings.dat")] * 2
    assert files_in(raw) == UNPACKED
    assert fetch.fetch("films").read_bytes() == RATINGS


def test_unknown_names_and_wrong_entries_are_refused(raw, tmp_path):
    for call in (fetch.fetch, fetch.fetched, fetch.not_fetched):
        refused(r"'film' \(did you mean 'films'\?\); there are films, gadgets", call, "film")
    change_list(tmp_path, "films", sha256="x")
    refused("unknown parameter 'sha256'", fetch.catalogue)


def test_a_fetched_dataset_is_prepared_and_compared_with_published_counts(raw, tmp_path, capsys):
    counts = {"interactions": 500, "users": 2}
    change_list(tmp_path, "films", counts=counts)
    config = DataConfig(dataset="films", min_user=1, min_item=1)
    refused("python -m reclib data fetch films", prepare, config)
    fetch.fetch("films")
    dataset = prepare(config)
    assert (dataset.name, dataset.num_interactions, dataset.title(1)) == ("films", 500, "A film (1995)")
    origin = {"published_counts": counts, "origin": fetch.known("films").address}
    assert origin.items() <= dataset.manifest["source"].items()
    assert data_main(["prepare", "films", "--min-user", "1", "--min-item", "1"]) == 0
    printed = capsys.readouterr().out
    assert "interactions of the source: 500, as published" in printed
    assert "users of the source: 1, but 2 are published" in printed


def test_command_line(raw, tmp_path, capsys):
    for options, folder in (([], raw), (["--folder", str(tmp_path / "other")], tmp_path / "other")):
        assert data_main(["fetch", "gadgets", *options]) == 0
        assert capsys.readouterr().out == f"{folder / 'gadgets' / 'Gadgets_5.json.gz'}\n"
        assert (folder / "gadgets" / "Gadgets_5.json.gz").is_file()
    assert data_main(["fetch", "--list"]) == 0
    words = [line.split() for line in capsys.readouterr().out.splitlines()[::2]]
    assert [line[0] for line in words] == ["films", "gadgets"]
    assert ["not" in line[-2:] for line in words] == [True, False]
    for arguments, problem in (([], "which dataset"), (["nothing"], "no dataset is called 'nothing'")):
        assert data_main(["fetch", *arguments]) == 2
        assert problem in capsys.readouterr().err


def test_the_list_is_complete(monkeypatch, tmp_path):
    monkeypatch.setenv("RECLIB_ROOT", str(tmp_path))  # where there is none
    entries = fetch.catalogue()
    files = [entry.file for entry in entries.values()]
    assert len(set(files)) == len(files)  # a mirror holds them side by side
    for name, entry in entries.items():
        is_sample = name.endswith("-sample")
        assert entry.address.startswith(("https://", "http://")), name
        assert {"interactions"} <= set(entry.counts) <= {"interactions", "users", "items"}, name
        assert entry.format in formats.FORMATS, name
        assert len(entry.licence) > 40, name
        assert bool(entry.members) == (entry.file.endswith(".zip")), name
        assert bool(entry.checksum) == (name.startswith("ml-") or is_sample), name
        assert ("A sample, not the whole" in entry.licence) == is_sample
