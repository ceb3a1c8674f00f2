"""The launcher: tests run or parse its output, and check the errors and the diagnosis of faults."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from torch.distributed import HashStore

from lightkit.errors import ConfigError
from lightkit.launch import addresses, diagnosis
from lightkit.launch.__main__ import main
from lightkit.launch.check import CheckError, CheckRendezvous, _agree, _exchange
from lightkit.launch.launch_spec import LaunchSpec, parse_endpoint, parse_nodes
from lightkit.launch.node_report import NodeReport, report_self
from lightkit.launch.torchrun import command_line

ARGUMENTS = ("+experiment=cnn", 'text="it\'s $HOME"')
TORCHRUN = ("torchrun", "--nodes=2", "--id=job")
SPEC = LaunchSpec(arguments=ARGUMENTS, nodes=2, min_nodes=2, processes=4)

# A stand-in for a program, which prints its arguments.
PRINT_ARGUMENTS = '#!/bin/bash\nprintf "%s\\n" "$GLOO_SOCKET_IFNAME $TORCH_DISABLE_SHARE_RDZV_TCP_STORE" "$@"\n'


def options_of(words):
    """Returns the options of a torchrun command, and the words after them."""
    end = words.index("-m")
    return dict(word.removeprefix("--").split("=", 1) for word in words[:end]), words[end:]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A directory on PATH with stand-ins of torchrun and SLURM's programs, which print their arguments."""
    directory = tmp_path / "bin"
    directory.mkdir()
    stubs = {
        "torchrun": PRINT_ARGUMENTS,
        "scontrol": "#!/bin/bash\nprintf 'first\\nsecond\\n'\n",
        # Runs the command of two nodes, one after the other.
        "srun": '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\n'
        'for node in 0 1; do SLURM_NODEID=$node "$@"; done\n',
        "python": "#!/bin/bash\n"
        f'if [[ "$*" == *" address "* ]]; then echo eth7 10.0.0.9; elif [[ "$*" == *" check "* ]]; then '
        'echo "$SRUN_CPUS_PER_TASK $@"; '
        f'else exec {sys.executable} "$@"; fi\n',
    }
    for name, text in stubs.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    return directory


def printed(capsys, *words):
    """Returns the output of the launcher for a valid command line."""
    assert main(list(words)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def bash(text, **environment):
    """Returns the lines that a bash script prints."""
    result = subprocess.run(
        ["bash", "-c", text], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_torchrun_line(programs):
    """The output is one shell line, with the environment of restarts and the unchanged arguments."""
    text = command_line(SPEC, host="10.0.0.1", address="10.0.0.2", interface="eth1", node_rank=1, run_id="my job")
    assert "\n" not in text
    variables, *words = bash(text)
    assert variables == "eth1 1"
    options, rest = options_of(words)
    assert options == {
        "nnodes": "2",
        "nproc-per-node": "4",
        "max-restarts": "3",
        "rdzv-backend": "c10d",
        "rdzv-endpoint": "10.0.0.1:29400",
        "rdzv-id": "my job",
        "rdzv-conf": "is_host=0",
        "local-addr": "10.0.0.2",
    }
    assert rest == ["-m", "lightkit.train", *ARGUMENTS]


def test_elastic_line():
    """The options name the smallest number of nodes, and a short wait for another node."""
    elastic = replace(SPEC, min_nodes=1)
    text = command_line(elastic, host="first", address="10.0.0.1", interface="eth1", node_rank=0, run_id="x")
    options, _ = options_of(shlex.split(text)[4:])
    assert options["nnodes"] == "1:2"
    assert options["rdzv-conf"] == "is_host=1,last_call_timeout=10"


def test_slurm_script(capsys, programs, tmp_path):
    """The script is valid, runs torchrun on each node, and serves the rendezvous on the first node alone."""
    words = ["slurm", "--nodes=2", "--processes=4", "--gpus=4", "--cpus=8", "--name=check", "--time=1:00:00"]
    # The command may use variables that are not set, as that of conda does.
    words += ["--setup=echo ready $NOBODY_SETS_THIS"]
    text = printed(capsys, *words, "--", *ARGUMENTS)
    (tmp_path / "job.sh").write_text(text)
    subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True)
    options = dict(
        row.removeprefix("#SBATCH --").split("=")
        for row in text.splitlines()
        if row.startswith("#SBATCH --") and "=" in row
    )
    assert options == {
        "job-name": "check",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "4",
        "cpus-per-task": "8",
        "time": "1:00:00",
        "output": "check-%j.log",
        "open-mode": "append",
    }
    said = bash(text, SLURM_JOB_NODELIST="nodes[0-1]", SLURM_JOB_ID="77")
    check = "-m lightkit.launch check --nodes=2 --endpoint=first:29400 --timeout=120"
    assert said[:3] == ["ready", f"8 {check}", f"8 {check}"]
    nodes = said[3:]
    half = len(nodes) // 2
    for rank, (variables, *rest) in enumerate((nodes[:half], nodes[half:])):
        assert variables == "eth7 1"
        found, arguments = options_of(rest)
        assert found["rdzv-endpoint"] == "first:29400"
        assert found["rdzv-id"] == "77"
        assert found["rdzv-conf"] == f"is_host={1 - rank}"
        assert found["local-addr"] == "10.0.0.9"
        assert arguments == ["-m", "lightkit.train", *ARGUMENTS]


def test_slurm_script_of_an_elastic_job(capsys):
    """The job survives the loss of a node, and skips the check, which needs all nodes."""
    text = printed(capsys, "slurm", "--nodes=1:4", "--", *ARGUMENTS)
    assert "#SBATCH --nodes=4\n" in text and "#SBATCH --no-kill\n" in text
    assert "--nnodes=1:4" in text and "launch check" not in text


def test_kubernetes_manifest(capsys, programs):
    """The Indexed Job and the headless Service agree in names and ports; the container's command runs here."""
    words = ["--nodes=2", "--name=job", "--image=registry/image:1", "--gpus=8", "--volume-claim=disk", "--port=29500"]
    service, job = yaml.safe_load_all(printed(capsys, "kubernetes", *words, "--", *ARGUMENTS))
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    assert container["image"] == "registry/image:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # Kubernetes replaces $(NAME) by a variable, and $$ by $.
    (script,) = container["args"]
    assert "$" not in script.replace("$$", "")
    script = script.replace("$$", "$")
    # A pod that gave up waiting for another one would count as failed.
    assert '--endpoint="job-0.job:29500" --wait --timeout=3600)' in script
    for index in (0, 1):
        variables = {"JOB_COMPLETION_INDEX": str(index), "LIGHTKIT_RUN_ID": "uid-1"}
        result = subprocess.run(
            [*container["command"], script], env={**os.environ, **variables}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        found, arguments = options_of(result.stdout.splitlines()[1:])
        assert found["rdzv-endpoint"] == f"job-0.job:{service['spec']['ports'][0]['port']}"
        assert (found["rdzv-id"], found["rdzv-conf"]) == ("uid-1", f"is_host={1 - index},join_timeout=3600")
        assert arguments == ["-m", "lightkit.train", *ARGUMENTS]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["slurm", "--nodes=two", "--", "x"], "--nodes two: expected a number, or MIN:MAX"),
        (["slurm", "--nodes=3:2", "--", "x"], "--nodes 3:2: expected MIN:MAX"),
        (["slurm", "--nodes=2"], "the arguments of lightkit.train are missing"),
        (["slurm", "--nodes=2", "--time=1 h", "--", "x"], "'1 h': expected one word"),
        (["slurm", "--nodes=2", "--interface=a b", "--", "x"], "is not the name of a network interface"),
        (["kubernetes", "--image=x", "--name=My_Job", "--", "x"], "--name My_Job: expected up to 50 small letters"),
        (["kubernetes", "--image=x y", "--", "x"], "expected the name of a container image"),
        (["slurm", "--port=99999", "--", "x"], "--port 99999: expected a number from 1 to 65535"),
        (["kubernetes", "--image=x", "--port=0", "--", "x"], "--port 0: expected a number from 1 to 65535"),
        (["slurm", "--gpus=-3", "--", "x"], "--gpus -3: expected 0 or more"),
        (["slurm", "--cpus=0", "--", "x"], "--cpus 0: expected at least 1"),
        ([*TORCHRUN, "--node-rank=2", "--endpoint=h", "--", "x"], "--node-rank 2: with 2 nodes"),
        ([*TORCHRUN, "--node-rank=0", "--endpoint=h:x", "--", "x"], "--endpoint h:x: expected HOST"),
        ([*TORCHRUN, "--node-rank=0", "--endpoint=[fd00::1]:5", "--", "x"], "by its name or an address of IPv4"),
        ([*TORCHRUN, "--node-rank=0", "--endpoint=127.0.0.1", "--", "x"], "where no other machine"),
        ([*TORCHRUN, "--endpoint=h", "--", "x"], "--node-rank is missing"),
        (["address", "--endpoint=h", "--interface=nosuch0"], "there is no network interface nosuch0"),
        (["address", "--endpoint=no.such.host.invalid", "--timeout=0"], "does not resolve on this machine"),
        (["check", "--nodes=2", "--node-rank=0"], "--endpoint is missing"),
        (["check", "--endpoint=h", "--", "x"], "check starts nothing"),
        (["--nodes=0", "--check", "--endpoint=h"], "--nodes 0: expected at least 1"),
    ],
)
def test_bad_input(capsys, monkeypatch, words, expected):
    """The error is one line, and names the option."""
    for name in ("GROUP_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert main(words) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and expected in error


def test_parse():
    """The parsers accept every form of torchrun."""
    assert parse_nodes("4") == (4, 4) and parse_nodes("1:4") == (1, 4)
    assert parse_endpoint("host") == ("host", 29400)
    assert parse_endpoint("10.0.0.1:5") == ("10.0.0.1", 5)
    for wrong in ("", "host:0", "host:70000", "a b", "fd00::1", "[fd00::1]:5"):
        with pytest.raises(ConfigError):
            parse_endpoint(wrong)


def test_own_address():
    """The loopback interface is found by its name and by the route to it."""
    loopback = next(name for name, address in addresses.interfaces().items() if address == "127.0.0.1")
    assert addresses.interface_and_address(loopback, "ignored") == (loopback, "127.0.0.1")
    assert addresses.interface_and_address(None, "127.0.0.1") == (loopback, "127.0.0.1")
    assert addresses.is_own("127.0.0.1") and not addresses.is_own("192.0.2.1")


def test_waiting_for_a_port():
    """The wait ends when a program listens on the port, or when the time is over."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        reason = addresses.wait_for("127.0.0.1", port, time.monotonic() + 0.1)
        assert "nothing listens on the port" in reason
        threading.Timer(0.3, server.listen).start()
        assert addresses.wait_for("127.0.0.1", port, time.monotonic() + 30) is None


@pytest.fixture
def names(monkeypatch):
    """Makes this machine node 0 with the name ``here``, beside a machine with the name ``there``."""
    resolve = addresses.resolve
    known = {"here": ["10.0.0.1"], "there": ["10.0.0.2"]}
    monkeypatch.setattr(addresses, "resolve", lambda host, *rest: known.get(host) or resolve(host, *rest))
    monkeypatch.setattr(addresses, "source_address", lambda target: "10.0.0.1")
    monkeypatch.setattr(addresses, "interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.1"})
    monkeypatch.setattr(addresses, "is_own", lambda address: address == "10.0.0.1")
    monkeypatch.setattr(addresses, "wait_for", lambda *where: "nobody listens")


def test_address_waits_for_node_0(capsys, names):
    """Node 0 continues although it does not listen yet; another node waits for it, and reports a timeout."""
    assert printed(capsys, "address", "--endpoint=here", "--wait") == "eth0 10.0.0.1\n"
    assert printed(capsys, "address", "--endpoint=there") == "eth0 10.0.0.1\n"
    assert main(["address", "--endpoint=there", "--wait", "--timeout=7"]) == 1
    assert "node 0 did not listen at there:29400 within 7 s: nobody listens" in capsys.readouterr().err


def node(rank, **changes):
    """Returns the report of a node in a network of three nodes without a fault, except for ``changes``."""
    report = NodeReport(
        rank=rank,
        nodes=3,
        host=f"host{rank}",
        interface="eth0",
        address=f"10.0.0.{rank + 1}",
        published=f"10.0.0.{rank + 1}",
        endpoint=["10.0.0.1"],
        interfaces=["lo", "eth0"],
        variables={"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth"},
        versions={"python": "3.11.7", "torch": "2.13.0", "lightning": "2.6.6", "lightkit": "0.1.0"},
        gpus=8,
        port=4000 + rank,
        clock_offset=0.01 * rank,
    )
    return replace(report, **changes)


def faults_of(*changed):
    """Returns the faults of the network of three nodes with some changed reports."""
    reports = [next((other for other in changed if other.rank == rank), node(rank)) for rank in range(3)]
    found = (
        diagnosis.before_connecting(reports, "first"),
        diagnosis.of_connections(reports),
        diagnosis.of_all_reduce(reports),
    )
    return [fault for part in found for fault in part]


def test_no_fault():
    """A network without a fault has an empty diagnosis."""
    assert faults_of() == []


@pytest.mark.parametrize(
    "changed",
    [
        # Debian's /etc/hosts: the machine's own name is loopback for itself, and the job uses the interface.
        node(0, endpoint=["127.0.1.1"]),
        node(1, variables={"GLOO_SOCKET_IFNAME": "eth0,lo", "NCCL_SOCKET_IFNAME": "ib,eth"}),
        node(1, variables={"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "^docker"}),
    ],
)
def test_no_fault_either(changed):
    """Some unusual settings are harmless."""
    assert faults_of(changed) == []


def test_several_interfaces_of_gloo(monkeypatch):
    """The other nodes get the address of the first interface."""
    monkeypatch.setattr(addresses, "interfaces", lambda: {"lo": "127.0.0.1", "eth1": "10.0.0.7"})
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1,lo")
    report = report_self(0, 1, "127.0.0.1", None, 0.0)
    assert (report.interface, report.published) == ("eth1", "10.0.0.7")


def test_different_numbers_of_nodes():
    """A node with another number than node 0 reports it, and so do the nodes that wait for it."""
    store, end = HashStore(), time.monotonic() + 5
    _agree(store, CheckRendezvous("first", 1, rank=0, nodes=3), end)
    _agree(store, CheckRendezvous("first", 1, rank=1, nodes=3), end)
    expected = "node 2 was told of 4 nodes and node 0 of 3: pass the same --nodes everywhere"
    with pytest.raises(CheckError, match=expected):
        _agree(store, CheckRendezvous("first", 1, rank=2, nodes=4), end)
    with pytest.raises(CheckError, match=expected):
        _exchange(store, "reports", node(0), time.monotonic() + 0.1, "in time")


OTHER = {"python": "3.11.7", "torch": "2.9.0", "lightning": "2.6.6", "lightkit": "0.1.0"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (node(1, endpoint=["10.9.9.9"]), "first is 10.9.9.9 on node 1 and 10.0.0.1 on node 0"),
        (
            node(0, endpoint=["127.0.1.1"], address="127.0.0.1"),
            "the endpoint first is 127.0.1.1 on node 0, which no other machine",
        ),
        (node(1, address="127.0.0.1"), "node 1 would be known by 127.0.0.1"),
        (node(1, published="127.0.1.1"), "node 1 would publish 127.0.1.1, the address of its own name host1"),
        (node(1, variables={"GLOO_SOCKET_IFNAME": "ib0"}), "GLOO_SOCKET_IFNAME=ib0 on node 1 names no interface"),
        (node(1, variables={"GLOO_SOCKET_IFNAME": "eth0,ib0"}), "GLOO_SOCKET_IFNAME=eth0,ib0 on node 1 names no"),
        (node(1, variables={"NCCL_SOCKET_IFNAME": "=eth"}), "NCCL_SOCKET_IFNAME==eth on node 1 names no interface"),
        (node(1, versions=OTHER), "torch is 2.9.0 on node 1 and 2.13.0 on the others"),
        (node(2, gpus=7), "node 2 has 7 GPUs and the others 8"),
        (node(2, clock_offset=-20.0), "the clock of node 2 is 20 s behind node 0's"),
        (node(2, unreachable={"1": "no answer"}), "node 2 (10.0.0.3) does not reach node 1 (10.0.0.2:4001): no answer"),
        (node(1, address="10.0.0.3"), "nodes 1 and 2 have the same address 10.0.0.3"),
        (node(1, error="Connection reset"), "gloo failed on node 1"),
    ],
)
def test_each_fault_alone(changed, expected):
    """One fault gives one line, which names the node."""
    (fault,) = faults_of(changed)
    assert fault.startswith(expected)


def test_loopback_endpoint(capsys):
    """A node other than node 0 cannot use a loopback endpoint: the error comes at once, before the timeout."""
    assert main(["--check", "--endpoint=127.0.0.1", "--nodes=2", "--node-rank=1", "--timeout=300"]) == 1
    assert capsys.readouterr().err.startswith("error: the endpoint 127.0.0.1:29400 is node 1 itself")


def test_help(capsys):
    """The help names every command."""
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("torchrun", "slurm", "kubernetes", "check", "--check", "address"))


def test_loading_torch_takes_no_time_of_the_check():
    """The timeout begins after the import of torch, which takes a minute from a slow file system."""
    code = (
        "import sys, time, lightkit.launch.check as check\n"
        "assert 'torch' not in sys.modules\n"
        "class Clock:\n"
        "    def monotonic():\n"
        "        sys.exit('torch' not in sys.modules)\n"
        "check.time = Clock\n"
        "check.check(check.CheckRendezvous('127.0.0.1', 1, 0, 1))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_starts_without_torch():
    """The scripts call the launcher on every node: it must not take the seconds of an import of torch."""
    code = (
        "import sys; from lightkit.launch.__main__ import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    words = ["slurm", "--nodes=2", "--", "x"]
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, cwd=Path(__file__).parent)
