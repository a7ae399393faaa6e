"""Every way to start a run on two hosts, and what happens if a rank, a host or a job is stopped.

    SINKLM_CLUSTER=1 pytest tests/cluster -rA

It takes about ten minutes. It needs Linux, root, and the Debian packages openssh-server, pdsh,
slurm-wlm, munge and iproute2. docs/results/multi-node.md has the results.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sinklm.checkpoints.folders import list_checkpoints
from sinklm.train.launch import first_host

from ..train.tiny import RECIPE, losses, make_store, metrics, wait_for_step
from .hosts import BIN, ROOT, Host, two_hosts, wait_for
from .slurm import start_slurm, wait_until_idle

pytestmark = pytest.mark.skipif(not os.environ.get("SINKLM_CLUSTER"), reason="needs root and SINKLM_CLUSTER=1")

LONG = ["train.num_steps=100000", "validation.every_steps=null", "checkpoint.every_steps=null"]
PATIENCE = 300.0  # seconds; a busy machine takes minutes to start two ranks
LAUNCHERS = ["deepspeed over ssh", "deepspeed --no_ssh", "torchrun", "torchrun c10d", "srun"]
RANK = r"^\S*python\S* (-u )?-m sinklm[.]train "  # the command line of a rank
DOES_NOT_ANSWER = "rank 1 .* has not answered for .* s: it is stopped, or its host cannot be reached"


def begins(launcher: str, hostfile: Path, master: str) -> list[list[object]]:
    """Return the beginning of the command on each host, or of the only command."""
    torchrun = ["torchrun", "--nnodes", 2, "--nproc-per-node", 1]
    no_ssh = ["deepspeed", "--hostfile", hostfile, "--no_ssh", "--master_addr", master, "--node_rank"]
    static = [*torchrun, "--master-addr", master, "--master-port", 29500, "--node-rank"]
    c10d = [*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "node1:29400", "--rdzv-id", "run1", "--module"]
    return {
        "deepspeed over ssh": [["deepspeed", "--hostfile", hostfile, "--module"]],
        "deepspeed --no_ssh": [[*no_ssh, number, "--module"] for number in (0, 1)],
        "torchrun": [[*static, number, "--module"] for number in (0, 1)],
        "torchrun c10d": [c10d, c10d],
        "srun": [["srun", "--nodes=2", "--ntasks-per-node=1", "--wait=5", "python", "-m"]],
    }[launcher]


@dataclass
class Cluster:
    """Two hosts with Slurm, a folder that they share, and a recipe in it."""

    hosts: list[Host]
    folder: Path
    slurm: dict[str, str]

    def start(self, launcher: str, run: str, *overrides: object, master: str = "node1", **variables: object) -> "Run":
        """Start a run with one rank on each host."""
        folder = self.folder / run
        arguments = ["sinklm.train", self.folder / "tiny.yaml", f"train.run_dir={folder}", *overrides]
        commands = [[*begin, *arguments] for begin in begins(launcher, self.folder / "hostfile", master)]
        hosts = self.hosts[: len(commands)]
        logs = [self.folder / f"{run}-{host.name}.log" for host in hosts]
        processes = [
            host.start(*command, log=log, **self.slurm, **variables)
            for host, command, log in zip(hosts, commands, logs, strict=True)
        ]
        return Run(self, folder, processes, logs)

    def ranks(self) -> list[int | None]:
        """The process of the rank on each host."""
        return [max(host.processes(RANK), default=None) for host in self.hosts]


@dataclass
class Run:
    cluster: Cluster
    folder: Path
    launchers: list[subprocess.Popen[str]]
    logs: list[Path]

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Return the exit statuses of the launchers."""
        deadline = time.monotonic() + timeout
        return [launcher.wait(max(0.1, deadline - time.monotonic())) for launcher in self.launchers]

    def send(self, signal: str, rank: int) -> None:
        self.cluster.hosts[rank].run("kill", f"-{signal}", self.cluster.ranks()[rank])

    def wait_until_ranks_end(self, *numbers: int) -> float:
        """Return the seconds until these ranks have ended."""
        start = time.monotonic()
        wait_for(lambda: not any(self.cluster.ranks()[number] for number in numbers), "a rank goes on", PATIENCE)
        return time.monotonic() - start

    @property
    def output(self) -> str:
        return "".join(log.read_text() for log in self.logs)

    def end(self) -> None:
        """Kill what is left."""
        for host in self.cluster.hosts:
            for process in host.processes(f"train.run_dir={self.folder}"):
                host.start("kill", "-KILL", process).wait()
        self.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    store = make_store(folder / "data")
    recipe = RECIPE.replace("micro_batch_size: 4", "micro_batch_size: 2")  # two of them on each host
    (folder / "tiny.yaml").write_text(f"{recipe}\ndata: {{path: {store}}}\n")
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    with two_hosts(folder) as hosts:
        yield Cluster(hosts, folder, start_slurm(hosts, folder))


@pytest.fixture(scope="module")
def one_rank(cluster: Cluster) -> dict[int, float]:
    """Losses of the run in one process."""
    folder = cluster.folder / "one"
    cluster.hosts[0].run(
        "python", "-m", "sinklm.train", cluster.folder / "tiny.yaml", f"train.run_dir={folder}", timeout=PATIENCE
    )
    return losses(folder)


@pytest.fixture
def long_run(cluster: Cluster, launcher: str, request: pytest.FixtureRequest) -> Iterator[Run]:
    """A run that does its steps, and would not end for a long time."""
    run = cluster.start(launcher, re.sub(r"\W+", "-", request.node.name), *LONG, "train.hang_timeout_minutes=0.2")
    try:
        wait_for_step(run.folder, 50, timeout=PATIENCE)
        yield run
    finally:
        run.end()


def note(launcher: str, what: str, statuses: list[int], seconds: float, output: str = "") -> None:
    """Print a line of the table in docs/results/multi-node.md."""
    errors = re.findall(r"^(?:\S+: )?(error: rank .*)$", output, re.MULTILINE)
    print(f"| {launcher} | {what} | {', '.join(map(str, statuses))} | {seconds:.0f} s | {' '.join(errors)} |")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_hosts_have_the_losses_of_one_process(cluster: Cluster, one_rank: dict[int, float], launcher: str) -> None:
    run = cluster.start(launcher, f"whole-{LAUNCHERS.index(launcher)}")
    statuses = run.wait()
    assert set(statuses) == {0}, run.output
    assert losses(run.folder) == pytest.approx(one_rank, abs=1e-5)
    assert "ranks: 0 on node1, 1 on node2" in run.output
    note(launcher, "none", statuses, 0)


def test_a_job_saves_before_its_time_limit_and_requeues_itself(cluster: Cluster) -> None:
    """examples/slurm.sh, with a limit of two minutes."""
    home = cluster.folder / "home"
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / ".venv" / "bin" / "activate").write_text(f"export PATH={BIN}:$PATH PYTHONPATH={ROOT / 'src'}\n")
    folder, recipe = cluster.folder / "job", cluster.folder / "job.yaml"
    recipe.write_text((cluster.folder / "tiny.yaml").read_text().replace("num_steps: 8", "num_steps: 100000"))
    one_process_each = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    # Slurm sends the signal up to a minute early, so one minute or more after the start.
    limits = ["--time=2", "--signal=USR1@30", f"--chdir={home}", f"--output={home}/job.out"]
    overrides = [f"train.run_dir={folder}", *LONG[1:]]
    script = [ROOT / "examples" / "slurm.sh", recipe, *overrides]
    number = cluster.hosts[0].run("sbatch", "--parsable", *one_process_each, *limits, *script, **cluster.slurm).strip()
    wait_for(lambda: list_checkpoints(folder) if folder.exists() else None, "the job does not save", timeout=PATIENCE)
    (step,) = list_checkpoints(folder)
    recipe.write_text(recipe.read_text().replace("num_steps: 100000", f"num_steps: {step + 20}"))

    def ended() -> str | None:
        facts = cluster.hosts[0].run("scontrol", "show", "job", number, **cluster.slurm)
        return facts if re.search("JobState=(COMPLETED|FAILED|TIMEOUT|CANCELLED)", facts) else None

    facts = wait_for(ended, "the job does not end", timeout=PATIENCE)
    output = (home / "job.out").read_text()
    assert "JobState=COMPLETED" in facts, output
    assert "Restarts=1 " in facts
    assert "stopped by SIGUSR1; the state is saved" in output
    assert "resuming from" in output
    assert [line["step"] for line in metrics(folder)] == list(range(1, step + 21))


@pytest.mark.parametrize(
    ("launcher", "rank"), [*((launcher, 1) for launcher in LAUNCHERS), ("torchrun", 0), ("srun", 0)]
)
def test_a_killed_rank_ends_the_other(long_run: Run, launcher: str, rank: int) -> None:
    long_run.send("KILL", rank)
    seconds = long_run.wait_until_ranks_end(0, 1)
    statuses = long_run.wait()
    note(launcher, f"rank {rank} is killed", statuses, seconds, long_run.output)
    assert re.search(rf"error: rank {rank} \(host node{rank + 1}, process \d+\) died", long_run.output)
    assert 0 not in statuses


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_stopped_rank_is_named(long_run: Run, launcher: str) -> None:
    long_run.send("STOP", 1)
    seconds = long_run.wait_until_ranks_end(0)
    output = long_run.output
    assert re.search(f"error: {DOES_NOT_ANSWER}", output)
    if launcher == "srun":
        long_run.wait_until_ranks_end(1)  # --wait
    else:
        long_run.send("KILL", 1)
    statuses = long_run.wait()
    note(launcher, "rank 1 is stopped", statuses, seconds, output)
    assert 0 not in statuses


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_host_without_network_is_named(cluster: Cluster, long_run: Run, launcher: str) -> None:
    cluster.hosts[1].run("ip", "link", "set", "eth0", "down")
    try:
        seconds = long_run.wait_until_ranks_end(0, 1)
    finally:
        cluster.hosts[1].run("ip", "link", "set", "eth0", "up")
        wait_until_idle(cluster.hosts[0], cluster.slurm)
    statuses = long_run.wait()
    note(launcher, "node2 has no network", statuses, seconds, long_run.output)
    assert re.search(f"error: {DOES_NOT_ANSWER}", long_run.output)
    assert 0 not in statuses


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_saves_and_the_run_goes_on(cluster: Cluster, long_run: Run, launcher: str) -> None:
    long_run.send("USR1", 1)
    seconds = long_run.wait_until_ranks_end(0, 1)
    statuses = long_run.wait()
    note(launcher, "SIGUSR1 to rank 1", statuses, seconds, long_run.output)
    assert set(statuses) == ({1} if launcher.startswith("torchrun") else {75})
    (step,) = list_checkpoints(long_run.folder)
    more = cluster.start(launcher, long_run.folder.name, *LONG, f"train.num_steps={step + 5}")
    assert set(more.wait()) == {0}
    assert f"resuming from {long_run.folder / 'checkpoints' / f'step-{step}'}" in more.output
    assert list(losses(long_run.folder)) == list(range(1, step + 6))


def test_a_run_goes_on_with_one_host_less(cluster: Cluster, one_rank: dict[int, float]) -> None:
    settings = ["checkpoint.every_steps=2", "checkpoint.keep=null"]
    run = cluster.start("torchrun", "fewer", *settings)
    assert run.wait() == [0, 0]
    for step in (6, 8):
        subprocess.run(["rm", "-r", run.folder / "checkpoints" / f"step-{step}"], check=True)
    command = ["-m", "sinklm.train", cluster.folder / "tiny.yaml", f"train.run_dir={run.folder}", *settings]
    output = cluster.hosts[1].run("python", *command, timeout=PATIENCE)
    assert "converting the checkpoint, which differs in ranks 2 → 1" in output
    assert losses(run.folder) == pytest.approx(one_rank, abs=1e-5)


def test_a_run_folder_that_is_not_shared_is_an_error(cluster: Cluster) -> None:
    folder = cluster.folder / "local" / "run"
    run = cluster.start("torchrun", "unshared", f"train.run_dir={folder}")
    assert run.wait() == [1, 1]
    (error,) = re.findall("^error: .*", run.output, re.MULTILINE)
    assert error == (
        f"error: rank 1: {folder} on node2 is not the folder that rank 0 uses: set train.run_dir to a folder on a file "
        "system that all hosts share"
    )


def test_a_recipe_that_one_host_lacks_is_an_error_there(cluster: Cluster) -> None:
    (cluster.folder / "node1" / "own.yaml").write_text((cluster.folder / "tiny.yaml").read_text())
    recipe = cluster.folder / "local" / "own.yaml"
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--wait=5", "python", "-m", "sinklm.train", recipe]
    process = cluster.hosts[0].start(*command, f"train.run_dir={cluster.folder / 'lacks'}", **cluster.slurm)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode
    assert f"error: recipe {recipe}: no such file" in output


@pytest.mark.parametrize("nodes", ["node1-ib,node2-ib", "rack1n1,rack1n2,rack2n1", "gpu009,gpu010,login", "a"])
def test_node_lists_are_read_as_slurm_writes_them(cluster: Cluster, nodes: str) -> None:
    node_list = cluster.hosts[0].run("scontrol", "show", "hostlist", nodes, **cluster.slurm).strip()
    names = cluster.hosts[0].run("scontrol", "show", "hostnames", node_list, **cluster.slurm).split()
    assert names == nodes.split(",")
    assert first_host(node_list) == names[0]


def test_a_host_name_with_a_loopback_address_needs_an_interface(cluster: Cluster, one_rank: dict[int, float]) -> None:
    """As on Debian and Ubuntu, where /etc/hosts contains "127.0.1.1 HOST"."""
    for host in cluster.hosts:
        lines = (cluster.folder / "hosts").read_text().replace("localhost\n", f"localhost\n127.0.1.1 {host.name}\n")
        host.run("bash", "-c", f"printf '{lines}' > /run/hosts; mount --bind /run/hosts /etc/hosts")
    try:
        run = cluster.start("deepspeed --no_ssh", "loopback", master="10.77.0.1")
        wait_for(lambda: "error: rank" in run.output, "no rank reports an error", PATIENCE)
        assert re.search(
            r"rank \d of 2 on node\d cannot connect to the other ranks .* set GLOO_SOCKET_IFNAME", run.output
        )
        run.end()
        run = cluster.start("deepspeed --no_ssh", "interface", master="10.77.0.1", GLOO_SOCKET_IFNAME="eth0")
        assert run.wait() == [0, 0]
        assert losses(run.folder) == pytest.approx(one_rank, abs=1e-5)
    finally:
        for host in cluster.hosts:
            host.run("umount", "/etc/hosts")
