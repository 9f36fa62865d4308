"""USING.md: its blocks, as they stand there, answer as capas does, where capas cannot be imported."""

import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from servers import STARTS_WITHIN, free_port
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from capas import __main__ as cli

ROOT = Path(__file__).resolve().parents[2]
NUM_RECORDS = 12
REQUEST = "Set a timer for 5 minutes."
SERVING = ("fastapi", "openai", "pydantic", "uvicorn")  # of `transformers serve`
WITHOUT_CAPAS = "import sys\nsys.modules['capas'] = None  # an import of it raises ImportError\n"

pytestmark = pytest.mark.skipif(
    not all(
        (ROOT / name).exists()
        for name in ("data/models/adapter", "data/raw", "reports/predictions.parquet")
    ),
    reason="the result is not here: run `dvc repro`",
)


def blocks(language: str) -> list[str]:
    text = (ROOT / "USING.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def asked_and_answered() -> list[tuple[list[dict[str, str]], str]]:
    """Conversations of the test split, and what the stage `evaluate` wrote of them, evenly over its kinds."""
    raw = {row["id"]: row for row in pq.read_table(ROOT / "data/raw/test.parquet").to_pylist()}
    rows = pq.read_table(ROOT / "reports/predictions.parquet").to_pylist()
    rows = rows[:: len(rows) // NUM_RECORDS][:NUM_RECORDS]
    names = ("role", "content")
    return [
        ([{n: m[n] for n in names} for m in raw[row["id"]]["messages"][:-1]], row["completion"])
        for row in rows
    ]


def capas(*command: str, typed: str = "") -> str:
    """What `capas COMMAND` writes in the top folder; it must succeed."""
    written = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(written):
        patch.chdir(ROOT)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        assert cli.main(list(command)) == 0
    return written.getvalue().strip()


@pytest.fixture(scope="module")
def capas_says() -> str:
    """The answer of `capas chat` to the request that both blocks ask."""
    return capas("chat", "--setting", "greedy", typed=f"{REQUEST}\n")


def test_peft_alone_answers_as_capas_does(
    capas_says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = blocks("python")
    records, names = asked_and_answered(), dict[str, Any]()
    assert len(records) == NUM_RECORDS and REQUEST in block
    monkeypatch.chdir(ROOT)
    for name in [name for name in sys.modules if name.partition(".")[0] == "capas"]:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises ImportError
    exec(block, names)
    assert capsys.readouterr().out.strip() == capas_says
    found = [names["answer"](*messages) for messages, _ in records]
    assert found == [expected for _, expected in records]


def test_the_merged_model_answers_as_capas_does(capas_says: str, tmp_path: Path) -> None:
    capas("merge", str(tmp_path / "merged"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    greedy = GenerationConfig.from_pretrained(
        tmp_path / "merged", max_new_tokens=96, do_sample=False
    )

    def answer(*messages: dict[str, str]) -> str:
        asked = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        written = model.generate(**asked, generation_config=greedy)
        length = asked["input_ids"].shape[1]
        text: str = tokenizer.decode(written[0, length:], skip_special_tokens=True)
        return text

    for messages, expected in asked_and_answered()[:4]:
        assert answer(*messages) == expected
    system = {"role": "system", "content": "Turn the request into one function call in JSON."}
    assert answer(system, {"role": "user", "content": REQUEST}) == capas_says


@pytest.mark.slow
def test_peft_alone_answers_in_a_process_of_its_own(capas_says: str) -> None:
    """With the kernels that torch chooses by itself."""
    (block,) = blocks("python")
    records = asked_and_answered()
    more = (
        "\nimport json\nfor messages in json.load(sys.stdin): print(json.dumps(answer(*messages)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_CAPAS + block + more],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        input=json.dumps([messages for messages, _ in records]),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    shown, *answers = done.stdout.splitlines()
    assert [json.loads(answer) for answer in answers] == [expected for _, expected in records]
    assert shown == capas_says


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in SERVING),
    reason=f"`transformers serve` needs {', '.join(SERVING)}: pip install -e '.[serve]'",
)
def test_transformers_serves_the_merged_model(capas_says: str, tmp_path: Path) -> None:
    capas("merge", str(tmp_path / "merged"))
    serve, ask = blocks("bash")
    port = str(free_port())
    with served(serve.replace("8000", port), port, tmp_path):
        command = ask.replace("8000", port)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        said = content(json.loads(done.stdout))
        assert said == capas_says
        for messages, expected in asked_and_answered()[:4]:
            body = {"model": "merged", "temperature": 0, "max_tokens": 96, "messages": messages}
            assert content(post(port, body)) == expected


def content(reply: dict[str, Any]) -> str:
    text: str = reply["choices"][0]["message"]["content"]
    return text


def post(port: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=STARTS_WITHIN) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


@contextlib.contextmanager
def served(command: str, port: str, folder: Path) -> Iterator[None]:
    """The server of `command`, for as long as the block lasts; `capas` is not on its way."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            ["bash", "-c", command],
            cwd=folder,
            env={**env, "PATH": path, "HF_HUB_OFFLINE": "1"},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        while not healthy(port):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def healthy(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False
