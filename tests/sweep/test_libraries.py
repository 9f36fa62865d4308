"""Stages that are forks of one process with the libraries: each is what `python SCRIPT` would be."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from workspace import REPOSITORY

from capas.core.cores import MAX_THREADS
from capas.core.params import Params
from capas.models import hardware
from capas.sweep import libraries
from capas.sweep.libraries import Libraries, loaded_with
from capas.sweep.plan import Plan

LIBRARY = "wave"  # a module that no interpreter imports by itself
SHOWN = """
import json, os, sys
from pathlib import Path
print(json.dumps({
    "arguments": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ), "name": __name__,
    "documented": sys.modules["__main__"].__doc__, "python": sys.executable, "input": sys.stdin.read(),
    "first in path": sys.path[:2], "unbuffered": sys.stdout.write_through,
    "streams": sorted(int(n) for n in os.listdir("/proc/self/fd") if int(n) < 3),
    "of capas": [name for name in sys.modules if name.startswith("capas")],
    "file": __file__, "wave": "wave" in sys.modules,
}))
print("to stderr", file=sys.stderr)
"""
STAGE = '"""A stage."""\n' + SHOWN
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are used on Linux alone")


def plan_in(home: Path) -> Plan:
    plan = Plan(home, "key", (), "commit", "tree", "inputs", (), home / "cache")
    (plan.folder / "logs").mkdir(parents=True)
    return plan


def values(**changes: Any) -> dict[str, Any]:
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    return {"hardware": {**params["hardware"], **changes}}


class Sharing:
    """A folder with scripts, run by the `python` that shares libraries."""

    def __init__(self, work: Path, shared: Libraries) -> None:
        self.work, self.shared, self.plan = work, shared, plan_in(work)
        (work / "stages").mkdir()

    def script(self, text: str) -> None:
        (self.work / "stages/train_lora.py").write_text(text)

    def environment(self, **more: str) -> dict[str, str]:
        first = self.shared.share(self.plan, values(), {})
        path = os.pathsep.join([*first, str(Path(sys.executable).parent), os.environ["PATH"]])
        return {**os.environ, "PATH": path, **more}

    def run(self, **more: str) -> "subprocess.CompletedProcess[str]":
        command = "python stages/train_lora.py one 'two words'"
        return self._run(command, self.environment(**more))

    def run_plainly(self, **more: str) -> "subprocess.CompletedProcess[str]":
        command = f"{sys.executable} stages/train_lora.py one 'two words'"
        return self._run(command, self.environment(**more))

    def _run(self, command: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            cwd=self.work,
            env=env,
            shell=True,
            input="typed",
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def start(self) -> "subprocess.Popen[str]":
        """Start the script, and return when it has written a line."""
        words = ["python", "stages/train_lora.py"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        env = self.environment(PYTHONUNBUFFERED="1")
        child: subprocess.Popen[str] = subprocess.Popen(words, cwd=self.work, env=env, **pipes)  # type: ignore[call-overload]
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        return child

    def server(self) -> psutil.Process:
        (found,) = psutil.Process(self.shared._server.pid).children()  # type: ignore[union-attr]
        return found


@pytest.fixture
def sharing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sharing]:
    monkeypatch.setattr(libraries, "LIBRARIES", (LIBRARY,))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # of the tests; a trial has its own
    shared = Libraries()
    yield Sharing(tmp_path, shared)
    shared.end()


def is_gone(pid: int) -> bool:
    """Return whether the process ends within some seconds."""
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_the_scripts_are_those_that_prepare_the_hardware() -> None:
    stages = (REPOSITORY / "stages").glob("*.py")
    found = sorted(f.name for f in stages if "hardware.prepare(" in f.read_text())
    prepares = [name for name in found if name != "pretrain_embedded.py"]  # no stage of dvc.yaml
    assert list(libraries.SCRIPTS) == prepares


def test_a_stage_finds_what_a_new_interpreter_would(sharing: Sharing) -> None:
    sharing.script(STAGE)
    more = {"PYTHONPATH": "/of/the/trial", "PYTHONUNBUFFERED": "1", "ONE": "value"}
    forked, plain = sharing.run(**more), sharing.run_plainly(**more)
    assert forked.stderr == plain.stderr == "to stderr\n"
    found, expected = json.loads(forked.stdout), json.loads(plain.stdout)
    assert found["wave"], "the libraries were not shared"
    assert found["environment"]["ONE"] == "value"
    assert "of capas" in found and not found["of capas"]
    for changed in ("wave", "environment"):
        del found[changed], expected[changed]
    assert found == expected
    assert found["first in path"] == [str(sharing.work / "stages"), "/of/the/trial"]


def test_other_commands_are_run_plainly(sharing: Sharing) -> None:
    (sharing.work / "stages/fetch_model.py").write_text(
        "import sys; print('wave' in sys.modules)\n"
    )
    for words, said in (
        ("python stages/fetch_model.py", "False\n"),
        ("python -c 'import sys; print(sys.argv)' x", "['-c', 'x']\n"),
        ("echo 'print(1 + 1)' | python", "2\n"),
    ):
        assert sharing._run(words, sharing.environment()).stdout == said


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("raise SystemExit(75)", 75, ""),
        ("raise SystemExit('no data')", 1, "no data\n"),
        ("import os; os._exit(3)", 3, ""),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, "Killed\n"),
        ("import atexit; atexit.register(lambda: print('ended'))", 0, ""),
    ],
)
def test_the_end_of_a_stage_is_that_of_its_process(
    sharing: Sharing, text: str, code: int, said: str
) -> None:
    sharing.script(text)
    done, plain = sharing.run(), sharing.run_plainly()
    expected = code if code >= 0 else 128 - code  # in the words of a shell
    assert done.returncode == plain.returncode == expected
    assert (done.stdout, done.stderr) == (plain.stdout, plain.stderr)
    assert done.stderr == said


def test_an_uncaught_error_shows_its_traceback(sharing: Sharing) -> None:
    sharing.script("def broken():\n    return 1 / 0\nbroken()\n")
    done = sharing.run()
    assert done.returncode == 1
    assert re.search(r"stages/train_lora.py\", line 2, in broken\n", done.stderr)
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


WAITS = """
import os, sys, time
try:
    print("started", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(f"stopped in {os.getpid()}")
"""


def test_a_signal_reaches_the_stage(sharing: Sharing) -> None:
    sharing.script(WAITS)
    child = sharing.start()
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert said.startswith("stopped in ") and child.returncode == 1
    child = sharing.start()
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)
    assert child.returncode == -signal.SIGTERM


def stage_of(sharing: Sharing) -> int:
    (waiting,) = sharing.server().children()
    (stage,) = waiting.children()
    return stage.pid


def test_a_stage_ends_with_the_process_that_stands_for_it(sharing: Sharing) -> None:
    sharing.script(WAITS)
    child = sharing.start()
    stage = stage_of(sharing)
    child.kill()
    child.communicate()
    assert is_gone(stage)


def test_a_stage_ends_with_the_process_that_waits_for_it(sharing: Sharing) -> None:
    sharing.script(WAITS)
    child = sharing.start()
    stage = stage_of(sharing)
    psutil.Process(stage).parent().kill()  # type: ignore[union-attr]
    child.communicate(timeout=30)
    assert child.returncode == -signal.SIGKILL
    assert is_gone(stage)


SAVES = """
import signal, sys, time
from pathlib import Path
def save(number, frame):
    time.sleep(0.5)
    Path("saved").write_text(signal.Signals(number).name)
    sys.exit(1)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
Path("started").touch()
time.sleep(60)
"""
WORKER = """
import os, sys
from pathlib import Path
from capas.core.process import follow
from capas.sweep import libraries
from capas.sweep.plan import Plan
libraries.LIBRARIES = ("wave",)
work = Path(sys.argv[1])
plan = Plan(work, "key", (), "", "", "", (), Path("cache"))
first = libraries.shared.share(plan, {values}, {{}})
env = {{**os.environ, "PATH": os.pathsep.join([*first, os.environ["PATH"]])}}
command = ["/bin/sh", "-c", "trap : INT TERM; python stages/train_lora.py; true"]  # as dvc waits for it
for line in follow(command, work, env, work / "log", lambda: None):
    pass
"""


@pytest.mark.parametrize("ends", ["the worker by SIGKILL", "all by SIGTERM"])
def test_a_stage_has_the_time_to_save(sharing: Sharing, ends: str) -> None:
    sharing.script(SAVES)
    work, program = sharing.work, WORKER.format(values=values())
    worker = psutil.Popen([sys.executable, "-c", program, str(work)], cwd=REPOSITORY)
    try:
        wait_for(work / "started")
        tree = worker.children(recursive=True)
        assert len(tree) == 2 + 2 + 3  # guard and server; waiter and stage; guard, shell and client
        if ends == "all by SIGTERM":
            for process in [worker, *tree]:
                process.terminate()
        else:
            worker.kill()
        wait_for(work / "saved")
        assert (work / "saved").read_text() in ("SIGINT", "SIGTERM")
        worker.wait()
        for process in tree:
            assert is_gone(process.pid)
    finally:
        with suppress(psutil.NoSuchProcess):
            worker.kill()


def wait_for(file: Path) -> None:
    for _ in range(400):
        if file.exists() and (file.name == "started" or file.read_text()):
            return
        time.sleep(0.05)
    raise AssertionError(f"{file} was not written")


def test_a_client_that_goes_at_any_moment_leaves_no_stage(sharing: Sharing) -> None:
    sharing.script("import time\ntime.sleep(60)")
    (folder,) = sharing.shared.share(sharing.plan, values(), {})
    request = {"arguments": ["stages/train_lora.py"], "folder": str(sharing.work)}
    content = json.dumps({**request, "environment": dict(os.environ)}).encode()
    stages = []
    for _ in range(20):
        with chdir(folder), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect("socket")
            socket.send_fds(client, [content], [0, 1, 2])
            stages.append(int(client.recv(64)))
    for stage in stages:
        assert is_gone(stage)


def test_a_stage_that_runs_outlives_the_process_and_the_next_runs_plainly(sharing: Sharing) -> None:
    sharing.script(WAITS)
    child, server = sharing.start(), sharing.server()
    stage = stage_of(sharing)
    server.kill()
    assert is_gone(server.pid)
    (sharing.work / "stages/quantize_model.py").write_text(
        "import sys; print('wave' in sys.modules)"
    )
    path = {
        **os.environ,
        "PATH": os.pathsep.join([str(sharing.shared._folder), os.environ["PATH"]]),
    }
    assert sharing._run("python stages/quantize_model.py", path).stdout == "False\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30)[1] == f"stopped in {stage}\n"


def test_libraries_may_start_processes(
    sharing: Sharing, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Some ask other programs about the hardware when they are imported."""
    asks = "import subprocess\nCODES = [subprocess.run('exit 3', shell=True).returncode for _ in range(20)]\n"
    (tmp_path / "library.py").write_text(asks)
    monkeypatch.setattr(libraries, "LIBRARIES", ("library",))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    sharing.script("import library; print(set(library.CODES))")
    assert sharing.run().stdout == "{3}\n"


def test_a_stage_may_spawn_processes(sharing: Sharing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "LIBRARIES", ("concurrent.futures.process",))
    sharing.script("""
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
def square(x):
    return x * x
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as executor:
        print(list(executor.map(square, [2, 3])))
""")
    forked, plain = sharing.run(), sharing.run_plainly()
    assert (forked.stdout, forked.stderr) == (plain.stdout, plain.stderr) == ("[4, 9]\n", "")


def test_without_the_process_stages_are_run_plainly(sharing: Sharing) -> None:
    sharing.script("import sys; print('wave' in sys.modules)")
    env = sharing.environment()
    server = sharing.server()
    assert sharing._run("python stages/train_lora.py", env).stdout == "True\n"
    server.kill()
    assert is_gone(server.pid)
    assert sharing._run("python stages/train_lora.py", env).stdout == "False\n"
    assert sharing.run().stdout == "True\n"  # the next trial has a new one


def test_an_environment_too_large_for_a_message_is_run_plainly(sharing: Sharing) -> None:
    sharing.script("import sys; print('wave' in sys.modules)")
    large = {f"LARGE_{i}": "x" * 100_000 for i in range(5)}
    assert sharing.run(**large).stdout == "False\n"


def test_a_library_that_cannot_be_imported_is_left_to_the_stage(
    sharing: Sharing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "LIBRARIES", ("no_such_library",))
    sharing.script("print('ran')")
    assert sharing.run().stdout == "ran\n"
    assert "no_such_library" in (sharing.plan.folder / "logs/libraries.log").read_text()


def test_a_worker_has_one_process_for_its_hardware(sharing: Sharing) -> None:
    shared, plan = sharing.shared, sharing.plan
    (first,) = shared.share(plan, values(), {MAX_THREADS: "1"})
    server = sharing.server().pid
    assert shared.share(plan, values(), {MAX_THREADS: "1"}) == [first]
    assert sharing.server().pid == server
    (other,) = shared.share(plan, values(instruction_set="native"), {MAX_THREADS: "1"})
    assert other != first and not Path(first).exists()
    assert not psutil.pid_exists(server)
    shutil.rmtree(other)
    (again,) = shared.share(plan, values(instruction_set="native"), {MAX_THREADS: "1"})
    assert Path(again, "python").exists()
    for change in ({"device": "cuda"}, {"num_processes": 2}):
        assert shared.share(plan, values(**change), {}) == []
    assert Path(again).stat().st_mode & 0o077 == 0, "others on this machine could run code"
    shared.end()
    assert not list(plan.folder.glob("libraries-*"))


def test_the_process_ends_with_a_killed_worker(tmp_path: Path) -> None:
    plan_in(tmp_path)
    worker = f"""
import time
from pathlib import Path
from capas.sweep import libraries
from capas.sweep.plan import Plan
plan = Plan(Path({str(tmp_path)!r}), "key", (), "", "", "", (), Path("cache"))
libraries.shared.share(plan, {values()!r}, {{}})
print("started", flush=True)
time.sleep(60)
"""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", worker]
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "started\n"
    processes = psutil.Process(child.pid).children(recursive=True)
    assert len(processes) == 2  # a guard and the process with the libraries
    child.kill()
    child.communicate()
    for process in processes:
        assert is_gone(process.pid)


@pytest.mark.parametrize("threads", ["1", "64"])
def test_libraries_are_loaded_with_the_environment_of_the_stage(
    threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(MAX_THREADS, raising=False)  # pytest's workers share the cores
    found = loaded_with(Params(values()["hardware"]), {MAX_THREADS: threads})
    monkeypatch.setenv(MAX_THREADS, threads)
    assert found == hardware.environment(Params(values()["hardware"]))
