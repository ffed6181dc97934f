"""The real torchtitan, whose trainer trains its debug model with FSDP2 on two ranks, with the engine's checkpoints."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from snapstone import Checkpoint, verify
from trainers.torchtitan_jobs import Job, contents, differences, flags, make_assets, steps_in, train

pytestmark = pytest.mark.timeout(600)

STEPS = 6
FULL = {"last_save_model_only": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_assets(tmp_path_factory.mktemp("titan"))


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    """A run that nothing interrupts and whose saves are synchronous: step-2, step-4, step-6."""
    log = train(folder, *flags(STEPS, "straight", **FULL))
    assert "[Override] snapstone.integrations.torchtitan.use: checkpoint CheckpointManager.Config ->" in log
    assert log.count("Finished saving the checkpoint in") == 2
    assert log.count(" - snapstone - INFO - durable ") == 3
    path = folder / "outputs" / "straight"
    assert steps_in(path) == [2, 4, 6]
    for step in (2, 4, 6):
        assert verify(path / f"step-{step}", level="full")
        assert (path / f"step-{step}" / ".metadata").is_file()
    return path


def await_sight(job: Job, what: str, seen: object, timeout: float = 200) -> None:
    end = time.monotonic() + timeout
    while not seen():  # type: ignore[operator]
        assert time.monotonic() < end, f"{what} was not seen\n{job.stacks()}"
        assert all(process.poll() is None for process in job.processes), f"ended before {what}\n{job.log()}"
        time.sleep(0.02)


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_a_run_killed_in_an_asynchronous_save_ends_bit_for_bit_as_one_that_was_not(
    folder: Path, straight: Path, mode: str
) -> None:
    """Every rank gets SIGKILL while the checkpoint of step 4 is written and step 5 has been trained. The snapshot of
    step 2 takes longer than a step, since there is staging memory for a third of the state and the disk is slow.
    """
    name = f"killed-{mode}"
    path = folder / "outputs" / name
    slow = {"SNAPSTONE_IO": "buffered", "SNAPSTONE_HOST_MEMORY_BUDGET": str(8 << 20)}
    held = {0: {"SNAPSTONE_FAULT": "pwrite:1+:delay=10;renameat2:2:delay=60000"}}
    with Job(folder, *flags(STEPS, name, mode, **FULL), env=slow, env_of_rank=held) as job:
        await_sight(job, "step 5 during the save of step 4", lambda: "step:  5" in job.log(0))
        assert steps_in(path) == [2]
        assert list(path.glob(".staging-*"))
        job.kill()
    assert steps_in(path) == [2]
    assert differences(contents(path / "step-2"), contents(straight / "step-2")) == []
    log = train(folder, *flags(STEPS, name, mode, **FULL))
    assert f"Loading the checkpoint from ./outputs/{name}/step-2." in log
    assert "Training starts at step 3" in log
    for step in (4, 6):
        assert differences(contents(path / f"step-{step}"), contents(straight / f"step-{step}")) == []


def test_a_rank_that_dies_at_the_commit_costs_one_checkpoint(folder: Path, straight: Path) -> None:
    """And options of the engine reach it: the resumed run's saves are deltas, compressed."""
    path = folder / "outputs" / "dies"
    dies = {0: {"SNAPSTONE_FAULT": "renameat2:2:kill"}}
    with Job(folder, *flags(STEPS, "dies", "async", **FULL), env_of_rank=dies) as job:
        assert job.wait()[0] == -9
    assert steps_in(path) == [2]
    train(folder, *flags(STEPS, "dies", "async", **FULL), engine={"codec": "xor-zstd", "base": "auto", "fence": "now"})
    assert differences(contents(path / "step-6"), contents(straight / "step-6")) == []
    assert (path / "step-6" / "base").is_dir() or "xor" in (path / "step-6" / "MANIFEST.json").read_text()


def test_a_checkpoint_from_before_the_switch_is_resumed_and_replaced(folder: Path, straight: Path) -> None:
    """torchtitan's own manager wrote it. What else it left, unfinished, is in nobody's way."""
    train(folder, *flags(4, "switched", **FULL), engine=None)
    path = folder / "outputs" / "switched"
    (path / "step-4" / ".metadata").unlink()  # the job died in its last save
    log = train(folder, *flags(STEPS, "switched", **FULL))
    assert "Loading the checkpoint from ./outputs/switched/step-2." in log
    assert "no random generators" in log
    for step in (4, 6):
        ours = contents(path / f"step-{step}", without=("rng.",))
        assert differences(ours, contents(straight / f"step-{step}", without=("rng.",))) == []
    assert sorted(one.name for one in path.iterdir()) == ["step-2", "step-4", "step-6"]


def test_a_job_goes_back_to_torchtitans_own_checkpoints_by_the_recipe_of_the_docs(folder: Path, straight: Path) -> None:
    state = Checkpoint.open(straight / "step-4").state_dict()
    state.pop("rng", None)
    dcp.save(state, checkpoint_id=folder / "outputs" / "back" / "step-4", no_dist=True)
    log = train(folder, *flags(STEPS, "back", **FULL), engine=None)
    assert "Loading the checkpoint from ./outputs/back/step-4." in log
    dcp_to_torch_save(folder / "outputs" / "back" / "step-6", folder / "back.pt")
    back = torch.load(folder / "back.pt", weights_only=True)
    back.update({f"optimizer.{name}": value for name, value in back.pop("optimizer").items()})
    ours = Checkpoint.open(straight / "step-6").load_tensors()
    kept = {name: value for name, value in ours.items() if not name.startswith("rng.")}
    assert len(kept) > 50
    assert differences({name: back[name] for name in kept}, kept) == []


@pytest.mark.parametrize(
    ("ranks", "degrees"),
    [(1, []), (2, ["--parallelism.tensor_parallel_degree=2"])],
    ids=["one rank", "tensor parallel"],
)
def test_other_ranks_and_degrees_get_the_same_state_and_train_on(
    folder: Path, straight: Path, ranks: int, degrees: list[str]
) -> None:
    name = f"other-{ranks}"
    shutil.copytree(straight / "step-6", folder / "outputs" / name / "here" / "step-6")
    arguments = [*flags(7, f"{name}/here", "async", exclude_from_loading="dataloader", **FULL), *degrees]
    log = train(folder, *arguments, ranks=ranks, env={"SNAPSTONE_TEST_ACTION": "resave"})
    assert "Training starts at step 7" in log
    apart = ("rng.", "dataloader.")
    resaved = contents(folder / "outputs" / name / "resaved" / "step-6", without=apart)
    saved = contents(straight / "step-6", without=apart)
    tensors = {key for key in saved if " of rank " not in key}
    assert tensors
    assert differences({key: resaved[key] for key in tensors}, {key: saved[key] for key in tensors}) == []
    assert ("seeded anew" in log) == (ranks == 1)
    assert steps_in(folder / "outputs" / name / "here") == [6, 7]


def test_a_changed_number_of_data_parallel_ranks_says_what_to_leave_out(folder: Path, straight: Path) -> None:
    shutil.copytree(straight / "step-6", folder / "outputs" / "refused" / "step-6")
    with Job(folder, *flags(7, "refused", **FULL), "--parallelism.tensor_parallel_degree=2") as job:
        assert 0 not in job.wait()
        assert "dp_degree is inconsistent" in job.log()


def test_retention_counts_what_is_committed_and_an_old_one_goes_only_after_a_newer_one_is_durable(folder: Path) -> None:
    """The run starts from a seed checkpoint and ends with an export for Hugging Face."""
    path = folder / "outputs" / "kept"
    log = train(folder, *flags(1, "kept"), "--checkpoint.create_seed_checkpoint", ranks=1)
    assert "Created seed checkpoint" in log
    assert steps_in(path) == [0]
    unfinished = path / "step-1000"  # what a crash left of torch's writer, say
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"part")
    held = {0: {"SNAPSTONE_FAULT": "renameat2:1+:delay=700"}}
    seen: list[list[int]] = []
    arguments = flags(6, "kept", "async", interval=1, keep_latest_k=2, last_save_in_hf=True, last_save_model_only=True)
    with Job(folder, *arguments, env_of_rank=held) as job:
        while any(process.poll() is None for process in job.processes):
            now = steps_in(path)
            if not seen or seen[-1] != now:
                seen.append(now)
            time.sleep(0.005)
        assert job.wait() == [0, 0], job.log()
        log = job.log(0)
    assert "Loading the checkpoint from ./outputs/kept/step-0." in log
    assert "Training starts at step 1" in log
    committed = [[step for step in steps if step != 1000] for steps in seen]
    first = next(number for number, steps in enumerate(committed) if len(steps) == 2)
    assert all(len(steps) >= 2 for steps in committed[first:]), committed
    assert steps_in(path) == [4, 5, 6, 1000]
    assert list(path.glob("step-6/*.safetensors"))
    assert not [one.name for one in path.iterdir() if one.name.startswith(".")]
    assert [one.name for one in unfinished.iterdir()] == ["__0_0.distcp"]


def test_a_rank_that_does_not_see_the_folder_never_begins_anew_beside_others(folder: Path, straight: Path) -> None:
    """As on a file system that tells one machine late what another has made."""
    shutil.copytree(straight / "step-2", folder / "outputs" / "unseen" / "step-2")
    blind = {1: {"SNAPSTONE_TEST_ACTION": "see_no_folder"}}
    with Job(folder, *flags(3, "unseen", **FULL), env_of_rank=blind) as job:
        assert 0 not in job.wait()
        assert "load_step=2 not found" in job.log(1)
        assert "fresh start" not in job.log()


def test_states_that_are_excluded_from_loading_stay_as_the_job_made_them(folder: Path, straight: Path) -> None:
    """All but the model, by the names that torchtitan has, and by ours for the generators."""
    shutil.copytree(straight / "step-6", folder / "outputs" / "apart" / "here" / "step-6")
    names = "optimizer,lr_scheduler,dataloader,train_state,rng"
    arguments = flags(1, "apart/here", exclude_from_loading=names, **FULL)
    log = train(folder, *arguments, env={"SNAPSTONE_TEST_ACTION": "resave"})
    assert "Training starts at step 1" in log
    resaved, saved = contents(folder / "outputs" / "apart" / "resaved" / "step-0"), contents(straight / "step-6")
    same = {name for name in saved if name in resaved} - set(differences(resaved, saved))
    weights = {name for name in saved if name.startswith(("layers.", "tok_embeddings.", "norm.", "lm_head."))}
    assert weights
    assert weights <= same
    moments = {name for name in saved if name.startswith("optimizer.") and name.endswith(("exp_avg", "exp_avg_sq"))}
    assert moments
    assert not moments & same
