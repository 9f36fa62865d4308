"""Two people: git's conflicts in generated files are resolved, those in hand-written files are listed."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_pipeline import Small
from workspace import REPOSITORY, Workspace

from capas.config.composition import dump
from capas.core.dag import StageSpec
from capas.core.generated import BY_KEY, LOCK, is_generated, uncached


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """`main` has one value changed and `other` another one, each with its results."""
    small = Small.make(tmp_path_factory.mktemp("conflict") / "home")
    small.run("git", "switch", "-q", "-c", "other")
    small.override(lora={"r": 8}, dataset={"seed": 7})
    small.commit()
    small.run("git", "tag", "theirs")
    small.run("git", "switch", "-q", "main")
    small.override(trainer={"learning_rate": 0.01}, lora={"r": 8})
    small.commit()
    return small


@pytest.fixture
def small(forked: Small, tmp_path: Path) -> Small:
    copied = Small(Path(shutil.copytree(forked.root, tmp_path / "home", symlinks=True)))
    copied.run("git", "status")  # git then knows that the copies are the files of its index
    return copied


def values(small: Small) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(small.read("params.yaml"))
    return found


COMMANDS = {
    "merge": "git merge other",
    "rebase": "git rebase other",
    "cherry-pick": "git cherry-pick other",
    "stash": "git switch -q other && git reset -q --soft HEAD~1 && git stash -q && git switch -q main"
    " && git stash pop",
    "apply": "git diff other~1 other | git apply --3way",
}


@pytest.mark.parametrize(
    "command",
    [
        "merge",
        "stash",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("rebase", "cherry-pick", "apply")),
    ],
)
def test_both_values_are_there_and_one_stage_runs_again(small: Small, command: str) -> None:
    """The results of `prepare` are those of the other side: it has the value that decides them."""
    small.run("sh", "-c", COMMANDS[command], check=False)
    assert {LOCK, "params.yaml", "conf/overrides.yaml"} <= {*small.unmerged()}
    said = small.restore()
    assert small.unmerged() == []
    assert "dvc.lock keeps the results of 1 of 3 stages" in said
    found = values(small)
    assert found["trainer"]["learning_rate"] == 0.01
    assert (found["lora"]["r"], found["dataset"]["seed"]) == (8, 7)
    assert small.read("reports/metrics/prepare.json") == small.run(
        "git", "show", "theirs:reports/metrics/prepare.json"
    )
    (small.root / "data/raw").write_text(small.read("reports/metrics/prepare.json"))  # dvc checkout
    assert small.remake() == ["compose", "train"]
    assert small.restore() == "nothing to restore\n"


def test_a_merge_that_is_concluded_has_both_parents_and_no_markers(small: Small) -> None:
    small.run("git", "merge", "other", check=False)
    small.restore()
    small.run("git", "commit", "-q", "--no-edit")
    assert small.run("git", "log", "-1", "--format=%P").count(" ") == 1
    assert "<<<<<<<" not in small.run("git", "grep", "-h", "", "--", "conf", "*.yaml", LOCK)


def test_conflicts_in_own_files_are_listed_and_nothing_is_done(small: Small) -> None:
    for branch, line in (("other", "second = 2"), ("main", "second = 3")):
        small.run("git", "switch", "-q", branch)
        (small.root / "stages/train.py").write_text(f"first = 1\n{line}\n")
        small.commit()
    small.run("git", "rm", "-q", "stages/prepare.py")
    small.commit()
    small.run("git", "switch", "-q", "other")
    (small.root / "stages/prepare.py").write_text("first = 0\n")
    small.commit()
    small.run("git", "switch", "-q", "main")
    small.run("git", "merge", "other", check=False)
    before = small.unmerged()
    said = small.restore(code=1)
    assert "stages/train.py: changed on both sides, line 2" in said
    assert "stages/prepare.py: deleted on our side, changed on theirs" in said
    assert "dvc.lock" not in said
    assert small.unmerged() == before
    (small.root / "stages/train.py").write_text("first = 1\nsecond = 2\n")
    small.run("git", "add", "stages")
    small.restore()
    assert small.unmerged() == []


def contradict(small: Small) -> None:
    """Merge two values of one key."""
    small.override(lora={"r": 4})
    small.commit()
    small.run("git", "merge", "other", check=False)


@pytest.mark.parametrize(("side", "r"), [("--ours", 4), ("--theirs", 8)])
def test_a_key_with_two_values_is_the_users_to_choose(small: Small, side: str, r: int) -> None:
    contradict(small)
    said = small.restore(code=2)
    assert "  lora.r: 4 (ours, HEAD) or 8 (theirs)" in said
    assert "capas restore --ours" in said
    assert "conf/overrides.yaml: lora.r is " in small.restore(side)
    assert (values(small)["lora"]["r"], values(small)["dataset"]["seed"]) == (r, 7)


def test_a_key_chosen_in_an_editor_is_taken(small: Small) -> None:
    contradict(small)
    (small.root / "conf/overrides.yaml").write_text("lora: {r: 2}\n")
    small.restore()
    assert (values(small)["lora"]["r"], values(small)["dataset"]["seed"]) == (2, 0)


def test_what_does_not_compose_is_told_and_the_next_restore_goes_on(small: Small) -> None:
    small.run("git", "switch", "-q", "other")
    (small.root / "conf/overrides.yaml").write_text("lora: {r: 0}\n")
    small.commit()
    small.run("git", "switch", "-q", "main")
    small.run("git", "merge", "other", check=False)
    said = small.restore("--theirs", code=2)
    assert "lora.r must be greater than 0" in said
    assert "run `capas restore` again" in said
    (small.root / "conf/overrides.yaml").write_text("lora: {r: 3}\n")
    small.restore()
    assert values(small)["lora"]["r"] == 3
    assert small.unmerged() == []


def test_an_edit_of_params_by_hand_in_a_stash_is_not_lost(small: Small) -> None:
    edited = yaml.safe_load(small.read("params.yaml"))
    edited["lora"]["lora_alpha"] = 32
    stamp = small.read("params.yaml").splitlines()[0]
    (small.root / "params.yaml").write_text(f"{stamp}\n{yaml.safe_dump(edited)}")
    small.run("git", "stash", "-q")
    small.run("git", "switch", "-q", "other")
    small.run("git", "stash", "pop", check=False)
    small.restore()
    found = values(small)["lora"]
    assert (found["lora_alpha"], found["r"]) == (32, 8)
    assert "lora_alpha: 32" in small.read("conf/overrides.yaml")


def test_markers_that_were_committed_are_resolved(small: Small) -> None:
    """As git writes them without the attributes of this repository."""
    (small.root / ".gitattributes").unlink()
    small.run("git", "merge", "other", check=False)
    small.run("git", "add", "-A")
    small.run("git", "commit", "-q", "-m", "Markers")
    marked = [f for f in (LOCK, "params.yaml", *BY_KEY) if "<<<<<<< " in small.read(f)]
    assert LOCK in marked
    small.restore()
    assert not any("<<<<<<< " in small.read(f) for f in marked)
    assert values(small)["dataset"]["seed"] == 7
    assert values(small)["trainer"]["learning_rate"] == 0.01


def test_pins_of_both_sides_stay(small: Small) -> None:
    pins = {"other": ("org/a@main", "a" * 40), "main": ("org/b@main", "b" * 40)}
    for branch, (entry, commit) in pins.items():
        small.run("git", "switch", "-q", branch)
        (small.root / "conf/revisions.yaml").write_text(
            yaml.safe_dump({"models": {entry: commit}}, default_style='"')
        )
        small.commit()
    small.run("git", "merge", "other", check=False)
    assert "conf/revisions.yaml" in small.unmerged()
    small.restore()
    found = yaml.safe_load(small.read("conf/revisions.yaml"))
    assert found == {"models": dict(pins.values())}


def test_git_never_mixes_what_is_generated() -> None:
    """The list in capas/core/generated.py, dvc.yaml and .gitattributes agree."""
    tracked = subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).split()
    generated = [path for path in tracked if is_generated(path)]
    asked = ["git", "check-attr", "merge", "--", *generated]
    lines = subprocess.check_output(asked, cwd=REPOSITORY, text=True).splitlines()
    unset = {line.split(": ")[0] for line in lines if line.endswith(": unset")}
    assert unset == set(generated) - set(BY_KEY)
    assert [path for path in uncached(REPOSITORY) if not is_generated(path)] == []
    outs = {out for spec in StageSpec.read_all(REPOSITORY).values() for out in spec.outs}
    assert {p for p in generated if p.startswith("reports/")} <= outs | {"reports/.gitignore"}
    assert len(generated) > 20
    assert not any(
        map(is_generated, ("conf/config.yaml", "capas/core/dag.py", "requirements.lock"))
    )


def test_a_newer_upstream_is_merged_and_what_runs_again_is_said(
    forked: Small, tmp_path: Path
) -> None:
    """Upstream changed code and its lock; the user a value, with a lock of his own."""
    (tmp_path / "upstream").mkdir()
    upstream = Small.make(tmp_path / "upstream")
    upstream.run("git", "clone", "-q", ".", str(tmp_path / "user"))
    user = Small(tmp_path / "user")
    shutil.copytree(upstream.root / "data", user.root / "data")
    user.run("git", "config", "user.name", "user")
    user.run("git", "config", "user.email", "user@example.org")
    (upstream.root / "stages/prepare.py").write_text("first = 2\n")
    assert upstream.remake() == ["prepare", "train"]
    upstream.commit()
    user.override(lora={"r": 4})
    user.commit()
    (user.root / "notes.txt").write_text("not committed\n")

    said = user.run("python", "-m", "capas.workspace.update")
    assert "merging 1 commit(s) of origin HEAD" in said
    assert "resolved: dvc.lock" in said
    assert user.run("git", "status", "--porcelain") == "?? notes.txt\n"
    assert user.run("git", "log", "-1", "--format=%P").count(" ") == 1
    assert values(user)["lora"]["r"] == 4
    due = user.run("python", "-m", "capas.workspace.due")
    assert "train            data/raw" in due or "train            after" in due
    (user.root / "data/raw").write_bytes((upstream.root / "data/raw").read_bytes())  # dvc pull
    assert user.remake() == ["train"]
    assert "has nothing newer" in user.run("python", "-m", "capas.workspace.update", "origin/main")


def test_an_update_says_what_is_wrong(forked: Small, tmp_path: Path) -> None:
    small = Small(Path(shutil.copytree(forked.root, tmp_path / "home", symlinks=True)))
    said = small.run("python", "-m", "capas.workspace.update", check=False)
    assert "there is no git remote to update from" in said
    said = small.run("python", "-m", "capas.workspace.update", str(tmp_path / "none"), check=False)
    assert "does not appear to be a git repository" in said
    small.override(lora={"r": 2})  # not committed
    said = small.run("python", "-m", "capas.workspace.update", ".", check=False)
    assert "nothing newer" in said
    small.run("git", "remote", "add", "upstream", ".")
    said = small.run("python", "-m", "capas.workspace.update", "upstream/other", check=False)
    assert "would be overwritten by merge" in said and "Traceback" not in said
    assert values(small)["lora"]["r"] == 2


def test_the_digest_of_the_stand_in_is_capas_own(small: Small) -> None:
    assert small.read("params.yaml") == dump(values(small))
    assert isinstance(small, Workspace)
