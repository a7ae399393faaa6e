"""The environment variables of ranks."""

import pytest

from sinklm.train.launch import fill_environment
from sinklm.train.ranks import own_rank

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
        (TWO | {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999: set a port from 1 to 65535"),
        (TWO | {"MASTER_PORT": "x"}, "MASTER_PORT is 'x': it must be"),
        ({name: SLURM[name] for name in SLURM if name != "SLURM_LOCALID"}, "SLURM_LOCALID is not set"),
    ],
)
def test_wrong_variables_are_named(environment, message):
    with pytest.raises(ValueError, match=message):
        fill_environment(dict(environment))


def test_the_own_rank():
    assert own_rank({}) == (0, 0)
    assert own_rank(SLURM) == (1, 1)
    assert own_rank(TWO | SLURM | {"LOCAL_RANK": "0"}) == (1, 0)
