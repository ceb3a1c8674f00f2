"""The fork launcher: the checks before a fork, and the result of each job; small functions stand for the jobs."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import hydra
import pytest
import torch
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, RunMode
from omegaconf import open_dict

from lightkit.app import fork_launcher
from lightkit.app.fork_launcher import launcher, preload
from lightkit.app.fork_launcher.job_process import JobError, JobProcess
from lightkit.app.fork_launcher.launcher import ForkLauncher
from lightkit.errors import CarriedError, ConfigError, LightkitError

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks on Linux alone")


def outcome(run, threads=None):
    """Runs a function as a job in a forked process and returns Hydra's record of it."""
    job = JobProcess("job 3", ["seed=1"], run, signal.pthread_sigmask(signal.SIG_BLOCK, []), threads)
    while not job.has_ended():
        time.sleep(0.001)
    return job.result()


def returning(value):
    job_return = JobReturn(status=JobStatus.COMPLETED)
    job_return.return_value = value
    return job_return


def die(number):
    def run():
        # faulthandler would print the stack of pytest.
        faulthandler.disable()
        os.kill(os.getpid(), number)

    return run


@linux
@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (die(signal.SIGKILL), "job 3 was ended by SIGKILL; the machine may be out of memory. ckpt_path=last goes on"),
        (die(signal.SIGSEGV), "job 3 was ended by SIGSEGV. ckpt_path=last goes on"),
        (lambda: os._exit(7), "job 3 ended with status 7 and no result"),
    ],
)
def test_a_job_that_does_not_come_to_its_end(run, expected):
    """A job whose process is killed, crashes or exits has failed; its error says how the process ended."""
    job_return = outcome(run)
    assert (job_return.status, job_return.overrides) == (JobStatus.FAILED, ["seed=1"])
    with pytest.raises(LightkitError) as error:
        _ = job_return.return_value
    assert str(error.value).startswith(expected)


def refuse():
    raise CarriedError(ConfigError("seed must be from 0"))


def leave():
    sys.exit(5)


def lack():
    raise FileNotFoundError(2, "No such file or directory", "sweep")


@linux
def test_a_job_that_ends_the_sweep():
    """Errors in the input, faults of the program and `sys.exit` reach the parent as their own exceptions."""
    with pytest.raises(CarriedError) as error:
        outcome(lack)
    assert "in lack" in str(error.value.__cause__)
    assert str(error.value.args[0]) == "sweep: No such file or directory"
    with pytest.raises(JobError, match="job 3: ZeroDivisionError"):
        outcome(lambda: 1 / 0)
    with pytest.raises(CarriedError) as error:
        outcome(refuse)
    assert str(error.value.args[0]) == "seed must be from 0"
    with pytest.raises(SystemExit) as ended:
        outcome(leave)
    assert ended.value.code == 5


class UnpicklableError(Exception):
    """An exception that cannot be sent between processes, because unpickling it lacks an argument."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


@linux
def test_a_fault_of_the_program():
    """The parent gets the message and the traceback of a job's error even if the error cannot be pickled."""

    def run():
        job_return = JobReturn(status=JobStatus.FAILED)
        try:
            raise UnpicklableError(1, 2)
        except UnpicklableError as error:
            job_return.return_value = error
        return job_return

    with pytest.raises(JobError, match="job 3: UnpicklableError: 1 and 2") as error:
        _ = outcome(run).return_value
    assert "raise UnpicklableError(1, 2)" in str(error.value.__cause__)


@linux
def test_environment_of_a_job():
    """A job has the parent's state of Python's random generator, a session of its own, and its share of threads."""
    state = random.getstate()
    session, drawn, threads = outcome(
        lambda: returning((os.getsid(0), random.random(), torch.get_num_threads())), threads=1
    ).return_value
    assert session not in (os.getsid(0), os.getpid())
    assert drawn == random.random() and threads == 1
    random.setstate(state)


@pytest.mark.parametrize("jobs", [0, -1, 1.5, "two", True])
def test_wrong_number_of_jobs(jobs):
    """The launcher rejects a wrong number of jobs before the first job."""
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.jobs must be a whole number of at least 1, got"):
        ForkLauncher(jobs).setup(hydra_context=None, task_function=None, config=None)


@pytest.mark.parametrize("why", ["darwin", "torchrun", "CUDA"])
def test_where_no_process_can_fork(monkeypatch, why):
    """The error says why the process cannot fork and what to do instead."""
    if why == "darwin":
        monkeypatch.setattr(sys, "platform", "darwin")
    elif why == "torchrun":
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "0")
    else:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=f"hydra/launcher=fork.*{why}.*leave hydra/launcher=fork out"):
        preload.check_platform()


@linux
def test_threads_are_refused(monkeypatch):
    """The error has the name of the other thread."""
    monkeypatch.setattr(preload, "_THREAD_EXIT_TIMEOUT", 0.01)
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="the progress of something")
    thread.start()
    try:
        with pytest.raises(ConfigError, match=r"other threads \(.*the progress of something.*\): leave"):
            preload.check_threads()
    finally:
        done.set()
        thread.join()


@linux
def test_preload_starts_no_thread():
    """After all imports and a matrix product of NumPy a process may fork; CUDA and random state are unchanged."""
    code = (
        "import numpy, os, random, torch\n"
        "from omegaconf import OmegaConf\n"
        "from lightkit.app.fork_launcher.preload import check_threads, preload\n"
        "state = random.getstate()\n"
        "preload(OmegaConf.create({'model': {'_target_': 'lightkit.models.CNN'}, 'data': {'_target_': 'no.Such'}}))\n"
        "numpy.ones((500, 500)) @ numpy.ones((500, 500))\n"
        "check_threads()\n"
        "print(len(os.listdir('/proc/self/task')), torch.cuda.is_initialized(), random.getstate() == state)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.stdout.split(), result.stderr) == (["1", "False", "True"], "")


def test_no_other_program_imports_it():
    """A program with Hydra does not import lightkit's launcher, which Hydra knows only after `register`."""
    code = "from hydra.core.plugins import Plugins; print(*Plugins.instance().class_name_to_class)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "basic_launcher" in result.stdout and "lightkit" not in result.stdout


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Returns a function that launches a function of the configuration as the jobs of a sweep in ``tmp_path``."""
    # Other tests have started threads in this process; these jobs use none of them.
    monkeypatch.setattr(launcher, "check_threads", lambda: None)
    monkeypatch.setattr(launcher, "preload", lambda config: None)
    monkeypatch.chdir(tmp_path)
    fork_launcher.register()

    def launch(function, jobs, *overrides):
        with initialize_config_module("lightkit.conf", version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            words = [
                "hydra/launcher=fork",
                f"hydra.launcher.jobs={jobs}",
                "hydra.sweep.dir=sweep",
                "hydra.mode=MULTIRUN",
            ]
            config = loader.load_configuration("train", words, run_mode=RunMode.MULTIRUN)
            with open_dict(config):
                config.hydra.job.name = "train"
            context = HydraContext(config_loader=loader, callbacks=hydra._internal.callbacks.Callbacks())
            forking = Plugins.instance().instantiate_launcher(context, function, config)
            return forking.launch([[word] for word in overrides], 5)

    return launch


def tell(config):
    assert HydraConfig.get().mode == RunMode.MULTIRUN
    # The first job waits for the second one, which then ends first if both run at the same time.
    second = Path(config.run_dir).parent / "6" / "pid"
    end = time.monotonic() + (60 if HydraConfig.get().launcher.jobs == 2 else 0.3)
    while config.seed == 1 and not second.exists() and time.monotonic() < end:
        time.sleep(0.01)
    Path(config.run_dir, "pid").write_text(str(os.getpid()))
    job = HydraConfig.get()
    return config.seed, job.job.num, job.runtime.output_dir, os.getpid(), second.exists()


@linux
@pytest.mark.parametrize("jobs", [1, 2])
def test_jobs_in_order(sweep, tmp_path, jobs):
    """Each job has its own configuration, number and directory; results are in order, and no zombie remains."""
    returns = [job.return_value for job in sweep(tell, jobs, "seed=1", "seed=2", "seed=3")]
    assert [value[:3] for value in returns] == [(n, n + 4, str(tmp_path / "sweep" / str(n + 4))) for n in (1, 2, 3)]
    processes = {value[3] for value in returns}
    assert len(processes) == 3 and os.getpid() not in processes
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    assert returns[0][4] == (jobs == 2)


def fail(config):
    if config.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if config.seed == 2:
        raise CarriedError(ConfigError("cannot be"))
    if config.seed == 3:
        time.sleep(0.2)
        Path(config.run_dir, "done").touch()
    return config.seed


@linux
def test_a_job_that_is_killed_leaves_the_others(sweep):
    """The launcher returns the results of the other jobs."""
    returns = sweep(fail, 1, "seed=1", "seed=4")
    assert [job.status for job in returns] == [JobStatus.FAILED, JobStatus.COMPLETED]
    assert returns[1].return_value == 4


@linux
def test_bad_input_ends_the_sweep_in_order(sweep, tmp_path):
    """A job that runs at the same time ends normally, and the next job does not begin."""
    with pytest.raises(CarriedError):
        sweep(fail, 2, "seed=2", "seed=3", "seed=4")
    assert (tmp_path / "sweep" / "6" / "done").exists()
    assert not (tmp_path / "sweep" / "7").exists()


@linux
def test_an_override_that_does_not_compose(sweep):
    """The launcher raises Hydra's error after the end of the running job."""
    with pytest.raises(hydra.errors.ConfigCompositionException, match="sede"):
        sweep(fail, 2, "seed=3", "sede=4")
