"""A training in several processes is the training in one, and ends, fails and goes on like it."""

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import holding
import psutil
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from servers import free_port
from tiny import REPOSITORY, read_json, read_params, run_stage
from torch.utils.data import BatchSampler, SequentialSampler
from trainings import ADAPTER, history, prepared, results, run_in_process, run_until, wait_for

from capas.core.cores import MAX_THREADS
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.core.records import read_records
from capas.training import capacity, launch
from capas.training.base_model import load_plain
from capas.training.batches import Collator, Filled, LengthGroupedSampler, make_filler
from capas.training.record_scores import FILE, SCHEMA
from stages import quantize_model, train_lora

# 40 records, 12 a step: the last step of an epoch has 4. The last batch of an evaluation has 2 of 4 records.
COMMON = (
    *(
        "trainer.num_train_epochs=10",
        "trainer.max_steps=-1",
        "trainer.gradient_accumulation_steps=2",
    ),
    *("trainer.logging_steps=3", "trainer.eval_steps=10", "trainer.save_steps=30"),
    "trainer.per_device_eval_batch_size=2",
)
ALONE = (*COMMON, "trainer.per_device_train_batch_size=6")
TWO = (*COMMON, "trainer.per_device_train_batch_size=3", "hardware.num_processes=2")
HARDWARE_DIVIDED = {"distributed_type": "fsdp2"}
HARDWARE = {
    **{"device": "cuda", "num_threads": 4, "num_processes": 8, "num_machines": 1},
    "instruction_set": "native",
}


def quantized(root: Path, *options: str) -> Path:
    prepared(root, *options)
    run_stage("quantize", quantize_model.main, root)
    return root


def launched(root: Path, **env: str) -> str:
    """What the stage says, which must succeed."""
    process = run_in_process(root, **env)
    said: str = process.communicate()[0]
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = prepared(tmp_path_factory.mktemp("alone"), *ALONE)
    run_stage("train", train_lora.main, root)
    return root


class Stopped(NamedTuple):
    """A training in two processes, what both starts of it say, and the files of the step in between."""

    root: Path
    first: str
    second: str
    saved: set[str]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """Two processes that are told to end, and the same command again."""
    root = prepared(tmp_path_factory.mktemp("two"), *TWO)
    process = run_until(root, 13)
    process.send_signal(signal.SIGTERM)
    first = process.communicate()[0]
    assert process.returncode == 1, first
    assert not (root / ADAPTER).exists()
    saved = {file.name for file in (root / ".dvc/tmp/checkpoints").glob("*/checkpoint-*/*")}
    return Stopped(root, first, launched(root), saved)


@pytest.fixture(scope="module")
def two(stopped: Stopped) -> Path:
    return stopped.root


def test_two_processes_have_the_losses_of_one(alone: Path, two: Path) -> None:
    for name in ("history", "validation"):
        one, other = history(alone, name), history(two, name)
        assert [row["step"] for row in one] == [row["step"] for row in other]
        losses = [[row["loss"] for row in rows] for rows in (one, other)]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert history(two)[-1]["loss"] < history(two)[0]["loss"] - 0.1


def test_two_processes_score_each_record_as_one_does(alone: Path, two: Path) -> None:
    one, other = (list(read_records(root / FILE, SCHEMA)) for root in (alone, two))
    assert [row["id"] for row in one] == [row["id"] for row in other]
    losses = [[row["loss_sum"] for row in rows] for rows in (one, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_two_processes_count_what_one_counts(alone: Path, two: Path) -> None:
    facts = [read_json(root / "reports/train.json") for root in (alone, two)]
    for name in ("num_steps", "num_epochs", "num_train_tokens", "num_supervised_tokens"):
        assert facts[0][name] == facts[1][name] > 0
    assert facts[0]["global_batch_size"] == facts[1]["global_batch_size"] == 12
    used = facts[1]["used"]["accelerate"]
    assert (used["distributed_type"], used["num_processes"]) == ("MULTI_CPU", 2)
    assert facts[0]["used"] | {"accelerate": used} == facts[1]["used"]


def test_one_process_writes_and_the_others_leave_nothing(two: Path) -> None:
    certificate = read_json(two / "reports/certificate.json")
    assert certificate["params"]["hardware"]["num_processes"] == 2
    assert certificate["global_batch_size"] == 12
    assert not list(two.rglob(".*.partial"))
    assert not list((two / ".dvc/tmp").glob("launch-*"))
    cost = read_json(two / "reports/timings/train.json")
    assert cost["peak_memory_bytes"] > 2e8  # of a process that trains, not of the one that waits
    assert cost["estimated_memory_parts"]["gradient_buckets"] > 0


def test_told_to_end_both_save_their_step_and_go_on(stopped: Stopped) -> None:
    assert stopped.first.count("stopped by SIGTERM at step 14 of 40. A checkpoint was saved") == 1
    assert "Traceback" not in stopped.first
    assert "elastic" not in stopped.first
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= stopped.saved
    assert "resuming from checkpoint-14" in stopped.second
    assert "2 processes share the memory" in stopped.second
    plan = "2 processes x 3 x accumulation 2 = 12 rows per step; 4 steps per epoch, 40 in total"
    assert stopped.first.count(plan) == 1
    assert len(re.findall("40 steps done", stopped.second)) == 1


@pytest.mark.slow
def test_undisturbed_both_end_in_the_same_bytes(two: Path, tmp_path: Path) -> None:
    root = prepared(tmp_path, *TWO)
    assert len(re.findall("40 steps done", launched(root))) == 1
    assert results(root) == results(two)


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_told_once_and_in_words(tmp_path: Path) -> None:
    root = prepared(tmp_path, *TWO, "trainer.learning_rate=1.0e+30")
    process = run_in_process(root)
    said = process.communicate()[0]
    assert process.returncode == 1
    assert len(re.findall(r"^train: the loss is nan at step \d", said, re.M)) == 1
    assert "Traceback" not in said
    assert "elastic" not in said
    assert not (root / ADAPTER).exists()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_and_the_training_goes_on(
    two: Path, tmp_path: Path
) -> None:
    """First one of the processes, then the stage itself, whose processes end with it."""
    options = (*TWO, "trainer.save_steps=3")
    root = prepared(tmp_path / "killed", *options)
    whole = prepared(tmp_path / "whole", *options)
    launched(whole)
    process = run_until(root, 10)
    family = psutil.Process(process.pid).children(recursive=True)
    next(p for p in family if p.environ().get("RANK") == "1").kill()
    (root / holding.HELD).unlink()
    said = process.communicate()[0]
    assert process.returncode == 1
    assert "train: process 1 was killed by SIGKILL (possibly out of memory)" in said
    assert "Traceback" not in said

    process = run_until(root, 22)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert len(family) >= 3
    assert alive == []
    assert "resuming from checkpoint-21" in launched(root)
    assert results(root) == results(whole)


@pytest.mark.slow
def test_ctrl_c_is_answered_once(tmp_path: Path) -> None:
    root = prepared(tmp_path, *TWO, "trainer.num_train_epochs=1000")
    process, live = run_in_process(root), root / ".dvc/tmp/live"
    wait_for(lambda: any('"step": 12' in f.read_text() for f in live.glob("*.jsonl")), process)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 1
    (step,) = re.findall(
        r"train: stopped by Ctrl-C at step (\d+) of \d+\. A checkpoint was saved", said
    )
    assert "Traceback" not in said
    assert list((root / ".dvc/tmp/checkpoints").glob(f"*/checkpoint-{step}/complete.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        (
            *("trainer.gradient_checkpointing=true", "trainer.bf16=true", "lora.use_dora=true"),
            *("trainer.packing_length=256", "trainer.loraplus_lr_ratio=4", "quantization=nf4"),
        ),
        (
            *("quantization=int8", "trainer.optim=adamw_8bit", "trainer.save_steps=10"),
            *("trainer.load_best_model_at_end=true", "trainer.early_stopping_patience=2"),
            "trainer.train_sampling_strategy=random",
        ),
    ],
)
def test_what_one_process_can_two_can(tmp_path: Path, options: tuple[str, ...]) -> None:
    one = quantized(tmp_path / "one", *ALONE, *options)
    run_stage("train", train_lora.main, one)
    other = quantized(tmp_path / "two", *TWO, *options)
    launched(other)
    losses = [[row["loss"] for row in history(root, "validation")] for root in (one, other)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    kept = [read_json(root / "reports/train.json")["kept_step"] for root in (one, other)]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_two_processes_share_the_answers_that_choose_the_checkpoint(tmp_path: Path) -> None:
    """Five answers: the shares differ, and the scores tell whose were gathered."""
    source = "def own(completion, reference, record):\n    return int(record['id'][-1]) / 10\n"
    options = ("trainer.metric_for_best_model=conf/x.py:own", "trainer.metric_records=5")
    roots = []
    for name, shared in (("one", ALONE), ("two", TWO)):
        root = prepared(tmp_path / name, *shared, *options)
        composed = root / "data/composed/checkpoint_metric.json"
        composed.write_text(json.dumps({"sources": {"conf/x.py": source}}))
        said = launched(root)
        assert "answers to 5 of 6 validation records" in said
        roots.append(root)
    scores = [[row["own"] for row in history(root, "validation")] for root in roots]
    assert scores[0] == scores[1] and len(set(scores[0])) == 1


@pytest.mark.slow
def test_three_processes_resume_to_the_same_bytes(tmp_path: Path) -> None:
    """Sums of three numbers depend on their order, and that on the buckets of DDP."""
    options = (*TWO, "hardware.num_processes=3", "trainer.save_steps=7", "lora.lora_dropout=0.1")
    whole = prepared(tmp_path / "whole", *options)
    launched(whole)
    root = prepared(tmp_path / "stopped", *options)
    process = run_until(root, 10)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    launched(root)
    assert results(root) == results(whole)


FAKE_SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
command = words[next(i for i, word in enumerate(words) if not word.startswith("--")):]
nodes = [subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": n}}) for n in "01"]
sys.exit(max(node.wait() for node in nodes))
"""


def fake_slurm(folder: Path) -> dict[str, str]:
    """srun that starts both nodes here, and the environment of a job."""
    folder.mkdir()
    scripts = {
        "srun": FAKE_SRUN.format(python=sys.executable),
        "scontrol": '#!/bin/sh\n[ "$*" = "show hostnames local[1-2]" ] && echo "localhost\nother"\n',
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    ports = range(launch._FIRST_PORT, launch._FIRST_PORT + launch._NUM_PORTS)
    while (port := free_port()) not in ports:
        continue
    job = {"SLURM_JOB_ID": str(port), "SLURM_JOB_NUM_NODES": "2"}
    return job | {"SLURM_JOB_NODELIST": "local[1-2]", "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_two_machines_of_a_job_give_the_bytes_of_one(two: Path, tmp_path: Path) -> None:
    root = prepared(tmp_path / "work", *TWO, "hardware.num_machines=2")
    launched(root, **fake_slurm(tmp_path / "bin"))
    assert (root / ADAPTER).read_bytes() == (two / ADAPTER).read_bytes()
    assert history(root) == history(two)


# accelerate divides models among GPUs alone; torch does so among CPUs, too.
AS_GPUS = """
import os
if "RANK" in os.environ:
    from accelerate import state
    from accelerate.utils import DistributedType

    begin = state.PartialState.__init__

    def begin_as_gpus(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    state.PartialState.__init__ = begin_as_gpus
"""
DIVIDED = (*TWO, "hardware.distributed_type=fsdp2")


def as_gpus(folder: Path) -> dict[str, str]:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(AS_GPUS)
    return {"PYTHONPATH": f"{folder}:{REPOSITORY}"}


@pytest.mark.slow
def test_a_divided_model_learns_what_a_whole_one_learns(two: Path, tmp_path: Path) -> None:
    root = prepared(tmp_path / "work", *DIVIDED)
    launched(root, **as_gpus(tmp_path / "as_gpus"))
    for name in ("history", "validation"):
        losses = [[row["loss"] for row in history(r, name)] for r in (two, root)]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    weights, whole = load_file(root / ADAPTER), load_file(two / ADAPTER)
    torch.testing.assert_close(weights, whole, rtol=0, atol=1e-4)
    used = read_json(root / "reports/train.json")["used"]["accelerate"]
    assert (used["distributed_type"], used["num_processes"]) == ("FSDP", 2)
    checks = read_json(root / "reports/certificate.json")["checks"]
    assert (
        checks["base_sha256"]
        == read_json(two / "reports/certificate.json")["checks"]["base_sha256"]
    )


@pytest.mark.slow
def test_a_divided_training_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    options, env = (*DIVIDED, "trainer.save_steps=7"), as_gpus(tmp_path / "as_gpus")
    whole = prepared(tmp_path / "whole", *options)
    launched(whole, **env)
    root = prepared(tmp_path / "stopped", *options)
    process = run_until(root, 10, **env)
    process.send_signal(signal.SIGTERM)
    assert "A checkpoint was saved" in process.communicate()[0]
    assert "resuming from checkpoint-" in launched(root, **env)
    assert results(root) == results(whole)


def test_a_model_that_comes_quantized_is_not_divided(tmp_path: Path) -> None:
    root = quantized(tmp_path, *TWO, "quantization=nf4")
    params = Params({**read_params("train", root).without(), "hardware": HARDWARE_DIVIDED})
    with pytest.raises(
        CapasError, match=r"fsdp2 cannot shard data/embedded, .* are nf4\. Choose ddp"
    ):
        load_plain(root / "data/models/quantized", params, torch.device("cpu"))


OPTIONS = (
    *("--num_processes", "8", "--num_machines", "{machines}"),
    *("--num_cpu_threads_per_process", "4", "--gpu_ids", "all"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
AGENT = (sys.executable, "-m", "capas.training.local_agent", "--multi_gpu")


def test_one_machine_has_one_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MAX_THREADS, raising=False)  # of pytest's workers
    command = launch.agents(Params(HARDWARE), Path("stages/train_lora.py"), {"SLURM_JOB_ID": "7"})
    options = [word.format(machines=1) for word in OPTIONS]
    assert command == [*AGENT, *options, "--main_process_port", "0", "stages/train_lora.py"]


def test_a_job_of_slurm_has_an_agent_on_each_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = fake_slurm(tmp_path / "bin") | {"SLURM_JOB_ID": "123456", "SLURM_CPUS_PER_TASK": "16"}
    monkeypatch.setenv("PATH", job["PATH"])
    monkeypatch.delenv(MAX_THREADS, raising=False)
    hardware = Params({**HARDWARE, "num_machines": 2})
    command = launch.agents(hardware, Path("stages/train_lora.py"), job)
    assert command == [
        *("srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=16"),
        *(*AGENT, *[word.format(machines=2) for word in OPTIONS]),
        *("--main_process_port", "23456", "--main_process_ip", "localhost"),
        "stages/train_lora.py",
    ]


@pytest.mark.parametrize(
    ("job", "found"),
    [({}, "no SLURM job"), ({"SLURM_JOB_NUM_NODES": "1"}, "a SLURM job with 1")],
)
def test_several_machines_need_a_job_that_has_them(job: dict[str, str], found: str) -> None:
    hardware = Params({**HARDWARE, "num_machines": 2})
    with pytest.raises(CapasError, match=rf"num_machines=2, .*{found}.*sbatch --nodes=2 "):
        launch.agents(hardware, Path("x.py"), job)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("num_records", [40, 41, 48, 5])
def test_a_step_has_the_same_records_in_any_number_of_processes(
    processes: int, num_records: int
) -> None:
    """And every record is seen once."""
    lengths, size, steps = [(37 * i) % 11 for i in range(num_records)], 4, 2
    for order in (
        SequentialSampler(range(num_records)),
        LengthGroupedSampler(lengths, processes * size * steps, seed=0),
    ):
        of_step = processes * size * steps
        records = list(order)
        expected = [sorted(records[i : i + of_step]) for i in range(0, num_records, of_step)]
        filled = BatchSampler(Filled(order, processes * size, num_records), size, drop_last=False)
        shards = [list(BatchSamplerShard(filled, processes, rank)) for rank in range(processes)]
        assert len({len(shard) for shard in shards}) == 1
        found = [
            sorted(i for shard in shards for batch in shard[at : at + steps] for i in batch)
            for at in range(0, len(shards[0]), steps)
        ]
        assert [[i for i in step if i < num_records] for step in found] == expected


def test_what_fills_up_a_batch_is_no_record_and_carries_no_loss() -> None:
    for row in (
        {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([5, 6]), "id": "a"},
        {
            "input_ids": torch.tensor([5, 6]),
            "labels": torch.tensor([-100, 6]),
            "position_ids": torch.tensor([0, 0]),
            "ids": ["a", "b"],
        },
    ):
        filler = make_filler(row)
        batch = Collator(pad_token_id=9)([filler, row])
        assert batch["labels"][0].tolist() == [-100, -100]
        assert filler["ids"] == []


def test_processes_share_the_memory_of_a_cpu_and_none_of_a_gpu() -> None:
    shares = {"cpu": 4, "cuda": 1}
    for device, share in shares.items():
        hardware = Params({**HARDWARE, "device": device, "num_machines": 2})
        assert capacity.num_sharing(hardware) == share


def test_only_the_first_to_fail_says_why(tmp_path: Path) -> None:
    assert launch.is_first(tmp_path)
    assert not launch.is_first(tmp_path)
    assert not launch.is_first(tmp_path / "gone")
