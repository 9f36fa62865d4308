"""What every stage is run with. It never changes what a stage computes.

- A stage sees the params that dvc.yaml declares for it and no others.
- Outputs are written aside and moved into place at the end: a killed stage leaves nothing half-written.
- One process per stage and workspace: a stage that outlived a killed `dvc` cannot race its successor.
- DVC hashes deps and params after the command ran. A stage whose inputs were edited meanwhile fails,
  so that DVC does not record the old result under the new inputs.
- The installed packages must be those that environment.yaml records for the stage, and the code that of
  code.yaml.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from capas.core.code import CODE, CodeReader, check_code, check_loaded, script_of
from capas.core.dag import StageSpec, input_key, read_yaml, recorded, recorded_key
from capas.core.errors import CapasError, sweep_instead, told
from capas.core.files import file_sha256
from capas.core.locks import BusyError, exclusive
from capas.core.params import Params, flatten, select
from capas.core.peak_memory import peak_memory_bytes
from capas.core.progress import heartbeat

log = logging.getLogger("capas")
PARAMS, ENVIRONMENT = "params.yaml", "environment.yaml"
CHECKPOINTS, FINISHED = ".dvc/tmp/checkpoints", "finished"
_HASHED_BYTES = (
    2**20
)  # larger inputs are compared by size and mtime: hashing 16 GB twice is not plumbing


class Stage:
    """The files of one run of a stage; paths are relative to `root`, the repository."""

    def __init__(self, spec: StageSpec, root: Path, aside: Path | None = None) -> None:
        self.spec, self.root, self.aside = spec, root, aside
        self._pending: dict[Path, Path] = {}
        self._checkpoints: Path | None = None
        self.costs: dict[str, Any] = {}  # for reports/timings, beside seconds and peak memory

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def debug(self) -> bool:
        """Whether outputs go aside, to where DVC does not look."""
        return self.aside is not None

    def dep(self, path: str) -> Path:
        """The declared dependency `path`.

        Raises:
            CapasError: dvc.yaml does not declare it, or it is missing.
        """
        self._check_declared(path, self.spec.deps, "dep")
        found = self.root / path
        if self.aside and (self.aside / path).exists() and path.startswith("data/composed/"):
            return self.aside / path  # what the overrides of a debug run compose to
        if not found.exists():
            raise CapasError(f"{path} is missing because its stage has not run. Run `dvc repro`")
        return found

    def out(self, path: str) -> Path:
        """Where to write the declared output `path`; moved there when the stage succeeds.

        The parent folder exists. The path itself does not.
        """
        self._check_declared(path, self.spec.outs, "output")
        final = (self.aside or self.root) / path
        partial = final.with_name(f".{final.name}.partial")
        if partial not in self._pending:
            partial.parent.mkdir(parents=True, exist_ok=True)
            _remove(partial)
            self._pending[partial] = final
        return partial

    def key(self) -> str:
        """Identity of this stage's inputs: see `capas.core.dag.input_key`."""
        return input_key(self.spec, self.root)

    def checkpoints(self) -> Path:
        """A folder outside DVC for exactly these inputs: an interrupted run resumes, a changed one cannot.

        It goes once DVC has recorded the outputs, so that a run which dies before that loses nothing.
        """
        parent = self.aside / "checkpoints" if self.aside else self.root / CHECKPOINTS
        self._checkpoints = parent / f"{self.name}-{self.key()}"
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        return self._checkpoints

    def finish(self) -> None:
        """Move all outputs into place.

        Raises:
            CapasError: an output that dvc.yaml declares was not written.
        """
        finals = {final for partial, final in self._pending.items() if partial.exists()}
        missing = [out for out in self.spec.outs if (self.aside or self.root) / out not in finals]
        if missing:
            raise CapasError(f"the stage '{self.name}' did not write {', '.join(missing)}")
        for partial, final in self._pending.items():
            _remove(final)
            partial.rename(final)
        if self._checkpoints and self.aside:
            _remove(self._checkpoints)
        elif self._checkpoints:
            (self._checkpoints / FINISHED).touch()

    def _check_declared(self, path: str, declared: tuple[str, ...], kind: str) -> None:
        if path not in declared:
            raise CapasError(
                f"{path} is not declared as {kind} of the stage '{self.name}' in dvc.yaml"
            )


def run(
    name: str, main: Callable[[Params, Stage], None], overrides: list[str] | None = None
) -> None:
    """Run `main` as the DVC stage `name` in the current folder; exit 1 with a message on a user's error.

    Arguments on the command line are Hydra overrides (`trainer.max_steps=5`): the stage then runs for
    debugging, on DVC's inputs, and writes to .dvc/tmp/debug/ and nowhere else. A script that has arguments of
    its own passes the rest of them as `overrides`.
    """
    logging.basicConfig(format=f"{name}: %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    overrides = sys.argv[1:] if overrides is None else overrides
    if {"-h", "--help"} & set(overrides):
        sys.stdout.write(f"{sys.modules['__main__'].__doc__}\n{run.__doc__}\n")
        return
    with told(name):
        if {"-m", "--multirun"} & set(overrides):
            raise CapasError(sweep_instead(overrides))
        _run(name, main, overrides)


def _run(name: str, main: Callable[[Params, Stage], None], overrides: list[str]) -> None:
    root = Path.cwd()
    spec = StageSpec.read(name, root)
    with _only_one(name, root):
        _drop_recorded_checkpoints(root)
        _check_environment(spec, root)
        reader = CodeReader(root)
        if not overrides:
            check_code(spec, root, reader)
        before = _state(spec, root)
        aside = root / ".dvc/tmp/debug" / name if overrides else None
        stage = Stage(spec, root, aside)
        started = time.perf_counter()
        with heartbeat():
            main(Params(_overridden(spec, root, overrides, aside)), stage)
        seconds = time.perf_counter() - started
        check_loaded(spec, root, reader)
        _check_unchanged(before, _state(spec, root))
        if not aside:
            _write_timing(stage, seconds)
        stage.finish()
        if aside:
            log.info(
                "debug run: the result is in %s; nothing that DVC tracks was written",
                aside.relative_to(root),
            )


def _overridden(
    spec: StageSpec, root: Path, overrides: list[str], aside: Path | None
) -> dict[str, Any]:
    """The declared values of params.yaml, or those that conf/ composes to with Hydra overrides.

    The files that the overrides name, such as a chat template, are written below `aside`.
    """
    keys = spec.keys
    if aside is None:
        return select(read_yaml(root / PARAMS), keys) if keys else {}
    script = [sys.executable, "stages/compose_params.py"]
    command = [*script, "--print", "--stage", spec.name, "--files", str(aside), *overrides]
    composed = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=False)
    if composed.returncode:
        sys.exit(composed.returncode)  # it has said why
    values = json.loads(composed.stdout)
    _check_read(values, read_yaml(root / PARAMS), keys)
    return select(values, keys)


def _check_read(values: dict[str, Any], before: dict[str, Any], keys: list[str]) -> None:
    """An override that the stage does not read has no effect: the inputs are those of the last repro."""
    old, new = flatten(before), flatten(values)
    changed = [key for key in new if old.get(key) != new[key]]
    unread = [k for k in changed if not any(k == d or k.startswith(f"{d}.") for d in keys)]
    if unread and unread == changed:
        raise CapasError(
            f"this stage does not read {', '.join(unread)}. A debug run uses the inputs of the last "
            "`dvc repro`. To change them: dvc exp run -S ..."
        )
    if unread:
        log.warning("ignored, because this stage does not read it: %s", ", ".join(unread))


@contextmanager
def _only_one(name: str, root: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(exclusive(root / f".dvc/tmp/stage-{name}.lock", seconds=0))
        except BusyError as busy:
            raise CapasError(
                f"this stage is already running in this workspace (pid {busy.text}); its `dvc` "
                "process has ended. Wait for it or stop it, then run `dvc repro` again."
            ) from None
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _drop_recorded_checkpoints(root: Path) -> None:
    """Those of finished runs that DVC has recorded since; a forced run of the same inputs starts afresh."""
    entries = recorded(root)
    for mark in (root / CHECKPOINTS).glob(f"*/{FINISHED}"):
        name, _, key = mark.parent.name.rpartition("-")
        if name in entries and recorded_key(entries[name]) == key:
            _remove(mark.parent)


def _check_environment(spec: StageSpec, root: Path) -> None:
    if ENVIRONMENT not in spec.params:
        return
    wanted = spec.values(root)[ENVIRONMENT]
    wrong = [
        f"{package} {_installed(package) or 'is not installed'}, recorded {expected}"
        for package, expected in wanted.items()
        if _installed(package) != expected
    ]
    if wrong:
        raise CapasError(
            f"the installed packages are not those of {ENVIRONMENT}: {'; '.join(wrong)}.\n"
            "Install the recorded ones: pip install -r requirements.lock. To keep the installed "
            "ones, pin them in requirements.lock and run `dvc repro`, which reruns the affected "
            "stages."
        )


def _installed(package: str) -> str | None:
    try:
        return version(package).split("+")[
            0
        ]  # a local suffix (+cpu, +cu128) names a build, not a version
    except PackageNotFoundError:
        return None


def _state(spec: StageSpec, root: Path) -> dict[str, Any]:
    """A cheap fingerprint of all that DVC hashes for this stage once it ran."""
    state: dict[str, Any] = {
        f"the params in {f}": values for f, values in spec.values(root).items()
    }
    for dep in spec.deps:
        path = root / dep
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                state[str(file.relative_to(root))] = _fingerprint(file)
    if CODE in spec.params:
        state |= CodeReader(root).files(script_of(spec))
    return state


def _fingerprint(file: Path) -> Any:
    stat = file.stat()
    if stat.st_size > _HASHED_BYTES:
        return stat.st_size, stat.st_mtime_ns
    return file_sha256(file)


def _check_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        raise CapasError(
            f"changed while the stage was running: {', '.join(changed)}.\n"
            "The result was not recorded, because DVC would record it under the new inputs. Run "
            "`dvc repro` again."
        )


def _write_timing(stage: Stage, seconds: float) -> None:
    """Seconds and peak memory vary from run to run: they are no output of the stage.

    `key` says of which inputs: a stage that DVC restores for others did not cost this.
    """
    folder = stage.root / "reports/timings"
    try:
        facts = {
            "key": stage.key(),
            "ended": round(time.time(), 2),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(sum(os.times()[:4]), 2),  # of its processes, too
            "peak_memory_bytes": peak_memory_bytes(),
            **stage.costs,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stage.name}.json").write_text(json.dumps(facts) + "\n")
    except (OSError, CapasError) as error:  # a finished training is worth more than its timing
        log.warning("reports/timings could not be written: %s", error)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
