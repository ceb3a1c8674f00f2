"""Wrong input on the command line: one clear error, a nonzero exit status, and no lost data."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from support.commands import run, run_python, the_error
from support.processes import wait_for

pytestmark = pytest.mark.slow

QUICK = ["+experiment=cnn", "+debug=quick"]
ONE_CYCLE = [
    *("+experiment=cnn", "scheduler=step", "~scheduler.step_size", "~scheduler.gamma", "+scheduler.max_lr=0.1"),
    "scheduler._target_=torch.optim.lr_scheduler.OneCycleLR",
]


def assert_fails(result, *expected):
    """Asserts that the command failed with one error that has all expected texts, and without a traceback."""
    the_error(result)
    for text in expected:
        assert text in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["+experiment=cn"], ["there is no experiment=cn", "did you mean cnn?"]),
        (["+experimnt=cnn"], ["'experimnt'", "did you mean experiment?"]),
        (["experiment=cnn"], ["use +experiment=cnn"]),
        (["data=mnst"], ["there is no data=mnst", "mnist"]),
        (["logger=null"], ["there is no logger=null; did you mean none? Choices: all, csv, default"]),
        (["tags=[a,[b]]"], ["tags must be a list of words, such as tags=[baseline,small], got ['a', ['b']]"]),
        (["compile=maybe"], ["compile must be bool, got 'maybe'"]),
        (["scheduler=null"], ["there is no scheduler=null; did you mean none?"]),
        (["trainer=null"], ["there is no trainer=null. Choices: cpu, default, gpu"]),
        (["+experiment=null"], ["there is no experiment=null. Choices: char_rnn, cnn"]),
        (["-m", "callbacks=default,null"], ["there is no callbacks=null; did you mean none?"]),
        (["callbacks=[default,null]"], ["there is no callbacks=null; did you mean none?"]),
        (["callbacks=[default,3]"], ["there is no callbacks=3. Choices: default, early_stopping"]),
        (["callbacks=[default,early_stoping]"], ["no callbacks=early_stoping; did you mean early_stopping? Choices"]),
        (["callbacks=default,swa"], ["the key has one value", "a list of several is callbacks=[default,swa]"]),
        (["+callbacks=swa"], ["which callbacks=swa replaces; with the default choice, callbacks=[default,swa]"]),
        (["+experiment=cnn", "callbacks=[default,ema,swa]"], ["are two averages of the weights: choose one"]),
        (["~trainer"], ["the configuration needs trainer, which cannot be removed"]),
        (["optm=sgd"], ["'optm'", "did you mean optim"]),
        (["trainer.max_epoch=3"], ["'trainer.max_epoch'", "did you mean trainer.max_epochs"]),
        (["model._target_=lightkit.models.CN"], ["did you mean lightkit.models.CNN?"]),
        (["model._target_=os.system"], ["not in a package that a configuration may use"]),
        (["trainer.max_epochs=many"], ["max_epochs must be int or null, got 'many'"]),
        (["seed=x"], ["seed must be int, got 'x'"]),
        (["seed=-1"], ["seed must be from 0 to 4294967295, got -1"]),
        (["test=off"], ["test must be bool, got 'off'"]),
        (["optim.lr=-1"], ["Invalid learning rate"]),
        (
            ["scheduler=step", "scheduler.step_size=0"],
            ["torch.optim.lr_scheduler.StepLR(step_size=0, gamma=0.1) fails at its first step: integer modulo by zero"],
        ),
        (
            [*ONE_CYCLE, "+scheduler.total_steps=3"],
            ["ends after 3 steps", "5 epochs: set scheduler.total_steps=5, or trainer.max_epochs=3"],
        ),
        (
            [*ONE_CYCLE, "+scheduler.epochs=2", "+scheduler.steps_per_epoch=2"],
            ["ends after 4 steps", "5 epochs: set scheduler.epochs=5 scheduler.steps_per_epoch=1"],
        ),
        (
            ["+debug=quick", *ONE_CYCLE, "+scheduler.total_steps=1", "trainer.max_epochs=3", "trainer.max_steps=9"],
            ["the scheduler rejects the optimizer or the length of the training: Tried to step 2 times"],
        ),
        (["task.loss.weight=[1,2]"], ["weight of the loss has 2 numbers, but the data has 10 classes"]),
        (["task.loss.weight=even"], ["weight must be a list of numbers, 'balanced' or None, got 'even'"]),
        (["trainer.val_check_interval=100000"], ["`val_check_interval` (100000) must be less than or equal to"]),
        (["model.num_classes=7"], ["the data has 10 classes but model.num_classes is 7"]),
        (["ckpt_path=nowhere.ckpt"], ["there is no checkpoint nowhere.ckpt"]),
        (["ckpt_path=last"], ["there is no last.ckpt below"]),
        (["data=mnist", "data.data_dir=nowhere"], ["data_dir=nowhere lacks"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_train(call, tmp_path, arguments, expected):
    """The error for an unknown name has the nearest known ones, and the error for a wrong value the expected one."""
    assert_fails(call("train", *arguments, cwd=tmp_path), *expected)


def test_a_figure_that_is_not_logged(call, tmp_path):
    """The error of a callback that monitors an unknown metric is Lightning's, with the known metrics."""
    stop = ["_target_=lightning.pytorch.callbacks.EarlyStopping", "monitor=nonsense"]
    result = call("train", *QUICK, *(f"+callbacks.stop.{argument}" for argument in stop), cwd=tmp_path)
    assert_fails(result, "`nonsense` which is not available", "`val/loss`")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LIGHTKIT_NATIVE": "foo"}, "LIGHTKIT_NATIVE must be one of auto, require, off, got 'foo'"),
        (
            {"LIGHTKIT_NATIVE": "require", "CXX": "/nonexistent", "LIGHTKIT_CACHE_DIR": "empty"},
            "LIGHTKIT_NATIVE=require, but there is no native library: the compiler named by CXX ('/nonexistent')",
        ),
    ],
    ids=["foo", "require"],
)
def test_native_kernels_that_cannot_be_had(tmp_path, variables, expected):
    """A wrong value of LIGHTKIT_NATIVE, or required kernels that cannot be built, end a job before it begins."""
    assert_fails(run("train", *QUICK, cwd=tmp_path, environment=variables), expected)


def test_own_modules_lie_in_the_current_directory(tmp_path):
    """The console script and `python -m` both find a module in the current directory."""
    (tmp_path / "own.py").write_text("class Net:\n    pass\n")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "lightkit-train"
    script.write_text("import sys\nfrom lightkit.train import main\nsys.exit(main())\n")
    for start in (["-m", "lightkit.train"], [str(script)]):
        arguments = [*start, "+experiment=cnn", "model._target_=own.Net"]
        result = run_python(*arguments, cwd=tmp_path, environment={"LIGHTKIT_TARGETS": "own"})
        # The keys of lightkit's model go with its class, so that the user's class gets no argument.
        assert_fails(result, "model._target_ must be a torch.nn.Module, got own.Net")


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_a_process_ends_with_the_status(tmp_path, name):
    """A process of a command prints the error and has the exit status that the in-process tests see."""
    result = run_python("-m", f"lightkit.{name}", "ckpt_path=nowhere.ckpt", cwd=tmp_path)
    assert_fails(result, "there is no checkpoint nowhere.ckpt")


@pytest.mark.parametrize("command_name", ["train", "evaluate", "predict"])
def test_nobody_waits_for_torch_to_see_a_mistake(command_name):
    """The commands compose the configuration before they import torch and Lightning, which takes seconds."""
    program = f"import sys, lightkit.{command_name}; sys.exit(not {{'torch', 'lightning'}}.isdisjoint(sys.modules))"
    run_python("-c", program, status=0)


def test_read_only_output_directory(tmp_path):
    """The error names a directory that cannot be written, before any training."""
    place = tmp_path / "place"
    place.mkdir()
    if os.geteuid() == 0:
        # root ignores permissions; a file in the place of a directory stops root too.
        (place / "runs").write_text("in the way")
        assert_fails(run("train", *QUICK, cwd=place), "runs")
    else:
        place.chmod(0o555)
        assert_fails(run("train", *QUICK, cwd=place), "Permission denied")
        place.chmod(0o755)


def test_interrupt(tmp_path):
    """Ctrl-C ends a training with a hint how to resume, and with the status of an interrupted program."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lightkit.train", "+experiment=cnn", "trainer.max_epochs=1000", "hydra.run.dir=out"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a script ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    checkpoint = tmp_path / "out" / "checkpoints" / "last.ckpt"
    wait_for(checkpoint.exists, process)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted: ckpt_path=last goes on" in errors and "Traceback" not in errors
    assert torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns the checkpoint of a very short run."""
    directory = tmp_path_factory.mktemp("short")
    run("train", *QUICK, "hydra.run.dir=out", cwd=directory, status=0)
    return directory / "out" / "checkpoints" / "last.ckpt"


def test_corrupt_checkpoint(call, tmp_path, checkpoint):
    """Every command that reads a damaged checkpoint says so, and leaves the file unchanged."""
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(checkpoint.read_bytes()[:5000])
    for name, arguments in (("train", QUICK), ("evaluate", []), ("predict", ["input=x.png"])):
        (tmp_path / "x.png").write_bytes(b"")
        assert_fails(call(name, f"ckpt_path={broken}", *arguments, cwd=tmp_path), "damaged or not a checkpoint")
    assert broken.stat().st_size == 5000


def test_checkpoint_of_another_model(call, tmp_path, checkpoint):
    """The error of resuming with another architecture names the different weight."""
    result = call("train", *QUICK, f"ckpt_path={checkpoint}", "model=rnn", "data.layout=rows", cwd=tmp_path)
    assert_fails(result, "a checkpoint of another model", "classifier.1.weight is unknown here")


def test_checkpoint_without_configuration(call, tmp_path):
    """The error for another program's checkpoint says that lightkit.train did not write it."""
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    assert_fails(call("evaluate", "ckpt_path=plain.ckpt", cwd=tmp_path), "was not made by lightkit.train")


def test_corrupt_idx_file(call, tmp_path):
    """The error names a truncated data file and its size."""
    for name in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        (tmp_path / name).write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2]))
    result = call("train", *QUICK, "data=fashion_mnist", f"data.data_dir={tmp_path}", cwd=tmp_path)
    assert_fails(result, "train-labels-idx1-ubyte is truncated: 10 bytes")


def test_folder_without_images(call, tmp_path, checkpoint):
    """The error names what a folder holds instead of images."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "readme.txt").write_text("hello")
    result = call("predict", f"ckpt_path={checkpoint}", "input=in", cwd=tmp_path)
    assert_fails(result, "in holds no images", "only readme.txt")


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("evaluate", ["ckpt_path=5"], "there is no checkpoint 5"),
        ("evaluate", ["ckpt_path=null"], "ckpt_path must be str, got null"),
        ("evaluate", ["-m"], "-m is for lightkit.train"),
        ("evaluate", ["accelerator=foo"], "accelerator='foo'"),
        ("evaluate", ["accelerator=null"], "accelerator must be str, got null"),
        ("evaluate", ["output=[a]/b"], "output=[a]/b: there is no directory"),
        ("evaluate", ["output=."], "output=. is a directory"),
        ("predict", ["ckpt_path=1.50", "input=."], "there is no checkpoint 1.50"),
        ("predict", ["ckpt_path=null", "input=."], "ckpt_path must be str, got null"),
        ("predict", ["-m", "input=a,b"], "-m is for lightkit.train: lightkit.predict does one thing at a time"),
        ("predict", ["input=null"], "input=PATH must say which images"),
        ("predict", ["input=007"], "input=007 does not exist"),
        ("predict", ["input=.", "batch_size=x"], "batch_size must be int or null, got 'x'"),
        ("predict", ["input=.", "batch_size=0"], "batch_size must be at least 1, got 0"),
        ("predict", ["input=.", "invert=1"], "invert must be auto, true or false, got 1"),
        ("predict", ["input=.", "length=1.5"], "length must be int or null, got 1.5"),
        ("predict", ["input=.", "temperature=hot"], "temperature must be float or null, got 'hot'"),
        ("predict", ["input=.", "output=."], "output=. is a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_values(call, tmp_path, checkpoint, name, arguments, expected):
    """The error names the key with a wrong value and says what was expected."""
    assert_fails(call(name, f"ckpt_path={checkpoint}", *arguments, cwd=tmp_path), expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["ckpt_path", "input"])
def test_missing_argument(call, tmp_path, checkpoint, missing):
    """The error names the missing argument."""
    given = {"ckpt_path": str(checkpoint), "input": "."}
    arguments = [f"{key}={value}" for key, value in given.items() if key != missing]
    assert_fails(call("predict", *arguments, cwd=tmp_path), missing)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounts a small file system")
def test_disk_full_while_writing_a_checkpoint(tmp_path, checkpoint):
    """If the disk fills up during training, the error says so, and the previous checkpoint still loads."""
    disk = tmp_path / "disk"
    disk.mkdir()
    # A checkpoint of this model with Adam's state takes 1.1 MB, so that one or two fit on the disk.
    train = f"{sys.executable} -m lightkit.train +experiment=cnn data.batch_size=400 logger=csv test=false"
    script = (
        f"mount -t tmpfs -o size=2500k tmpfs {disk} && cd {disk} && {train} hydra.run.dir=out; status=$?; "
        f"cp out/checkpoints/*.ckpt {tmp_path}; exit $status"
    )
    result = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
    if "permission denied" in result.stderr.lower() and "mount" in result.stderr:
        pytest.skip("mounting is not permitted here")
    assert result.returncode == 1
    assert "could not be written" in result.stderr and "the one before it is intact" in result.stderr
    saved = list(tmp_path.glob("*.ckpt"))
    assert saved
    for path in saved:
        assert torch.load(path, weights_only=True)["state_dict"]
