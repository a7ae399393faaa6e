"""The environment variables of ranks, and waiting for rank 0."""

import socket

import pytest

from sinklm.train import rendezvous
from sinklm.train.launch import fill_environment
from sinklm.train.rendezvous import await_rank_0, own_rank

from .tiny import free_port

TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
SLURM = {
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "a",
    "SLURM_JOB_ID": "1",
}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK is 'abc': it must be a whole number of at least 0; start the run"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK is 5, but WORLD_SIZE is 2: ranks count from 0 to 1; start the run"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0': it must be a whole number of at least 1"),
        ({"RANK": "0", "WORLD_SIZE": "1.5"}, "WORLD_SIZE is '1.5': it must be"),
        ({"RANK": "1"}, "WORLD_SIZE is not set, but other variables of a launcher are"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, but"),
        (TWO | {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x': it must be"),
        (TWO | {"LOCAL_RANK": "7"}, "LOCAL_RANK is 7, but RANK is 1: "),
        (TWO | {"LOCAL_WORLD_SIZE": "none"}, "LOCAL_WORLD_SIZE is 'none': it must be"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is 'many': it must be"),
        (SLURM | {"SLURM_PROCID": "-1"}, "SLURM_PROCID is '-1': it must be"),
        (SLURM | {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is '': it must be"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "contains no host name: set MASTER_ADDR"),
        ({name: SLURM[name] for name in SLURM if name != "SLURM_LOCALID"}, "SLURM_LOCALID is not set"),
    ],
)
def test_wrong_variables_are_named(environment, message):
    with pytest.raises(ValueError, match=message):
        fill_environment(dict(environment))


def test_the_own_rank():
    assert own_rank({}) == 0
    assert own_rank(SLURM) == 1
    assert own_rank(TWO | SLURM) == 1


@pytest.mark.parametrize(
    ("host", "port", "error", "message"),
    [
        ("", "1", ValueError, "MASTER_ADDR is not set: set both"),
        ("localhost", "99999", ValueError, "MASTER_PORT is 99999: set both .* from 1 to 65535"),
        ("localhost", "x", ValueError, "MASTER_PORT is 'x': it must be"),
        (
            "no-such-host.invalid",
            "29500",
            ConnectionError,
            "rank 1 cannot reach rank 0 at MASTER_ADDR=no-such-host.inv",
        ),
        ("a" * 300, "29500", ConnectionError, "rank 1 cannot reach rank 0 .*: check the address, the firewall, and"),
        ("127.0.0.1", None, ConnectionError, "rank 1 cannot reach rank 0 .*refused.*: check the address"),
    ],
)
def test_an_address_that_cannot_be_reached_is_one_line(host, port, error, message, monkeypatch):
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous, "RETRY_SECONDS", 0.05)
    with pytest.raises(error, match=message):
        await_rank_0(TWO | {"MASTER_ADDR": host, "MASTER_PORT": port or free_port()})


def test_a_port_in_use_is_named_and_a_listening_rank_0_is_found():
    with socket.create_server(("", 0)) as listening:
        port = str(listening.getsockname()[1])
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        await_rank_0(TWO | address)
        with pytest.raises(
            ValueError, match=f"rank 0 cannot listen at MASTER_PORT={port} .*in use.*: set another port"
        ):
            await_rank_0(TWO | address | {"RANK": "0"})
        await_rank_0(TWO | address | {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"})  # torchrun listens
    await_rank_0(TWO | address | {"RANK": "0"})
    await_rank_0({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
