"""A real Slurm on the two hosts: slurmctld on the first, a slurmd on each."""

import os
from pathlib import Path

from .hosts import Host, wait_for

CONFIG = """ClusterName=sinklm
SlurmctldHost={main}
SlurmUser=root
SlurmctldPidFile=/run/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/slurm-state
SlurmdPidFile=/run/slurmd.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir=/run/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AuthInfo=cred_expire=5
MpiDefault=none
ReturnToService=2
NodeName={nodes} CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def start_slurm(hosts: list[Host], folder: Path) -> dict[str, str]:
    """Start the daemons and wait until both nodes are idle. Returns the variables for commands."""
    config = folder / "slurm.conf"
    (folder / "slurm-state").mkdir()
    names = ",".join(host.name for host in hosts)
    config.write_text(CONFIG.format(main=hosts[0].name, folder=folder, nodes=names, cpus=os.cpu_count()))
    variables = {"SLURM_CONF": str(config)}
    hosts[0].run("slurmctld", "-i", **variables)
    for host in hosts:
        host.run("slurmd", **variables)
    wait_until_idle(hosts[0], variables)
    return variables


def wait_until_idle(host: Host, variables: dict[str, str]) -> None:
    """Wait until all nodes are idle and answer."""
    sinfo = ["sinfo", "--noheader", "--format=%T"]
    wait_for(lambda: host.run(*sinfo, **variables) == "idle\n", "the nodes of Slurm are not idle", timeout=180)
