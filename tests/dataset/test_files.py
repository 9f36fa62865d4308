"""The files of a source: every format and compression, globs, URLs, pins, and what is refused."""

import gzip
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY

from capas.core.dag import read_yaml
from capas.core.errors import CapasError
from capas.dataset.files import expand, url_revision
from capas.dataset.flaws import Flaw
from capas.dataset.readers import read_rows
from capas.dataset.rows import Row
from capas.dataset.text import Reading

FOUND = read_yaml(REPOSITORY / "conf/dataset/_base.yaml")["reading"]
ROWS = [
    {"question": "¿Qué?\n\n'a', \"b\"", "answer": "Sí; 1,5"},
    {"question": "two\r\nlines", "answer": "a\tb"},
    {"question": "é" * 3000, "answer": "z"},
]


def as_csv(rows: list[dict[str, str]], comma: str = ",") -> bytes:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [comma.join(rows[0]), *(comma.join(cell(v) for v in row.values()) for row in rows)]
    return ("\ufeff" + "\r\n".join(lines) + "\r\n").encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue().to_pybytes())


FORMATS: dict[str, tuple[str, Callable[[list[dict[str, str]]], bytes]]] = {
    ".json": ("json", lambda rows: json.dumps(rows, indent=1, ensure_ascii=False).encode()),
    ".jsonl": ("json", lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    ".csv": ("csv", as_csv),
    ".tsv": ("csv", lambda rows: as_csv(rows, "\t")),
    ".parquet": ("parquet", as_parquet),
}
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: bytes(pa.compress(content, "zstd", asbytes=True)),
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "data/own"
    folder.mkdir(parents=True)
    return folder


def read(root: Path, path: str, *names: str, **stated: Any) -> list[Row]:
    files = expand(list(names), path, root)
    return [row for file in files for row in read_rows(file, Reading(**{**FOUND, **stated}))]


def put(own: Path, name: str, content: bytes | str) -> str:
    (own / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"data/own/{name}"


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", [s for s in FORMATS if s != ".parquet"])
def test_every_format_and_compression_gives_the_same_rows(
    own: Path, tmp_path: Path, suffix: str, packed: str
) -> None:
    path, write = FORMATS[suffix]
    name = put(own, f"x{suffix}{packed}", PACK[packed](write(ROWS)))
    assert [row.value for row in read(tmp_path, path, name)] == ROWS


def test_parquet_gives_the_same_rows_and_is_not_packed_twice(own: Path, tmp_path: Path) -> None:
    name = put(own, "x.parquet", as_parquet(ROWS))
    rows = read(tmp_path, "parquet", name)
    assert [row.value for row in rows] == ROWS
    assert rows[2].place == {"file": name, "at": "record 3"}
    with pytest.raises(CapasError, match="parquet is compressed internally"):
        read(tmp_path, "parquet", put(own, "y.parquet.gz", gzip.compress(as_parquet(ROWS))))


def test_keys_that_arrow_took_from_other_rows_are_left_out(own: Path, tmp_path: Path) -> None:
    rows = [{"call": {"city": "Paris"}, "x": None}, {"call": {"zip": "1"}, "x": "y"}]
    name = put(own, "x.parquet", as_parquet(rows))
    assert pq.read_table(own / "x.parquet")["call"][0].as_py() == {"city": "Paris", "zip": None}
    assert [row.value for row in read(tmp_path, "parquet", name)] == rows


def test_a_row_is_placed_by_its_first_line(own: Path, tmp_path: Path) -> None:
    rows = read(tmp_path, "csv", put(own, "x.csv", 'a,b\n"1\n2",3\n\n4,5\n'))
    assert [row.place["at"] for row in rows] == ["line 2", "line 5"]
    rows = read(tmp_path, "json", put(own, "x.jsonl", '{"a": 1}\n\n{"a": 2}'))
    assert [row.place["at"] for row in rows] == ["line 1", "line 3"]


def test_documents_of_a_text_are_separated_by_empty_lines(own: Path, tmp_path: Path) -> None:
    name = put(own, "x.txt", "\n one\ntwo \n\n  \nthree\r\n\r\nfour")
    rows = read(tmp_path, "text", name, documents="blank_lines")
    assert [row.value["text"] for row in rows] == [" one\ntwo ", "three", "four"]
    assert [row.number for row in rows] == [2, 6, 8]


def test_the_hash_is_of_the_whole_packed_file(own: Path, tmp_path: Path) -> None:
    import hashlib

    content = gzip.compress(b'{"a": 1}\n') + b"" + gzip.compress(b'{"a": 2}\n')
    [file] = expand([put(own, "x.jsonl.gz", content)], "json", tmp_path)
    assert [row.value for row in read_rows(file, Reading(**FOUND))] == [{"a": 1}, {"a": 2}]
    found = file.facts()
    assert found["sha256"] == hashlib.sha256(content).hexdigest()
    assert found["bytes"] == len(content)


def test_an_array_larger_than_the_buffer_is_read_in_pieces(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capas.dataset.arrays._CHUNK_CHARS", 7)
    name = put(own, "x.json", json.dumps(ROWS, ensure_ascii=False))
    assert [row.value for row in read(tmp_path, "json", name)] == ROWS


def test_objects_one_after_the_other_are_read_as_well(own: Path, tmp_path: Path) -> None:
    name = put(own, "x.json", '{"a": 1}\n{"a":\n 2}\n')
    assert [row.value for row in read(tmp_path, "json", name)] == [{"a": 1}, {"a": 2}]


CSVS: dict[str, tuple[bytes | str, dict[str, str]]] = {
    "CR alone": ("question,answer\rq1,a1\rq2,a2\r", {}),
    "semicolons, a comma in a name": ('"question";"answer"\n"q1";"a1"\n"q2";"a2"\n', {}),
    "a comma in a quoted name": ('question;answer;"n, m"\nq1;a1;\nq2;a2;\n', {}),
    "a semicolon in a name": ("question,answer,n;m\nq1,a1,\nq2,a2,\n", {}),
    "tabs": ("question\tanswer\nq1\ta1\nq2\ta2\n", {}),
    "bars": ("question|answer\nq1|a1\nq2|a2\n", {}),
    "Excel's first line": ("sep=;\r\nquestion;answer\r\nq1;a1\r\nq2;a2\r\n", {}),
    "blank first lines": ("\n  \nquestion,answer\nq1,a1\nq2,a2\n", {}),
    "an index of pandas": (",question,answer\n0,q1,a1\n1,q2,a2\n", {}),
    "single quotes": ("'question','answer'\n'q1','a1'\n'q2','a2'\n", {}),
    "UTF-16": ("question\tanswer\r\nq1\ta1\r\nq2\ta2\r\n".encode("utf-16"), {}),
    "UTF-16 without a mark": ("question,answer\nq1,a1\nq2,a2\n".encode("utf-16-be"), {}),
    "stated": ("question:answer\nq1:a1\nq2:a2\n", {"separator": ":"}),
    "stated encoding": ("question,answer\nq1,a1\nq2,a2\n".encode("cp037"), {"encoding": "cp037"}),
}


@pytest.mark.parametrize("name", CSVS)
def test_a_csv_is_read_as_it_was_written(own: Path, tmp_path: Path, name: str) -> None:
    content, stated = CSVS[name]
    rows = [row.value for row in read(tmp_path, "csv", put(own, "x.csv", content), **stated)]
    pairs = [{k: row[k] for k in ("question", "answer")} for row in rows]
    assert pairs == [{"question": f"q{n}", "answer": f"a{n}"} for n in (1, 2)]
    nameless = {"column 1 (without a name)": "0"} if "pandas" in name else {}
    assert {k: v for k, v in rows[0].items() if v and k not in pairs[0]} == nameless


def test_lines_are_counted_whatever_ends_them(own: Path, tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        text = end.join(["sep=,", "", "a,b", '"1', '2",3', "4,5", "6"])
        rows = read(tmp_path, "csv", put(own, "x.csv", text))
        assert [row.number for row in rows] == [4, 6, 7]
        assert isinstance(rows[2].value, Flaw)


def test_quotes_within_a_cell_are_doubled_or_behind_a_backslash(own: Path, tmp_path: Path) -> None:
    for cell, stated in (('""b""', {}), ('\\"b\\"', {}), ('\\"b\\"', {"escape": "\\"})):
        name = put(own, "x.csv", f'q,a\n"1","a {cell} c"\n"2","C:\\\\"\n')
        assert read(tmp_path, "csv", name, **stated)[0].value["a"] == 'a "b" c'


def test_what_excel_writes_is_read_and_said(
    own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = put(own, "x.csv", "año,€\n¿qué?,sí\n".encode("cp1252"))
    [file] = expand([name], "csv", tmp_path)
    assert [row.value for row in read_rows(file, Reading(**FOUND))] == [{"año": "¿qué?", "€": "sí"}]
    assert "data/own/x.csv is not UTF-8: read as cp1252" in caplog.text
    facts = {key: file.facts()[key] for key in ("encoding", "separator")}
    assert facts == {"encoding": "cp1252", "separator": ","}
    broken = put(own, "y.csv", "a,b\né,1\n".encode() + b"\xe9,2\n")  # UTF-8 but for one byte
    assert read(tmp_path, "csv", broken)[1].value == {"a": "\udce9", "b": "2"}


def test_records_may_lie_under_a_key(own: Path, tmp_path: Path) -> None:
    rows = [{"a": {"b": [1, "]"]}}, {"a": 2}]
    name = put(own, "x.json", json.dumps({"version": 1, "data": rows}))
    assert [row.value for row in read(tmp_path, "json", name)] == rows
    name = put(own, "x.json", json.dumps({"x": {"y": [{"z": 0}], "train": rows}, "test": [{}]}))
    assert [row.value for row in read(tmp_path, "json", name, records="x.train")] == rows
    with pytest.raises(CapasError, match=r"there is no key 'nix'.*there are x, test"):
        read(tmp_path, "json", name, records="nix")
    one = {"messages": [{"role": "user", "content": "Hi"}]}
    assert [r.value for r in read(tmp_path, "json", put(own, "y.json", json.dumps(one)))] == [one]


@pytest.mark.parametrize(
    ("name", "content", "stated"),
    [
        ("x.jsonl.gz", gzip.compress(b"{}\n" + b" " * 2_000_000), {}),
        ("x.jsonl.zst", PACK[".zst"](b"{}\n" + b" " * 2_000_000), {}),
        ("x.csv.gz", gzip.compress(b"a,b\n1,2\n" + b'"' + b"\n" * 2_000_000), {}),
        ("x.json.gz", gzip.compress(b'[{}, {"a": "' + b" " * 2_000_000), {}),
        ("x.txt.gz", gzip.compress(b"a" * 2_000_000), {}),
        ("x.txt.gz", gzip.compress(b"a\n" * 2_000_000), {"documents": "blank_lines"}),
    ],
)
def test_a_record_that_would_fill_the_memory_is_refused(
    own: Path, tmp_path: Path, name: str, content: bytes, stated: dict[str, str]
) -> None:
    path = {"t": "text", "c": "csv"}.get(name[2], "json")
    message = rf"data/own/{name}, (line|record) \d.*max_record_characters=1000"
    with pytest.raises(CapasError, match=message):
        read(tmp_path, path, put(own, name, content), max_record_characters=1000, **stated)


def test_a_text_file_is_one_record_or_cut_at_paragraphs(own: Path, tmp_path: Path) -> None:
    text = "one\n1\n\ntwo\n\n\n" + "three " * 9 + "\n\nfour\n"
    name = put(own, "x.txt", text)
    assert [row.value["text"] for row in read(tmp_path, "text", name)] == [text.rstrip("\n")]
    rows = read(tmp_path, "text", name, max_characters=12)
    assert [row.value["text"] for row in rows] == ["one\n1\n\ntwo", "three " * 9, "four"]
    assert [row.number for row in rows] == [1, 7, 9]


def test_a_cell_of_parquet_that_is_no_text_is_a_flaw(own: Path, tmp_path: Path) -> None:
    latin = pa.array([b"good", "señ".encode("latin-1")], pa.binary())
    inner = pa.StructArray.from_arrays([latin.view(pa.string())], ["text"])
    far = pa.array([0, 2**50], pa.timestamp("s"))
    columns = {"q": latin.view(pa.string()), "m": inner, "t": far}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    name = put(own, "x.parquet", sink.getvalue().to_pybytes())
    [file] = expand([name], "parquet", tmp_path)
    rows = list(read_rows(file, Reading(**FOUND), lambda there: ["q", "m"]))
    assert rows[1].value == {"q": "se\udcf1", "m": {"text": "se\udcf1"}}
    assert file.unread == {"t": 2}
    [first, flaw] = read(tmp_path, "parquet", name)
    assert first.value["q"] == "good"
    assert (flaw.number, flaw.value.field) == (2, "t")


def test_semicolons_separate_where_the_first_line_has_no_comma(own: Path, tmp_path: Path) -> None:
    name = put(own, "x.csv", "pregunta;respuesta\n¿a, b?;1,5\n")
    assert read(tmp_path, "csv", name)[0].value == {"pregunta": "¿a, b?", "respuesta": "1,5"}


@pytest.mark.parametrize(
    ("name", "content", "at", "text"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', "line 2", "not JSON: Expecting value at character"),
        ("x.jsonl", "[" * 100_000, "line 1", "not JSON"),
        ("x.jsonl", '{"a": "b', "line 1", "not JSON: Unterminated string starting at character 7"),
        ("x.csv", "a,b\n1,2\n3\n", "line 3", "the row has 1 cells but the header 2 columns"),
        ("x.csv", "a,b\n1,2\n3,4,5\n", "line 3", "the row has 3 cells but the header 2 columns"),
        ("x.csv", 'a,b\n1,"2\n3\n', "line 2", "not CSV: unexpected end of data"),
        ("x.csv", 'a,b\n1,"2"x\n3,4\n', "line 2", "not CSV: ',' expected after"),
    ],
)
def test_a_broken_row_is_a_flaw_with_its_place(
    own: Path, tmp_path: Path, name: str, content: str, at: str, text: str
) -> None:
    rows = read(tmp_path, "csv" if "csv" in name else "json", put(own, name, content))
    [broken] = [row for row in rows if isinstance(row.value, Flaw)]
    assert broken.place["at"] == at
    assert text in broken.value.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "", "is empty"),
        ("x.json", '[{"a": 1}, {"a"', r"record 2 is not JSON.*Fix the file"),
        ("x.json", '[{"a": 1}', "is truncated: it ends inside its array, after record 1"),
        ("x.json", '[{"a": 1}] x', "has text after the end of its array: 'x'"),
        ("x.csv", "", "is empty; its first line must name the columns"),
        ("x.csv", "a,b,a\n", "line 1: column names must be unique.*'a'"),
        ("x.csv", "año".encode() + b",\xe9\n", "line 1: .* is not UTF-8; save the file"),
        ("x.csv", b"PK\x03\x04xl/", "is a ZIP archive or an Excel workbook; save its table as CSV"),
        (
            "x.csv",
            "question,answer;x\n",
            "line 1: .* is ambiguous: a comma or a semicolon. Set",
        ),
        ("x.csv", '"a,b\n', "line 1: .*cannot be parsed: unexpected end of data"),
        ("x.csv", ";;\n1;2;3\n", "line 1: .*has no column names"),
        (
            "x.jsonl",
            "{}".encode("utf-16")[:-1],
            "cannot be read as utf-16: .*dataset.reading.encoding",
        ),
        (
            "x.json",
            '{"a": [{"q": 1}], "b": [{"q": 2}]}',
            "several lists of objects: a \\(1\\), b \\(1\\)",
        ),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12], "cannot be read"),
        ("x.jsonl.zst", b"not zstd", "cannot be read"),
        ("x.parquet", b"not parquet", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(
    own: Path, tmp_path: Path, name: str, content: bytes | str, message: str
) -> None:
    path = {"c": "csv", "p": "parquet"}.get(name[2], "json")
    with pytest.raises(CapasError, match=rf"data/own/{name}.*{message}"):
        read(tmp_path, path, put(own, name, content))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("data/own/none.jsonl", "none.jsonl matches no file"),
        ("data/own/*.none", "matches no file"),
        ("/etc/passwd", "is outside data/own.*ln -s"),
        ("data/own/../x.jsonl", "is outside data/own"),
        ("mine.jsonl", "is outside data/own"),
        ("data/own/linked/x.jsonl", "data/own/linked is a link to a folder"),
        ("data/own/*/x.jsonl", "data/own/linked is a link to a folder"),
        ("data/own/folder", "is a folder; name its files"),
        ("data/own/x.csv", "dataset.path=json, but data/own/x.csv.*set dataset.path=csv"),
        ("data/own/x.docx", r"named .docx; known: .json, .jsonl"),
        ("https://user:secret@host/x.jsonl", "a URL contains a password"),
        ("nowhere://x.jsonl", "cannot be opened: Protocol not known"),
    ],
)
def test_a_file_that_is_not_there_or_not_meant_is_refused(
    own: Path, tmp_path: Path, pattern: str, message: str
) -> None:
    (own / "folder").mkdir()
    (tmp_path / "elsewhere").mkdir()
    put(tmp_path / "elsewhere", "x.jsonl", "{}")
    (own / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("x.csv", "x.docx"):
        put(own, name, "a,b\n")
    with pytest.raises(CapasError, match=message) as refusal:
        read(tmp_path, "json", pattern)
    assert "secret" not in str(refusal.value)


def test_files_are_taken_sorted_and_once_and_links_are_followed(own: Path, tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c [1].jsonl"):
        put(own, name, json.dumps({"from": name}))
    (tmp_path / "elsewhere.jsonl").write_text('{"from": "link"}')
    (own / "d.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    rows = read(tmp_path, "json", "data/own/c [1].jsonl", "data/own/*.jsonl")
    found = [row.value["from"] for row in rows]
    assert found == ["c [1].jsonl", "a.jsonl", "b.jsonl", "link"]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder that a server on this machine gives out, with ETags."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_url_is_read_and_pinned_by_its_content(web: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = web
    (folder / "x.csv.gz").write_bytes(gzip.compress(as_csv(ROWS)))
    url = f"{address}/x.csv.gz"
    assert [row.value for row in read(tmp_path, "csv", url)] == ROWS
    pin = url_revision(url)
    assert pin == url_revision([url]) == url_revision({"train": url})
    assert len(pin) == 16
    (folder / "x.csv.gz").write_bytes(gzip.compress(as_csv(ROWS[:2])))
    fsspec.filesystem("http").invalidate_cache()
    assert url_revision(url) != pin


def test_parquet_behind_a_url_is_read(web: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = web
    (folder / "x.parquet").write_bytes(as_parquet(ROWS))
    assert [row.value for row in read(tmp_path, "parquet", f"{address}/x.parquet")] == ROWS


def test_a_url_that_is_not_there_is_an_error(web: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(CapasError, match=r"none\.csv cannot be read: .*FileNotFound"):
        read(tmp_path, "csv", f"{web[1]}/none.csv")
    with pytest.raises(CapasError, match="cannot be read"):
        url_revision("http://127.0.0.1:9/x.csv")


def test_files_in_memory_are_found_by_a_pattern(tmp_path: Path) -> None:
    with fsspec.open("memory://pool/a.jsonl", "wb") as file:
        file.write(b'{"a": 1}\n')
    assert [row.value for row in read(tmp_path, "json", "memory://pool/*.jsonl")] == [{"a": 1}]
    pin = url_revision("memory://pool/a.jsonl")
    with fsspec.open("memory://pool/a.jsonl", "wb") as file:
        file.write(b'{"a": 2}\n')
    assert url_revision("memory://pool/a.jsonl") != pin


def test_s3_is_read_through_a_local_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in {**settings, **keys}.items():
        monkeypatch.setenv(name, value)
    try:
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir("records")
        fs.pipe("records/a.jsonl.zst", PACK[".zst"](FORMATS[".jsonl"][1](ROWS)))
        assert [r.value for r in read(tmp_path, "json", "s3://records/*.zst")] == ROWS
        pin = url_revision("s3://records/a.jsonl.zst")
        fs.pipe("records/a.jsonl.zst", PACK[".zst"](b"{}"))
        assert url_revision("s3://records/a.jsonl.zst") != pin
    finally:
        server.stop()
