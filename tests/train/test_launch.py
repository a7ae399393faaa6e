"""Ranks from the environment, and errors on all ranks."""

import threading

import pytest
import torch

from sinklm.train import launch
from sinklm.train.launch import SameOnAllRanks, World, fill_environment, first_host


def test_without_a_launcher_there_is_one_rank():
    environment: dict[str, str] = {}
    fill_environment(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("0", "1", "0")


def test_the_variables_of_a_launcher_are_kept():
    theirs = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_STEP_NUM_TASKS": "2"}
    environment = dict(theirs)
    fill_environment(environment)
    assert environment == theirs


def test_the_variables_of_srun_are_used():
    environment = {
        "SLURM_PROCID": "9",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[003-004]",
        "SLURM_JOB_ID": "123456",
    }
    fill_environment(environment)
    assert [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["9", "16", "1"]
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("gpu003", "13456")


def test_a_batch_script_without_srun_is_one_process():
    environment = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}
    fill_environment(environment)
    assert environment["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("gpu[003-007,9],login", "gpu003"),
        ("n[7,8]", "n7"),
        ("rack-2-node[10-12]", "rack-2-node10"),
        ("rack[1-2]node[03,05],x", "rack1node03"),
        ("gpu[7-8]-ib", "gpu7-ib"),
    ],
)
def test_the_first_host(nodes, first):
    assert first_host(nodes) == first


def test_a_node_list_without_a_host_is_an_error():
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        first_host("")


def test_steps_of_one_job_have_ports_of_their_own():
    ports = set()
    for step in range(16):
        environment = {
            "SLURM_PROCID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_LOCALID": "0",
            "SLURM_STEP_NODELIST": "a",
            "SLURM_JOB_ID": "29999",
            "SLURM_STEP_ID": str(step),
        }
        fill_environment(environment)
        ports.add(environment["MASTER_PORT"])
    assert len(ports) == 16
    assert all(10_000 <= int(port) < 30_000 for port in ports)
    del environment["RANK"], environment["WORLD_SIZE"]
    with pytest.raises(ValueError, match="SLURM_STEP_ID is 'batch': it must be a whole number"):
        fill_environment(environment | {"SLURM_STEP_ID": "batch"})


def test_an_error_on_one_rank_is_an_error_on_all():
    class World3(World):
        def gather(self, value):
            return [None, value, None]

    with (
        pytest.raises(SameOnAllRanks, match="cannot save: rank 1: full"),
        World3(1, 3, 0, None).all_or_none("cannot save: "),
    ):
        raise OSError("full")


def test_an_error_of_all_ranks_is_reported_once():
    class World3(World):
        def gather(self, value):
            return [value] * 3

    with pytest.raises(SameOnAllRanks, match=r"^wrong key$"), World3(1, 3, 0, None).all_or_none():
        raise ValueError("wrong key")


def test_an_error_without_a_text_is_named_by_its_type():
    world = World(0, 1, 0, torch.device("cpu"))
    with pytest.raises(SameOnAllRanks, match=r"^cannot save: TimeoutError$"), world.all_or_none("cannot save: "):
        raise TimeoutError


def test_ranks_that_cannot_connect_are_told_what_to_set():
    message = r"^rank 1 of 2 on \S+ cannot connect to the other ranks \(refused\)\. Check .* set GLOO_SOCKET_IFNAME"
    with pytest.raises(ConnectionError, match=message), launch._connecting(1, 2):
        raise RuntimeError("refused\nmore")


def test_a_rank_that_connects_forever_ends(monkeypatch, capfd):
    statuses, has_ended = [], threading.Event()
    monkeypatch.setattr(launch, "LONGEST_JOIN", 0.01)
    monkeypatch.setattr(launch.os, "_exit", lambda status: (statuses.append(status), has_ended.set()))
    with launch._connecting(1, 2):
        assert has_ended.wait(10)
    assert statuses == [1]
    assert capfd.readouterr().err.startswith("error: rank 1 of 2 on ")
