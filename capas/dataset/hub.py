"""Read one split of a data set on the Hugging Face Hub, at one commit, row by row.

`datasets` determines which files of the repository form a split (by file names, or the README's `configs`).
It gets a folder that looks like the commit: the small metadata files, and an empty file for every other
name. The files of the split are then downloaded into the Hub's cache and read batch by batch. So no
connection has to stay open while rows are read, and downloaded files are read without a network, at the
requested commit. (`load_dataset` itself, offline, takes the latest commit in its cache, whatever its
`revision`.)

A yielded row of `openai/gsm8k`::

    {"question": "Natalia sold clips to 48 of her friends ...", "answer": "... #### 72"}
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from capas.core.errors import CapasError
from capas.hub.repository import Repository, is_commit

BATCH = 1000  # rows; reading them one by one takes six times as long
BUFFER_BYTES = 2**20  # buffer per column
Needed = Callable[[list[str]], list[str]]
METADATA = ("README.md", ".huggingface.yaml", "dataset_infos.json")


def read_split(
    path: str,
    name: str | None,
    revision: str | None,
    split: str | None,
    key: str = "dataset",
    needed: Needed | None = None,
    unread: Counter[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split, as `datasets` reads them, in the order of its files; memory stays bounded.

    Args:
        path: owner/name.
        name: one of the data set's configurations, None if it has a default.
        revision: a commit, 40 hex digits.
        key: the dotted key of the config node with path, name, revision and split, for error messages.
        needed: for parquet files, a function from their columns to those to read; None reads all.
        unread: a counter to which the rows of each column that was not read are added.

    Raises:
        CapasError: the data set, configuration or split does not exist; it is gated, private or unreachable;
            it needs a loading script; or a file cannot be read.
    """
    if revision is None or not is_commit(revision):
        raise CapasError(
            f"{key}.revision={revision or 'null'} is not a commit of {path}; a branch can move. "
            "`dvc repro compose` resolves it once and pins the commit in conf/revisions.yaml. (For "
            "a file, set data_files.)"
        )
    repository = Repository("dataset", path, f"{key}.path")
    names = _file_names(repository, revision)
    _refuse_script(repository, names)
    with TemporaryDirectory() as folder, _readable(repository):
        shown = Path(folder) / PurePosixPath(path).name  # `datasets` reads the folder's name
        _show(names, repository.download(revision, METADATA), shown)
        builder = _builder(shown, name, key, path)
        files = _files_of(builder, split, key, path)
        patterns = [escape(file.relative_to(shown.resolve()).as_posix()) for file in files]
        downloaded = repository.download(revision, patterns)
        for file in files:
            file.unlink()
            file.symlink_to(downloaded / file.relative_to(shown.resolve()))
        builder.config.data_files = {split: [str(file) for file in files]}
        if all(file.suffix == ".parquet" for file in files):
            _read_parquet_in_batches(builder, [str(file) for file in files], needed, unread)
        for batch in builder.as_streaming_dataset(split=split).iter(BATCH):
            yield from (
                dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)
            )


def _read_parquet_in_batches(
    builder: Any, files: list[str], needed: Needed | None, unread: Counter[str] | None
) -> None:
    """Replace the builder's reader of files by one that yields the same rows with the needed columns only.

    The builder's own reader (pyarrow's scanner) reads ahead of its consumer: it held half of a 500 MB file in
    memory, and all of it if the file was one row group. This one held 6 MB.
    """
    from pyarrow import Table
    from pyarrow.parquet import ParquetFile, read_schema

    names = list(dict.fromkeys(name for file in files for name in read_schema(file).names))
    columns = names if needed is None else needed(names)
    builder.config.columns = columns

    def tables(files: list[str], **_: Any) -> Iterator[tuple[tuple[int, int], Any]]:
        for number, file in enumerate(files):
            with ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES) as content:
                if unread is not None:
                    there = {*content.schema_arrow.names} - {*columns}
                    unread.update(dict.fromkeys(there, content.metadata.num_rows))
                for i, batch in enumerate(content.iter_batches(BATCH, columns=columns)):
                    yield (number, i), builder._cast_table(Table.from_batches([batch]))

    builder._generate_tables = tables


def _file_names(repository: Repository, commit: str) -> list[str]:
    """Return the names of all files of a commit; as they never change, they are cached next to the Hub's."""
    from huggingface_hub import cached_assets_path

    kept = cached_assets_path("capas", repository.name, commit) / "files.json"
    if kept.exists():
        names: list[str] = json.loads(kept.read_text(encoding="utf-8"))
        return names
    names = sorted(repository.file_names(commit))
    partial = kept.with_name(f".{kept.name}.partial")
    partial.write_text(json.dumps(names), encoding="utf-8")
    partial.replace(kept)
    return names


def _refuse_script(repository: Repository, names: list[str]) -> None:
    script = f"{PurePosixPath(repository.name).name}.py"
    if script in names:
        raise CapasError(
            f"{repository.key}={repository.name} needs its own loading script {script}, which capas "
            "does not run. Use a revision with data files (often the branch refs/convert/parquet), "
            "or download the data and name the files in dataset.data_files."
        )


def _show(names: list[str], metadata: Path, folder: Path) -> None:
    """Create a folder that looks like the commit: with the metadata files, and all other files empty."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name in METADATA:
            file.symlink_to(metadata / name)
        else:
            file.touch()


def _builder(folder: Path, name: str | None, key: str, path: str) -> Any:
    from datasets import load_dataset_builder
    from yaml import YAMLError

    try:
        return load_dataset_builder(str(folder), name)
    except FileNotFoundError:
        raise CapasError(
            f"{key}.path={path} holds no data files that `datasets` can read"
        ) from None
    except (ValueError, YAMLError) as error:
        known = re.search(r"BuilderConfig '.*' not found\. Available: \[(.*)\]", str(error))
        known = known or re.search(r"available configs: \[(.*?)\]", str(error), re.DOTALL)
        if known is None:
            raise CapasError(f"{key}.path={path}: `datasets` cannot read it: {error}") from None
        raise CapasError(
            f"{key}.name={name or 'null'}: {path} has the configurations {known[1].replace(chr(39), '')}"
        ) from None


def _files_of(builder: Any, split: str | None, key: str, path: str) -> list[Path]:
    known = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    if split not in known:
        raise CapasError(
            f"{key}.split={split or 'null'}: {path} has the splits {', '.join(known) or 'none'} in its "
            f"configuration {builder.config.name}"
        )
    return [Path(file) for file in known[split]]


@contextmanager
def _readable(repository: Repository) -> Iterator[None]:
    """Turn errors of the readers (damaged or truncated parquet, JSON, CSV, gzip) into a CapasError."""
    from gzip import BadGzipFile

    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, BadGzipFile, EOFError, ValueError) as error:
        raise CapasError(
            f"{repository.key}={repository.name}: a data file cannot be read: {error}"
        ) from None
