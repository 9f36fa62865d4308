"""A git repository with recorded results, made without DVC: dvc.lock, metrics, outputs in DVC's cache."""

import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from shipped import composed, composed_text
from workspace import REPOSITORY, Workspace

from capas.core.records import RAW
from capas.evaluation.names import BINARY
from capas.evaluation.predictions import predictions_schema

Answers = Sequence[str]
QUESTIONS = [f"Set a timer for {n} minutes." for n in range(1, 11)]
RIGHT = [f'{{"minutes": {n}}}' for n in range(1, 11)]
WRONG = '{"minutes": 0}'
TRAIN = [("Play some music.", "music"), ("Turn on the light.", "light")]


def answered(num_right: int, first: int = 0) -> list[str]:
    """Answers to the ten test records, of which `num_right` are right, from number `first` on."""
    return [right if first <= i < first + num_right else WRONG for i, right in enumerate(RIGHT)]


class Results(Workspace):
    """Each `record` writes one result into the workspace; `commit` and `experiment` keep it in git."""

    @classmethod
    def make(cls, root: Path) -> "Results":
        made = cls(root)
        root.mkdir(parents=True, exist_ok=True)
        shutil.copytree(REPOSITORY / "conf", root / "conf")
        shutil.copy(REPOSITORY / "dvc.yaml", root / "dvc.yaml")
        (root / ".dvc").mkdir()
        (root / ".dvc/config").write_text("[core]\n    analytics = false\n")
        (root / ".gitignore").write_text("/.dvc/cache\n/.dvc/tmp\n/mlflow.db\n/mlartifacts\n")
        made.run("git", "init", "-q", "-b", "main")
        made.run("git", "config", "user.name", "test")
        made.run("git", "config", "user.email", "test@example.org")
        made.commit()
        return made

    def record(
        self,
        answers: Answers,
        overrides: Sequence[str] = (),
        *,
        questions: Sequence[str] = QUESTIONS,
        references: Sequence[str] = RIGHT,
        train: Sequence[tuple[str, str]] = TRAIN,
        metrics: Sequence[str] = ("exact_match",),
        scores: Sequence[float] = (),
        summarized: Mapping[str, float] | None = None,
        tokens: int = 20,
        loss: float = 0.5,
        seconds: float | None = None,
        code: str = "1",
        template: str = "chatml",
        base: float = 0.0,
    ) -> None:
        """One result; `scores` are those of metrics that are not exact_match.

        `summarized` are scores that tuned.json has and no row of predictions.
        """
        values = composed(overrides)
        self._write("params.yaml", composed_text(overrides))
        rows = _rows(answers, questions, references, metrics, scores, tokens, loss, template)
        tests = list(zip(questions, references, strict=True))
        raw = {"train": _raw("train", train), "test": _raw("test", tests)}
        # A training depends on its values and its data: so does the adapter.
        said = json.dumps([values["lora"], values["trainer"], values["seed"], list(train), code])
        adapter = hashlib.sha256(said.encode()).hexdigest()
        mean = {name: sum(float(row[name]) for row in rows) / len(rows) for name in metrics}
        first = {f"{name}_gain_low": mean[name] - base for name in metrics[:1]}
        self._json(
            "reports/metrics/tuned.json", {"loss": loss, **mean, **(summarized or {}), **first}
        )
        self._json(
            "reports/metrics/base.json", {"base": {"loss": 9.0, **dict.fromkeys(mean, base)}}
        )
        parquet = _parquet(rows, predictions_schema(list(metrics)))
        certificate = json.dumps({"adapter_sha256": adapter}).encode()
        facts = json.dumps({"splits": {"train": {"num_records": len(train)}}}).encode()
        tuned = (self.root / "reports/metrics/tuned.json").read_bytes()
        stages = {
            "fetch": _stage([], {"dataset": values["dataset"]}, [self._folder("data/raw", raw)]),
            "format": _stage(
                [("data/raw", self._folder("data/raw", raw)["md5"])],
                {},
                [self._cached("reports/format.json", facts)],
            ),
            "train": _stage(
                [("reports/format.json", _md5(facts))],
                {key: values[key] for key in ("lora", "trainer")},
                [
                    {"path": "data/models/adapter", "md5": f"{adapter[:32]}.dir"},
                    self._cached("reports/certificate.json", certificate),
                ],
                code={"train_lora": code},
            ),
            "evaluate": _stage(
                [("data/models/adapter", f"{adapter[:32]}.dir")],
                {"evaluation": values["evaluation"]},
                [
                    self._cached("reports/predictions.parquet", parquet),
                    {"path": "reports/metrics/tuned.json", "md5": _md5(tuned)},
                ],
                {"torch": "2.13.0"},
            ),
        }
        self._write("dvc.lock", yaml.safe_dump({"schema": "2.0", "stages": stages}))
        if seconds is not None:
            self._timing(stages["train"], seconds)

    def experiment(self, name: str, baseline: str = "HEAD") -> str:
        """The workspace as an experiment of DVC; the working tree stays."""
        self.run("git", "add", "-A")
        head = self.run("git", "rev-parse", baseline).strip()
        tree = self.run("git", "write-tree").strip()
        number = len(self.run("git", "for-each-ref", "refs/exps").splitlines())
        date = {"GIT_COMMITTER_DATE": f"{1_700_000_000 + number} +0000"}
        commit = self.run("git", "commit-tree", tree, "-p", head, "-m", name, **date).strip()
        self.run("git", "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", commit)
        self.run("git", "reset", "-q")
        return commit

    def reset(self) -> None:
        """The workspace as HEAD has it."""
        self.run("git", "reset", "-q", "--hard")

    def lose_cache(self) -> None:
        shutil.rmtree(self.root / ".dvc/cache")

    def _timing(self, entry: dict[str, Any], seconds: float) -> None:
        from capas.core.dag import recorded_key

        cost = {"key": recorded_key(entry), "seconds": seconds, "cpu": "a CPU"}
        self._json("reports/timings/train.json", cost)

    def _folder(self, path: str, files: dict[str, bytes]) -> dict[str, str]:
        """An output that is a folder of parquet files, as DVC caches it."""
        entries = []
        for name, content in sorted(files.items()):
            self._cached("", content)
            entries.append({"md5": _md5(content), "relpath": f"{name}.parquet"})
        listed = json.dumps(entries).encode()
        self._store(f"{_md5(listed)}.dir", listed)
        return {"path": path, "md5": f"{_md5(listed)}.dir"}

    def _cached(self, path: str, content: bytes) -> dict[str, str]:
        self._store(_md5(content), content)
        return {"path": path, "md5": _md5(content)}

    def _store(self, md5: str, content: bytes) -> None:
        file = self.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    def _json(self, path: str, value: Any) -> None:
        self._write(path, json.dumps(value, indent=2) + "\n")

    def _write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def _stage(
    deps: Sequence[tuple[str, str]],
    params: dict[str, Any],
    outs: list[dict[str, str]],
    packages: dict[str, str] | None = None,
    code: dict[str, str] | None = None,
) -> dict[str, Any]:
    files = {"params.yaml": params, "environment.yaml": packages, "code.yaml": code}
    declared = {name: values for name, values in files.items() if values is not None}
    read = [{"path": path, "md5": md5} for path, md5 in deps]
    return {"cmd": "python", "deps": read, "params": declared, "outs": outs}


def _rows(
    answers: Answers,
    questions: Sequence[str],
    references: Sequence[str],
    metrics: Sequence[str],
    scores: Sequence[float],
    tokens: int,
    loss: float,
    template: str,
) -> list[dict[str, Any]]:
    rows = []
    for i, (answer, question, reference) in enumerate(
        zip(answers, questions, references, strict=True)
    ):
        right = answer == reference
        scored = {m: right if m in BINARY else float(scores[i]) for m in metrics}
        rows.append(
            {
                "id": f"test-{i:02}",
                "metadata": "{}",
                "prompt": f"<{template}>{question}",
                "reference": reference,
                "completion": answer,
                "loss": loss,
                "num_supervised_tokens": tokens,
                "token_accuracy": 0.9,
                **scored,
                "copied_values": None,
                "stopped": True,
                "empty": False,
                "control_token": False,
            }
        )
    return rows


def _raw(split: str, records: Sequence[tuple[str, str]]) -> bytes:
    rows = []
    for i, (question, answer) in enumerate(records):
        turns = (("user", question), ("assistant", answer))
        messages = [{"role": r, "content": c, "extra": "", "train": True} for r, c in turns]
        rows.append({"id": f"{split}-{i:02}", "messages": messages, "tools": "", "metadata": "{}"})
    return _parquet(rows, RAW)


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    return buffer.getvalue()


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
