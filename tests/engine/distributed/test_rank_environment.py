"""Which rank a process is, from launchers' variables and from variables that outlived their launcher."""

import pytest

from iwm_fast.data.views import devices
from iwm_fast.engine.distributed.rank_environment import ALONE, Place, device_index, place_of
from iwm_fast.errors import UserError

MEETING = {"MASTER_ADDR": "host-a", "MASTER_PORT": "29500"}
TORCHRUN = MEETING | {
    "RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "run1",
}  # fmt: skip
DEEPSPEED = MEETING | {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "0", "CROSS_SIZE": "1",
}  # fmt: skip
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = BATCH | {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_SRUN_COMM_HOST": "10.0.0.1",
}  # fmt: skip

PLACES = {
    "nothing set": ({}, ALONE),
    "torchrun": (TORCHRUN, Place(11, 16, 3, 8, "torchrun")),
    "deepspeed": (DEEPSPEED, Place(1, 2, 1, 2, "deepspeed")),
    "RANK by hand": (MEETING | {"RANK": "1", "WORLD_SIZE": "2"}, Place(1, 2, 0, 1, "environment")),
    "one rank needs no rendezvous": ({"RANK": "0", "WORLD_SIZE": "1"}, Place(launcher="environment")),
    "WORLD_SIZE of one": ({"WORLD_SIZE": "1"}, ALONE),
    "an old MASTER_ADDR": ({"MASTER_ADDR": "gone", "MASTER_PORT": "x", "LOCAL_RANK": ""}, ALONE),
    "torchrun in a batch script": (BATCH | TORCHRUN, Place(11, 16, 3, 8, "torchrun")),
    "torchrun in a task of srun": (SRUN | TORCHRUN, Place(11, 16, 3, 8, "torchrun")),
    "srun": (SRUN | MEETING, Place(3, 5, 1, 2, "slurm")),
    "srun by its host alone": (
        {key: value for key, value in SRUN.items() if "STEP" not in key} | MEETING, Place(3, 4, 1, 2, "slurm"),
    ),
    "srun and WORLD_SIZE": (SRUN | MEETING | {"WORLD_SIZE": "5"}, Place(3, 5, 1, 2, "slurm")),
    "srun of one task": (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Place(0, 1, 1, 2)),
    "batch script of one task": (BATCH | {"SLURM_NTASKS": "1"}, ALONE),
    "mpirun of one process": ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, ALONE),
    "settings of Open MPI": ({"OMPI_MCA_btl": "self", "PMI_FD": "7"}, ALONE),
    "mpirun that sets RANK": (MEETING | {"OMPI_COMM_WORLD_SIZE": "2", "RANK": "1", "WORLD_SIZE": "2"},
                              Place(1, 2, 0, 1, "environment")),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_a_launcher_is_told_from_what_others_left_behind(name):
    env, place = PLACES[name]
    assert place_of(env) == place


@pytest.mark.parametrize("step", [None, "4294967291", "4294967294", "4294967290", "batch", "interactive"])
def test_slurm_without_srun_trains_alone_and_says_so(step):
    """A batch script (sbatch --wrap is one) and salloc's shell: nothing has started the other tasks."""
    env = BATCH | MEETING | ({} if step is None else {"SLURM_STEP_ID": step, "SLURM_SRUN_COMM_HOST": "10.0.0.1"})
    place = place_of(env)
    assert (place.rank, place.world, place.launcher) == (0, 1, "alone")
    assert "4 tasks" in place.note
    assert "srun iwm-fast pretrain" in place.note


WRONG = {
    "rank above": (TORCHRUN | {"RANK": "16"}, "RANK is 16 and WORLD_SIZE is 16: ranks count from 0 to 15"),
    "negative rank": (TORCHRUN | {"RANK": "-1"}, "RANK is '-1'; it must be a whole number of at least 0"),
    "rank in words": (TORCHRUN | {"RANK": "one"}, "RANK is 'one'; it must be a whole number"),
    "empty rank": (TORCHRUN | {"RANK": ""}, "RANK is empty; it must be a whole number"),
    "empty world": ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is empty; it must be a whole number of at least 1"),
    "empty world alone": ({"WORLD_SIZE": " "}, "WORLD_SIZE is empty"),
    "no ranks": (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a whole number of at least 1"),
    "fraction": (TORCHRUN | {"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'; it must be a whole number"),
    "world without rank": (MEETING | {"WORLD_SIZE": "4"}, "WORLD_SIZE is 4 and RANK is not set: set both"),
    "rank without world": (MEETING | {"RANK": "0"}, "RANK is '0' and WORLD_SIZE is not set: set both"),
    "local rank above": (TORCHRUN | {"LOCAL_RANK": "8"}, "LOCAL_RANK is 8 and LOCAL_WORLD_SIZE is 8"),
    "local rank above deepspeed's": (DEEPSPEED | {"LOCAL_RANK": "2"}, "LOCAL_RANK is 2 and LOCAL_SIZE is 2"),
    "empty local rank": (TORCHRUN | {"LOCAL_RANK": ""}, "LOCAL_RANK is empty"),
    "empty local world": (TORCHRUN | {"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is empty"),
    "port in words": (TORCHRUN | {"MASTER_PORT": "auto"}, "MASTER_PORT is 'auto'; it must be a whole number from 1"),
    "port too large": (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
    "port 0": (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
    "empty port": (TORCHRUN | {"MASTER_PORT": ""}, "MASTER_PORT is not set: "),
    "empty address": (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set: "),
    "srun without rendezvous": (SRUN, r"MASTER_ADDR and MASTER_PORT are not set: export both .* srun --ntasks=1"),
    "two launchers": (SRUN | MEETING | {"WORLD_SIZE": "8"}, "WORLD_SIZE is 8 and this srun has 5 tasks"),
    "task above": (SRUN | MEETING | {"SLURM_PROCID": "5"}, "SLURM_PROCID is 5 and srun has 5 tasks"),
    "Open MPI": (MEETING | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE is 4: "),
    "MPICH": ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE is 2: .* to train alone, unset PMI_SIZE"),
}


@pytest.mark.parametrize("name", WRONG)
def test_variables_that_contradict_themselves_are_one_line(name):
    env, words = WRONG[name]
    with pytest.raises(UserError, match=words) as caught:
        place_of(env)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("local_rank", "visible", "index"),
    [(0, 1, 0), (3, 8, 3), pytest.param(3, 1, 0, id="one GPU shown to each task"), (7, 8, 7)],
)
def test_a_rank_takes_the_gpu_of_its_local_rank_or_the_only_one_it_is_shown(local_rank, visible, index):
    assert device_index(Place(local_rank, 8, local_rank, 8), visible) == index


def test_a_process_alone_takes_the_first_gpu():
    assert device_index(ALONE, 8) == 0


def test_a_local_rank_above_the_gpus_is_refused():
    with pytest.raises(UserError, match="rank 9: local rank 4 has no GPU of its own, 4 are visible"):
        device_index(Place(9, 16, 4, 8), 4)


@pytest.mark.parametrize(("said", "world", "threads"), [("8", 1, 12), ("", 1, 12), ("x", 2, 6), ("3", 6, 4)])
def test_an_old_number_of_local_ranks_takes_no_cores_from_a_process_alone(said, world, threads, monkeypatch):
    monkeypatch.setattr(devices, "usable_cores", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
    assert devices.dali_threads(None, world) == threads
