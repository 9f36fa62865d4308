"""`capas check`: what is said of a file before any stage runs, and its exit code."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from capas.__main__ import main
from capas.config.dataset_option import Option
from capas.core.errors import CapasError
from capas.dataset.proposal import propose_columns

REPOSITORY = Path(__file__).resolve().parents[2]
TOPICS = [f"{a}{b}{c}{d}" for a in "bdfgk" for b in "aeiou" for c in "lmnrt" for d in "aeiou"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the shipped conf/, and files beside it."""
    folder = tmp_path / "repository"
    shutil.copytree(REPOSITORY / "conf", folder / "conf")
    (folder / "data/own").mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def write_csv(
    file: Path, header: str = "Pregunta,Respuesta", rows: int = 100, more: str = ""
) -> Path:
    """Questions with no near-duplicates, and free answers."""
    lines = [f"¿Qué es {t} y {t[::-1]}?,Es una palabra que empieza con {t}." for t in TOPICS[:rows]]
    file.write_text("\n".join([header, *lines]) + "\n" + more, encoding="utf-8")
    return file


def test_a_good_file_is_ready_and_says_how_it_is_read(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_csv(tmp_path / "soporte.csv")
    assert main(["check", str(file)]) == 0
    said = capsys.readouterr().out
    assert "records     100 of 100 can be used" in said
    assert "user = Pregunta, assistant = Respuesta" in said
    assert "splits      train 75, validation 5, test 20" in said
    assert "20 test records: a difference below about 31 points cannot be shown" in said
    assert "metrics     chrf, rougeL (free text, 7 words in the median)" in said
    shown = said.partition("writes conf/own/dataset/soporte.yaml:\n")[2]
    assert said.index("\nready\n") < said.index(shown)
    assert yaml.safe_load(shown)["columns"] == {"user": "Pregunta", "assistant": "Respuesta"}
    assert "choose it in conf/config.yaml: - dataset: soporte " in said
    assert not any((root / "data/own").iterdir())
    assert main(["check", str(file), "--write"]) == 0
    written = (root / "conf/own/dataset/soporte.yaml").read_text()
    assert shown.startswith(written) and shown.removeprefix(written).startswith("# then choose it")


def test_a_classification_is_recognized(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        f"¿Qué es {t} y {t[::-1]}?,{'sí' if i % 4 else 'señal'}" for i, t in enumerate(TOPICS[:60])
    ]
    file = tmp_path / "correo.csv"
    file.write_text("\n".join(["texto,etiqueta", *lines]), encoding="utf-8")
    assert main(["check", str(file)]) == 0
    said = capsys.readouterr().out
    assert (
        'label_accuracy (2 labels ("señal", "sí"), the most frequent in 75% of the records)' in said
    )
    assert "a classification: use evaluation=labels, which compares the likelihoods" in said
    assert main(["check", str(write_csv(tmp_path / "soporte.csv"))]) == 0
    assert "a classification:" not in capsys.readouterr().out


def test_all_flaws_of_all_kinds_are_shown_with_file_and_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_csv(tmp_path / "a.csv", more="Nada,\nUno\n,Algo.\n")
    assert main(["check", str(file)]) == 1
    said = capsys.readouterr().out
    for line in (
        *("flaw        bad_row 1", f"  {file}, line 103: ['Uno']"),
        *("flaw        empty_answer 1", f"  {file}, line 102: Respuesta is ''"),
        *("flaw        empty_question 1", f"  {file}, line 104: Pregunta is ''"),
        "problem     fetch stops at 3 of 103 records: bad_row 1, empty_answer 1, empty_question 1",
        "not ready",
    ):
        assert line in said


def test_copies_and_leaks_are_counted(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"What is {t} {t[::-1]}?,Answer {t}." for t in TOPICS[:60]]
    leaks = [f"what is {t} {t[::-1]},Another {t}." for t in TOPICS[:60]]
    text = "\n".join(["question,answer", *lines, lines[0], *leaks])
    (root / "data/own/mine.csv").write_text(text)
    overrides = (
        "dataset=own_csv",
        "dataset.split_by=prompt",
        "dataset.near_duplicate_similarity=null",
    )
    assert main(["check", *overrides]) == 0
    said = capsys.readouterr().out
    assert "records     121 of 121 can be used" in said
    assert (
        "copies      1; the first: data/own/mine.csv, line 62 is data/own/mine.csv, line 2" in said
    )
    assert "dropped     duplicate 1" in said


def test_findings_as_json(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_csv(tmp_path / "a.csv", more="Nada,\n")
    assert main(["check", str(file), "--json"]) == 1
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["ready"] is False
    assert found["inspection"]["num_read"] == 101
    assert found["inspection"]["flaws"]["empty_answer"]["examples"][0]["at"] == "line 102"
    assert found["splits"] == {"train": 75, "validation": 5, "test": 20}
    assert found["dataset"]["columns"] == {"user": "Pregunta", "assistant": "Respuesta"}


def test_the_yaml_is_written_and_the_file_copied(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, shipped = write_csv(tmp_path / "soporte.csv"), read_all(root / "conf")
    assert main(["check", str(file), "--write"]) == 0
    assert "choose it in conf/config.yaml: - dataset: soporte " in capsys.readouterr().out
    assert (root / "data/own/soporte.csv").read_bytes() == file.read_bytes()
    text = (root / "conf/own/dataset/soporte.yaml").read_text()
    written = yaml.safe_load(text)
    assert written["data_files"] == "data/own/soporte.csv" and written["split_by"] == "cluster"
    assert "# of your records; shown in the report" in text
    assert read_all(root / "conf").items() - shipped.items() == {("own/dataset/soporte.yaml", text)}
    assert main(["check", "dataset=soporte"]) == 0
    assert "records     100 of 100 can be used" in capsys.readouterr().out


def read_all(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_text() for file in files}


def test_another_project_of_the_same_name_is_not_replaced(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written, other = root / "conf/own/dataset/soporte.yaml", tmp_path / "other/soporte.csv"
    other.parent.mkdir()
    first = write_csv(tmp_path / "soporte.csv")
    assert main(["check", str(first), "--write"]) == 0
    written.write_text(written.read_text() + "system: Be kind.\n")
    mine = read_all(root)
    assert main(["check", str(first), "--write"]) == 0
    assert "is up to date" in capsys.readouterr().out and read_all(root) == mine
    write_csv(other, header="Frage,Antwort", rows=50)
    assert main(["check", str(other), "--write"]) == 2
    said = capsys.readouterr().err
    assert "an option named soporte exists already, nothing was written" in said
    assert "data/own/soporte.csv has other content" in said and "--name NAME" in said
    assert "conf/own/dataset/soporte.yaml says columns: {'user': 'Pregunta'" in said
    assert read_all(root) == mine
    assert main(["check", str(other), "--write", "--name", "zwei"]) == 0
    assert (root / "data/own/zwei.csv").read_bytes() == other.read_bytes()
    assert read_all(root).items() >= mine.items()
    assert main(["check", str(other), "--write", "--force"]) == 0
    assert (root / "data/own/soporte.csv").read_bytes() == other.read_bytes()
    assert yaml.safe_load(written.read_text())["columns"]["user"] == "Frage"
    assert written.read_text().endswith("system: Be kind.\n")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("support.csv", "support"),
        ("Años y más 2024.csv.gz", "anos_y_mas_2024"),
        ("qa.v1-final.jsonl", "qa.v1-final"),
        ("2024.csv", "data_2024"),
        ("null.txt", "data_null"),
        ("alpaca.parquet", "own_alpaca"),  # capas ships an alpaca
    ],
)
def test_an_option_is_named_after_its_file(root: Path, file: str, name: str) -> None:
    option = Option.of([root / file], "csv", None, root)
    assert (option.name, option.file) == (name, Path(f"conf/own/dataset/{name}.yaml"))
    assert option.data_files == f"data/own/{file}"


def test_places_in_data_own(root: Path) -> None:
    (root / "data/own/deep").mkdir()
    there, elsewhere = root / "data/own/deep/a.csv", [root / "x/a.csv", root / "b[1].csv"]
    assert Option.of([there], "csv", "mine", root).data_files == "data/own/deep/a.csv"
    assert Option.of(elsewhere[1:], "csv", None, root).data_files == "data/own/b_1.csv"
    several = Option.of([*elsewhere[:1], there], "csv", "mine", root).data_files
    assert several == ["data/own/mine/a.csv", "data/own/deep/a.csv"]
    with pytest.raises(CapasError, match=r"would both be data/own/a\.csv: rename one"):
        Option.of([elsewhere[0], root / "y/a.csv"], "csv", None, root)
    for name, said in {
        "alpaca": "ships conf/dataset/alpaca",
        "my x": "--name my_x would do",
    }.items():
        with pytest.raises(CapasError, match=said):
            Option.of([there], "csv", name, root)
    with pytest.raises(CapasError, match="add --name NAME"):
        Option.of([root / "数据.csv"], "csv", None, root)


def test_columns_that_no_name_tells_are_given_behind_the_file(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_csv(tmp_path / "a.csv", "key,front", rows=60)
    file.write_text("".join(f"{n},{line}" for n, line in enumerate(file.open(encoding="utf-8"))))
    file.write_text(file.read_text().replace("0,key", "n,key", 1))
    assert main(["check", str(file)]) == 2
    assert "capas check FILE 'dataset.columns=" in capsys.readouterr().err
    columns = "dataset.columns={user: key, assistant: front}"
    assert main(["check", str(file), "--write", "--name", "b", columns, "dataset.seed=3"]) == 0
    written = yaml.safe_load((root / "conf/own/dataset/b.yaml").read_text())
    assert written["columns"] == {"user": "key", "assistant": "front"} and written["seed"] == 3
    for words, said in (
        ([columns.replace("key", "kye")], f"{file}: column 'kye', needed by"),
        ([columns, "dataset.seed=x"], "dataset.seed='x': input should be a valid integer"),
        (["lora.r=8"], "lora.r=8: with FILE"),
        (["dataset.path=json"], "dataset.path=json: with FILE"),
    ):
        assert main(["check", str(file), "--json", *words]) == 2
        assert said in capsys.readouterr().err


def test_a_column_that_is_not_there_is_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(root / "data/own/mine.csv", "qestion,answer")
    (root / "conf/overrides.yaml").write_text("defaults: [{override /dataset: own_csv}]\n")
    assert main(["check"]) == 2
    assert "did you mean 'qestion'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.xlsx", "", "unknown format; the file name must end with .json"),
        (
            "a.csv",
            "name,size,colour\nx,1,red\n",
            "cannot tell which columns hold question and answer: 'name', 'size', 'colour'",
        ),
        ("a.csv", None, "no such file"),
    ],
)
def test_what_cannot_be_read_has_exit_code_2(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: Any,
    said: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["check", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("there", "columns"),
    [
        (["question", "answer"], {"user": "question", "assistant": "answer"}),
        (
            ["ticket_id", "customer message", "Agent Reply"],
            {"user": "customer message", "assistant": "Agent Reply", "id": "ticket_id"},
        ),
        (
            ["id", "Instrucción", "contexto", "Salida"],
            {"user": ["Instrucción", "contexto"], "assistant": "Salida", "id": "id"},
        ),
        (["text", "label"], {"user": "text", "assistant": "label"}),
        (["a", "b"], {"user": "a", "assistant": "b"}),
        (["TEXT"], {"text": "TEXT"}),
        (["Context", "Response"], {"user": "Context", "assistant": "Response"}),
        (["prompt", "chosen", "rejected"], {"user": "prompt", "assistant": "chosen"}),
        (
            ["system", "prompt", "response"],
            {"user": "prompt", "assistant": "response", "system": "system"},
        ),
    ],
)
def test_columns_are_guessed_by_their_names(there: list[str], columns: dict[str, Any]) -> None:
    assert propose_columns(there, {"user": "q", "assistant": "r"})["columns"] in (columns, None)
    stated = {"user": there[0], "assistant": there[-1]}
    assert propose_columns(there, stated)["columns"] == stated


def test_how_text_files_are_cut_is_said_truthfully(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join([*(f"{t} " * 9 for t in TOPICS[:80]), "long " * 400]))
    main(["check", str(file)])
    said = capsys.readouterr().out
    assert "texts       record = each file (dataset.reading.documents=file)" in said
    assert "texts are not split (dataset.reading.max_characters=null); `format` checks" in said
    main(["check", str(file), "dataset.reading.max_characters=500"])
    said = capsys.readouterr().out
    assert (
        "1 texts longer than dataset.reading.max_characters=500 are split into 9 records at" in said
    )
    assert "records     9 of 9 can be used" in said
    assert "characters  " in said and " to 2000," in said  # the paragraph that stayed whole
    main(["check", str(file), "dataset.reading.documents=blank_lines", "--json"])
    [source] = json.loads(capsys.readouterr().out)["inspection"]["sources"]
    assert (source["num_cut"], source["columns"]) == (0, {"text": 81})


def test_json_over_many_lines_may_be_named_jsonl(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"question": f"What is {t} {t[::-1]}?", "answer": f"A {t}"} for t in TOPICS[:40]]
    for indent in (None, 1):
        (tmp_path / "a.jsonl").write_text(
            json.dumps(records, indent=indent).replace("[{", "[\n{", 1)
        )
        assert main(["check", str(tmp_path / "a.jsonl")]) == 0
        assert "records     40 of 40 can be used" in capsys.readouterr().out
    (tmp_path / "a.jsonl").write_text('{"question": "a",\n' + json.dumps(records[0]))
    assert main(["check", str(tmp_path / "a.jsonl")]) == 1
    assert "line 1: " in capsys.readouterr().out


def test_three_columns_without_a_name_are_not_guessed() -> None:
    with pytest.raises(
        CapasError,
        match=r"question and answer: 'a b', 'b', 'c'\. .*\{user: \"a b\", assistant: b\}'$",
    ):
        propose_columns(["a b", "b", "c"], None)
    for names in (["name", "size", "reply"], ["Ticket no", "id", "name", "reply"]):
        with pytest.raises(CapasError, match=r"columns=\{user: name, assistant: reply\}'$"):
            propose_columns(names, None)


@pytest.mark.parametrize(
    "names",
    [
        ["it's", 'a "b"', "c"],
        ["montaña", "año", "c"],
        ["0", "1e3", "null"],
        ["a\\", "True", "c: {"],
    ],
)
def test_the_proposed_command_names_the_columns_of_the_file(names: list[str]) -> None:
    with pytest.raises(CapasError) as found:
        propose_columns(names, None)
    *_, word = shlex.split(str(found.value).partition("example: ")[2])
    override = OverridesParser.create().parse_override(word)
    assert override.value() == {"user": names[0], "assistant": names[1]}
