"""The launcher that forks: what a process may fork from, and what becomes of each job, by small functions as jobs."""

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
    """What becomes of a job that is a function."""
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
        # It would print what pytest was doing.
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
    """It counts as failed, by an error that a person can act on."""
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
    """An error in the input comes with its message alone, and a status with nothing else."""
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


class OfTheJobAlone(Exception):
    """Cannot be sent between processes: unpickling it lacks an argument."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


@linux
def test_a_fault_of_the_program():
    """The error of a job comes with its traceback, whatever class it is of."""

    def run():
        job_return = JobReturn(status=JobStatus.FAILED)
        try:
            raise OfTheJobAlone(1, 2)
        except OfTheJobAlone as error:
            job_return.return_value = error
        return job_return

    with pytest.raises(JobError, match="job 3: OfTheJobAlone: 1 and 2") as error:
        _ = outcome(run).return_value
    assert "raise OfTheJobAlone(1, 2)" in str(error.value.__cause__)


@linux
def test_what_a_job_finds():
    """Python's random numbers as they were, a session of its own, and its share of the threads."""
    state = random.getstate()
    session, drawn, threads = outcome(
        lambda: returning((os.getsid(0), random.random(), torch.get_num_threads())), threads=1
    ).return_value
    assert session not in (os.getsid(0), os.getpid())
    assert drawn == random.random() and threads == 1
    random.setstate(state)


@pytest.mark.parametrize("jobs", [0, -1, 1.5, "two", True])
def test_a_number_of_jobs_that_is_none(jobs):
    """Refused before the first job."""
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.jobs must be a whole number of at least 1, got"):
        ForkLauncher(jobs).setup(hydra_context=None, task_function=None, config=None)


@pytest.mark.parametrize("why", ["darwin", "torchrun", "CUDA"])
def test_where_no_process_can_fork(monkeypatch, why):
    """One line, which says what to do instead."""
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
    """Whoever has left a thread in the process reads its name."""
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
def test_what_is_imported_starts_no_thread():
    """After all imports and a product of NumPy's a process may fork; CUDA and random numbers are as before."""
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
    """Hydra knows the launcher by a name that is no file, and only from a sweep's start."""
    code = "from hydra.core.plugins import Plugins; print(*Plugins.instance().class_name_to_class)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "basic_launcher" in result.stdout and "lightkit" not in result.stdout


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Launches jobs that are a function of the configuration, in a directory of their own."""
    # Other tests have computed in this process; what the jobs do here needs none of those threads.
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
    Path(config.run_dir, "pid").write_text(str(os.getpid()))
    # The later one ends first.
    time.sleep(0.3 if config.seed == 1 else 0)
    return config.seed, HydraConfig.get().job.num, HydraConfig.get().runtime.output_dir, os.getpid()


@linux
@pytest.mark.parametrize("jobs", [1, 2])
def test_jobs_in_order(sweep, tmp_path, jobs):
    """Each has its own configuration, number and directory; results come in order, and no zombie is left."""
    returns = [job.return_value for job in sweep(tell, jobs, "seed=1", "seed=2", "seed=3")]
    assert [value[:3] for value in returns] == [(n, n + 4, str(tmp_path / "sweep" / str(n + 4))) for n in (1, 2, 3)]
    processes = {value[3] for value in returns}
    assert len(processes) == 3 and os.getpid() not in processes
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    one, two = ((tmp_path / "sweep" / number / "pid").stat().st_mtime_ns for number in ("5", "6"))
    assert (two - one < 0.3e9) == (jobs == 2)


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
    """What is known of them is returned."""
    returns = sweep(fail, 1, "seed=1", "seed=4")
    assert [job.status for job in returns] == [JobStatus.FAILED, JobStatus.COMPLETED]
    assert returns[1].return_value == 4


@linux
def test_bad_input_ends_the_sweep_in_order(sweep, tmp_path):
    """A job beside it comes to its end, and the next one does not begin."""
    with pytest.raises(CarriedError):
        sweep(fail, 2, "seed=2", "seed=3", "seed=4")
    assert (tmp_path / "sweep" / "6" / "done").exists()
    assert not (tmp_path / "sweep" / "7").exists()


@linux
def test_an_override_that_does_not_compose(sweep):
    """Raised as Hydra's own launcher raises it, once the job beside it has ended."""
    with pytest.raises(hydra.errors.ConfigCompositionException, match="sede"):
        sweep(fail, 2, "seed=3", "sede=4")
