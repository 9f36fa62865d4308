"""Run a stage with the checks that all stages share; none of them changes a stage's results.

- A stage sees only the params that dvc.yaml declares for it.
- Outputs are written to temporary names and moved into place at the end, so a killed stage leaves nothing
  half-written.
- Only one process runs a stage in a workspace: a stage that outlived a killed `dvc` cannot race the next
  one.
- DVC hashes deps and params after the command ran. A stage whose inputs were edited meanwhile fails, so that
  DVC does not record the old result under the new inputs.
- The installed packages must be those that environment.yaml records for the stage, and the code must be that
  of code.yaml.
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

from capas.core.code_digests import CODE, CodeReader, check_code, check_loaded, script_of
from capas.core.dag import StageSpec, input_key, read_yaml, recorded, recorded_key
from capas.core.errors import CapasError, exit_on_user_error, sweep_instead
from capas.core.files import file_sha256
from capas.core.locks import BusyError, exclusive
from capas.core.params import Params, flatten, select
from capas.core.peak_memory import peak_memory_bytes
from capas.core.progress import heartbeat

log = logging.getLogger("capas")
PARAMS, ENVIRONMENT = "params.yaml", "environment.yaml"
CHECKPOINTS, FINISHED = ".dvc/tmp/checkpoints", "finished"
# Larger inputs are compared by size and mtime, because hashing 16 GB twice takes too long.
_HASHED_BYTES = 2**20


class Stage:
    """The files of one run of a stage; paths are relative to `root`, the repository's folder."""

    def __init__(self, spec: StageSpec, root: Path, aside: Path | None = None) -> None:
        self.spec, self.root, self.aside = spec, root, aside
        self._pending: dict[Path, Path] = {}
        self._checkpoints: Path | None = None
        self.costs: dict[str, Any] = {}  # added to reports/timings, besides time and peak memory

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def debug(self) -> bool:
        """Return whether outputs are written elsewhere, to a folder that DVC does not track."""
        return self.aside is not None

    def dep(self, path: str) -> Path:
        """Return the path of the declared dependency `path`.

        Raises:
            CapasError: dvc.yaml does not declare the dependency, or it is missing.
        """
        self._check_declared(path, self.spec.deps, "dep")
        found = self.root / path
        if self.aside and (self.aside / path).exists() and path.startswith("data/composed/"):
            return self.aside / path  # composed from the overrides of a debug run
        if not found.exists():
            raise CapasError(f"{path} is missing because its stage has not run. Run `dvc repro`")
        return found

    def out(self, path: str) -> Path:
        """Return a temporary path for the declared output `path`; it is moved there when the stage succeeds.

        The parent folder exists. The temporary path itself does not.

        Raises:
            CapasError: dvc.yaml does not declare the output.
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
        """Return the key of this stage's inputs: see `capas.core.dag.input_key`."""
        return input_key(self.spec, self.root)

    def checkpoints(self) -> Path:
        """Return the folder of checkpoints for exactly these inputs; DVC does not track it.

        An interrupted run can resume from it, a run with other inputs cannot. It is deleted once DVC has
        recorded the outputs, so that a run which fails before that loses nothing.
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

    Arguments on the command line are Hydra overrides (`trainer.max_steps=5`). The stage then runs for
    debugging, with DVC's inputs, and writes only to .dvc/tmp/debug/. A script with arguments of its own
    passes the others as `overrides`.
    """
    logging.basicConfig(format=f"{name}: %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    overrides = sys.argv[1:] if overrides is None else overrides
    if {"-h", "--help"} & set(overrides):
        sys.stdout.write(f"{sys.modules['__main__'].__doc__}\n{run.__doc__}\n")
        return
    with exit_on_user_error(name):
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
        before = _state(spec, root, reader)
        aside = root / ".dvc/tmp/debug" / name if overrides else None
        stage = Stage(spec, root, aside)
        started = time.perf_counter()
        with heartbeat():
            main(Params(_overridden(spec, root, overrides, aside)), stage)
        seconds = time.perf_counter() - started
        check_loaded(spec, root, reader)
        _check_unchanged(before, _state(spec, root, CodeReader(root)))
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
    """Return the declared values of params.yaml, or those composed from conf/ with Hydra overrides.

    Files that the overrides name, such as a chat template, are written below `aside`.
    """
    keys = spec.keys
    if aside is None:
        return select(read_yaml(root / PARAMS), keys) if keys else {}
    script = [sys.executable, "stages/compose_params.py"]
    command = [*script, "--print", "--stage", spec.name, "--files", str(aside), *overrides]
    composed = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=False)
    if composed.returncode:
        sys.exit(composed.returncode)  # compose has printed the reason
    values = json.loads(composed.stdout)
    _check_read(values, read_yaml(root / PARAMS), keys)
    return select(values, keys)


def _check_read(values: dict[str, Any], before: dict[str, Any], keys: list[str]) -> None:
    """Check that the stage reads at least one overridden value, and warn about those that it does not read.

    Raises:
        CapasError: the stage reads none, so the overrides would have no effect on the last repro's inputs.
    """
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
    """Delete checkpoints of finished runs that DVC has recorded; a forced rerun then starts from zero."""
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
        # A local suffix (+cpu, +cu128) names a build, not a version.
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


def _state(spec: StageSpec, root: Path, reader: CodeReader) -> dict[str, Any]:
    """Return a cheap fingerprint of all inputs that DVC hashes for this stage after it ran."""
    state: dict[str, Any] = {
        f"the params in {f}": values for f, values in spec.values(root).items()
    }
    for dep in spec.deps:
        path = root / dep
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                state[str(file.relative_to(root))] = _fingerprint(file)
    if CODE in spec.params:
        state |= reader.files(script_of(spec))
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
    """Write the run's time and peak memory, which differ between runs and so are not an output of the stage.

    `key` identifies the inputs: if DVC restores the stage for other inputs, these costs do not apply.
    """
    folder = stage.root / "reports/timings"
    try:
        facts = {
            "key": stage.key(),
            "ended": round(time.time(), 2),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(sum(os.times()[:4]), 2),  # including child processes
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
