"""Jobs on two machines, which are network namespaces: the network check, and recovery from lost processes and nodes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time

import pytest
import yaml
from network import Network, ip, why_not
from support.commands import run, run_python, the_error, with_modules
from support.processes import wait_for

from lightkit.checkpoints import load_checkpoint

pytestmark = pytest.mark.slow

needs_namespaces = pytest.mark.skipif((reason := why_not()) is not None, reason=str(reason))

PORT = 29700
ENDPOINT = f"{Network.addresses[0]}:{PORT}"


@pytest.fixture
def network():
    with Network() as network:
        yield network


def job(directory, *arguments, **faults):
    """Returns the arguments of a small training with the callback `faults.Faults`."""
    callback = {"_target_": "faults.Faults", "directory": directory, **faults}
    settings = [f"+callbacks.faults.{name}={value}" for name, value in callback.items()]
    return ["+experiment=cnn", "+debug=quick", "trainer.accelerator=cpu", "strategy=ddp", *settings, *arguments]


def diary(directory):
    return [json.loads(line) for line in (directory / "diary").read_text().splitlines()]


def only_run(directory):
    """Returns the only run directory of a job, after a check that the run is complete."""
    (run,) = (directory / "runs" / "cnn").iterdir()
    assert (run / "metrics.json").exists() and (run / "report.html").exists()
    return run


def start_job(network, directory, nodes, arguments):
    """Starts the command that `lightkit.launch` prints on both machines."""
    started = []
    for rank in (0, 1):
        words = [
            "torchrun",
            f"--nodes={nodes}",
            f"--endpoint={ENDPOINT}",
            f"--node-rank={rank}",
            "--id=job",
            "--",
            *arguments,
        ]
        line = subprocess.run(
            ["ip", "netns", "exec", network.names[rank], sys.executable, "-m", "lightkit.launch", *words],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        started.append(
            network.start(rank, ["bash", "-c", line], directory, directory / f"log{rank}", with_modules("faults"))
        )
    return started


@needs_namespaces
def test_a_killed_worker(network, tmp_path):
    """Both machines resume from the last checkpoint in the same directory, and train each epoch once."""
    arguments = job(tmp_path, "trainer.max_epochs=4", rank=1, epoch=2)
    for process in start_job(network, tmp_path, "2", arguments):
        assert process.wait(60) == 0, (tmp_path / "log0").read_text()
    run = only_run(tmp_path)
    said = (tmp_path / "log0").read_text()
    assert f"continuing {run}/checkpoints/last.ckpt\n" in said
    assert [f"epoch {epoch}/4" in said for epoch in (1, 2, 3, 4)] == [True] * 4
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 4
    events = diary(tmp_path)
    # Both processes start twice; the second start begins with the epoch of the kill.
    starts = [(event["world"], event["epoch"]) for event in events if event["what"] == "start"]
    assert sorted(starts) == [(2, 0), (2, 0), (2, 2), (2, 2)]
    report_recovery(events, "kill")


@needs_namespaces
def test_a_node_is_cut_off(network, tmp_path):
    """The machine with the rendezvous resumes alone from the last checkpoint, and does not wait in a collective."""
    arguments = job(tmp_path, "trainer.max_epochs=40", pause=0.05)
    first, second = start_job(network, tmp_path, "1:2", arguments)
    wait_for(lambda: list(tmp_path.glob("runs/cnn/*/checkpoints/last.ckpt")), first, second)
    network.cut(1)
    with (tmp_path / "diary").open("a") as file:
        file.write(json.dumps({"what": "cut", "time": time.time()}) + "\n")
    assert first.wait(90) == 0, (tmp_path / "log0").read_text()
    run = only_run(tmp_path)
    said = (tmp_path / "log0").read_text()
    assert "process 0: process 1 has ended or cannot be reached any more" in said
    assert f"continuing {run}/checkpoints/last.ckpt\n" in said
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 40
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["num_nodes"] == 1
    last = diary(tmp_path)[-1]
    assert last["world"] == 1 and 0 < last["epoch"] < 40
    report_recovery(diary(tmp_path), "cut")


def report_recovery(events, what):
    """Prints the seconds from a fault to the first batch after it; pytest shows them with -s."""
    fault = next(event["time"] for event in events if event["what"] == what)
    after = [event["time"] - fault for event in events if event["what"] == "start" and event["time"] > fault]
    print(f"recovered from {what} after {max(after):.1f} s")


def torchrun(directory, *arguments):
    """Runs a job of two processes on one machine under torchrun with restarts."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    environment = {**with_modules("faults"), "OMP_NUM_THREADS": "1"}
    return run_python(*command, "-m", "lightkit.train", *arguments, cwd=directory, environment=environment, status=0)


def test_restart_on_one_machine(tmp_path):
    """A restart needs no setting except the number of restarts; the logs keep the rows before it."""
    result = torchrun(tmp_path, *job(tmp_path, "trainer.max_epochs=3", rank=1, epoch=1))
    run = only_run(tmp_path)
    assert result.stdout.count(f"continuing {run}/checkpoints/last.ckpt") == 1
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 3
    from lightkit.app.report.figures import read_metrics

    assert [step for step, _ in read_metrics(run / "metrics.csv")["val/loss"]] == [0, 1, 2]


def test_killed_while_it_writes_a_checkpoint(tmp_path):
    """After a kill during a write the job resumes from the previous checkpoint."""
    torchrun(tmp_path, *job(tmp_path, "trainer.max_epochs=3", rank=0, epoch=1, writing=True))
    run = only_run(tmp_path)
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 3
    events = diary(tmp_path)
    (kill,) = [event for event in events if event["what"] == "kill"]
    assert kill["step"] == 2
    assert sorted(os.listdir(run / "checkpoints")) == ["best.ckpt", "last.ckpt"]
    assert sorted(event["step"] for event in events if event["what"] == "start") == [0, 0, 1, 1]


def test_restart_before_the_first_checkpoint(tmp_path):
    """The job begins again in the same directory, which holds its files and no checkpoint."""
    run = tmp_path / "out"
    result = torchrun(tmp_path, *job(tmp_path, "hydra.run.dir=out", rank=0, epoch=0))
    assert f"no checkpoint yet: beginning again in {run}\n" in result.stdout
    assert "continuing" not in result.stdout
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 1


def test_restart_of_a_sweep(tmp_path):
    """A restarted sweep skips the finished run, resumes the killed run, and starts the next run."""
    result = torchrun(tmp_path, *job(tmp_path, "trainer.max_epochs=2", "-m", "seed=0,1,2", rank=1, epoch=1, seed=1))
    (sweep,) = (tmp_path / "runs" / "cnn").iterdir()
    assert result.stdout.count(f"done before the restart: {sweep}/0\n") == 1
    assert result.stdout.count(f"continuing {sweep}/1/checkpoints/last.ckpt\n") == 1
    assert result.stdout.count("test/accuracy") == 3
    for seed in (0, 1, 2):
        assert yaml.safe_load((sweep / str(seed) / "config.yaml").read_text())["seed"] == seed
        assert load_checkpoint(sweep / str(seed) / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_restart_after_the_training(tmp_path):
    """A job that was killed during the test resumes with the test and trains no further epoch."""
    result = torchrun(tmp_path, *job(tmp_path, "trainer.max_epochs=1", rank=0, epoch=-1))
    run = only_run(tmp_path)
    assert "continuing" in result.stdout
    metrics = json.loads((run / "metrics.json").read_text())
    # The metrics include those that the killed process logged.
    assert metrics.keys() >= {"test/accuracy", "val/loss", "train/loss", "train/images_per_second", "wall_seconds"}
    assert metrics["epochs"] == 1


@pytest.mark.parametrize("lacking", ["store", "id"])
def test_restarts_that_could_not_work(tmp_path, lacking):
    """On several machines the job demands torchrun's settings for restarts at its start; a restart would hang."""
    variables = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_RUN_ID": "none" if lacking == "id" else "job",
        "TORCHELASTIC_USE_AGENT_STORE": str(lacking == "store"),
    }
    result = run("train", *job(tmp_path), cwd=tmp_path, environment={**with_modules("faults"), **variables})
    needed = {"store": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "id": "--rdzv-id=NAME"}
    assert needed[lacking] in the_error(result)


class Checked:
    """A run of `lightkit.launch check` on both machines: exit statuses and outputs."""

    def __init__(self, network, directory, *options, ranks=(0, 1), program=None, endpoint=ENDPOINT, variables=None):
        started = []
        for rank in ranks:
            launch = (program or {}).get(rank, [sys.executable, "-m", "lightkit.launch"])
            words = [f"--endpoint={endpoint}", "--nodes=2", f"--node-rank={rank}", *options]
            log = directory / f"check{rank}"
            started.append(network.start(rank, [*launch, "--check", *words], directory, log, variables))
        began = time.monotonic()
        self.statuses = [process.wait(60) for process in started]
        self.seconds = time.monotonic() - began
        self.said = [(directory / f"check{rank}").read_text() for rank in ranks]

    def faults(self):
        """Returns the faults, after a check that both nodes print the same ones."""
        found = [[text for text in said.splitlines() if text.startswith("fault: ")] for said in self.said]
        assert found[0] == found[-1] and set(self.statuses) == {1}, self.said
        return found[0]


@needs_namespaces
def test_check_of_a_good_network(network, tmp_path):
    """The check finds no fault; its table has addresses, routes and the speed of an all_reduce."""
    result = Checked(network, tmp_path, "--interface=cable")
    assert result.statuses == [0, 0], result.said
    for said in result.said:
        assert "all is well" in said and said.count("1 of 1") == 2 and said.count("MB/s") == 2
        assert all(address in said for address in Network.addresses)


@needs_namespaces
def test_check_finds_loopback(network, tmp_path):
    """Without --interface the check finds that gloo would publish the loopback address of the machine's name."""
    result = Checked(network, tmp_path)
    faults = result.faults()
    assert len(faults) == 2
    for rank, fault in enumerate(faults):
        assert fault.startswith(f"fault: node {rank} would publish 127.")
        assert "set GLOO_SOCKET_IFNAME=cable" in fault


@needs_namespaces
def test_check_with_a_wrong_endpoint(network, tmp_path):
    """Node 0 reports that the address is not its own, and node 1 that no process answers there."""
    result = Checked(network, tmp_path, "--timeout=5", "--interface=cable", endpoint=f"10.77.0.9:{PORT}")
    assert result.statuses == [1, 1] and result.seconds < 20
    assert (
        f"the endpoint 10.77.0.9:{PORT} (10.77.0.9) is no address of node 0, which has 127.0.0.1, 10.77.0.1"
        in (result.said[0])
    )
    assert f"node 1 does not reach node 0 at 10.77.0.9:{PORT} within 5 s" in result.said[1]


@needs_namespaces
@pytest.mark.parametrize("rank", [0, 1])
def test_check_with_a_missing_node(network, tmp_path, rank):
    """After the timeout the present node reports the missing one."""
    result = Checked(network, tmp_path, "--timeout=4", "--interface=cable", ranks=(rank,))
    assert result.statuses == [1] and result.seconds < 20
    expected = {
        0: "node 1 of 2 did not come within 4 s; there were 0",
        1: "that machine is there, but nothing listens on the port",
    }
    assert expected[rank] in result.said[0]


@needs_namespaces
def test_check_with_different_numbers_of_nodes(network, tmp_path):
    """Both nodes report the different numbers of nodes instead of a missing node."""
    command = [sys.executable, "-m", "lightkit.launch", "check", f"--endpoint={ENDPOINT}", "--interface=cable"]
    started = [
        network.start(
            rank, [*command, f"--nodes={nodes}", f"--node-rank={rank}", "--timeout=8"], tmp_path, tmp_path / str(rank)
        )
        for rank, nodes in enumerate((3, 2))
    ]
    assert [process.wait(60) for process in started] == [1, 1]
    for rank in (0, 1):
        expected = "error: node 1 was told of 2 nodes and node 0 of 3: pass the same --nodes everywhere"
        assert expected in (tmp_path / str(rank)).read_text()


@needs_namespaces
def test_check_of_a_blocked_way(network, tmp_path):
    """The check finds that the job's network is blocked while the nodes connect by another network."""
    for name, address in zip(network.names, ("10.78.0.1", "10.78.0.2"), strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
    ip("-n", network.names[1], "route", "add", "blackhole", "10.77.0.1/32")
    result = Checked(network, tmp_path, "--interface=cable", endpoint=f"10.78.0.1:{PORT}")
    faults = result.faults()
    assert [fault.partition(":")[2].split()[:2] for fault in faults] == [["node", "0"], ["node", "1"]]
    assert "does not reach node 1 (10.77.0.2:" in faults[0] and "does not reach node 0 (10.77.0.1:" in faults[1]
    assert result.seconds < 30


@needs_namespaces
def test_check_of_a_cut_network(network, tmp_path):
    """With the link down node 1 finds no route and node 0 finds no other node."""
    network.cut(1)
    result = Checked(network, tmp_path, "--timeout=4", "--interface=cable")
    assert result.statuses == [1, 1] and result.seconds < 20
    assert "node 1 of 2 did not come" in result.said[0]
    assert "node 1 does not reach node 0" in result.said[1]


@needs_namespaces
def test_check_of_different_versions(network, tmp_path):
    """The check reports the node with another version of torch."""
    other = (
        "import sys, torch; torch.__version__ = '2.9.1'; from lightkit.launch.__main__ import main; sys.exit(main())"
    )
    program = {1: [sys.executable, "-c", other]}
    result = Checked(network, tmp_path, "--interface=cable", program=program)
    (fault,) = result.faults()
    assert fault.startswith("fault: torch is 2.9.1 on node 1 and ")


@needs_namespaces
def test_check_with_a_taken_port(network, tmp_path):
    """Node 0 reports that another program has the endpoint's port, and node 1 does not mistake it for node 0."""
    command = [sys.executable, "-m", "http.server", str(PORT)]
    blocker = network.start(0, command, tmp_path, tmp_path / "blocker")
    wait_for(lambda: is_listening(network.names[0]), blocker)
    result = Checked(network, tmp_path, "--timeout=5", "--interface=cable")
    assert result.statuses == [1, 1] and result.seconds < 20
    assert "another program on node 0 uses the port" in result.said[0]
    assert "what answers there is no check" in result.said[1]


def is_listening(name):
    probe = f"import socket; socket.create_connection(('{Network.addresses[0]}', {PORT}), 1)"
    command = ["ip", "netns", "exec", name, sys.executable, "-c", probe]
    return subprocess.run(command, capture_output=True).returncode == 0


@needs_namespaces
def test_scripts_find_the_address(network, tmp_path):
    """Each node prints the address that the scripts for SLURM and Kubernetes pass to torchrun."""
    for rank, address in enumerate(Network.addresses):
        command = f"{shlex.quote(sys.executable)} -m lightkit.launch address --endpoint={ENDPOINT}"
        process = network.start(rank, ["bash", "-c", command], tmp_path, tmp_path / "said")
        assert process.wait(30) == 0
        assert (tmp_path / "said").read_text() == f"cable {address}\n"
