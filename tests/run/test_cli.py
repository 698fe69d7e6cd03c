"""The command line as a user meets it: real processes on the real digits."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import forked
import pytest
import torch
from safetensors.torch import load_file

from pruneflow import load_classifier
from pruneflow.deploy.classifying import KEY
from pruneflow.models import small_cnn
from pruneflow.run.ends import TARGET_MISSED

QUICK = (
    "dense.epochs=2",
    "pruning.epochs=3",
    "schedule.rounds=3",
    "trainer.accelerator=cpu",
    "deploy.batches=[]",
)


UNUSED = """
from torch import nn
from pruneflow.models import small_cnn


class Network(nn.Module):
    def __init__(self, num_classes, in_channels, width):
        super().__init__()
        self.used, self.unused = small_cnn(num_classes, in_channels, width), nn.Linear(3, 3)

    def forward(self, images):
        return self.used(images)
"""

FULL_DISK = """
import collections, shutil, torch
from pruneflow.run.cli import main


def save(checkpoint, path):
    path.write_bytes(b"half")
    usage = collections.namedtuple("usage", "total used free")
    shutil.disk_usage = lambda folder: usage(9, 9, 0)
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8704 vs 8600")


torch.save = save
main()
"""

COMMAND = (sys.executable, "-m", "pruneflow")


def pruneflow(*arguments, cwd, check=True):
    run = forked.run(*arguments, cwd=cwd)
    if check and run.returncode:
        pytest.fail(run.stdout + run.stderr)
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, and what it printed."""
    cwd = tmp_path_factory.mktemp("cli")
    command = [*COMMAND, *QUICK, "hydra.run.dir=run"]
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return cwd / "run", run.stdout


def facts(folder):
    return json.loads((folder / "report.json").read_text())


def test_the_run_folder(finished):
    folder, _ = finished
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files >= {
        "config.yaml",
        "plan.txt",
        "metrics.csv",
        "checkpoints/dense.safetensors",
        "model.packed",
        "model.safetensors",
        "example.png",
        "report.json",
        "report.md",
        "report.html",
        "plots/accuracy.png",
        "plots/rounds.png",
        "plots/density.png",
    }
    assert not [name for name in files if "partial" in name]


def test_the_plan_is_printed_before_training(finished):
    folder, printed = finished
    plan = (folder / "plan.txt").read_text()
    assert plan in printed
    assert printed.index("amount of the remaining") < printed.index("Dense phase")
    assert printed.count("amount of the remaining") == 1


def test_every_epoch_is_a_line_in_the_output_and_with_its_time_in_the_log(finished):
    folder, printed = finished
    lines = [line for line in printed.splitlines() if line.startswith("Epoch ")]
    assert [line[:16] for line in lines] == [f"Epoch {n} ({n + 1} of 5)" for n in range(5)]
    with (folder / "metrics.csv").open() as file:
        for line, row in zip(lines, csv.DictReader(file), strict=True):
            assert f"round {row['round']}, {100 * float(row['sparsity']):.2f} % sparse" in line
            assert f"val accuracy {100 * float(row['val_accuracy']):.2f} %" in line
            assert re.search(r"train loss \d.*; \d:\d\d:\d\d left$", line)
    assert "\x1b" not in printed
    assert "\r" not in printed
    log = (folder / "pruneflow.log").read_text()
    for line in (*lines, "Loading images: Digits", "Testing the dense and the pruned network"):
        assert re.search(
            rf"^\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d.* {re.escape(line)}$", log, re.MULTILINE
        )


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_on_a_terminal_there_is_a_bar_and_the_lines_above_it(tmp_path):
    terminal, inside = os.openpty()
    tiny = ("dense.epochs=1", "pruning.epochs=1", "schedule.rounds=1", "deploy.batches=[]")
    process = subprocess.Popen(
        [*COMMAND, *tiny, "trainer.limit_train_batches=2", "hydra.run.dir=run"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=inside,
        stderr=subprocess.STDOUT,
    )
    os.close(inside)
    printed = b""
    line = re.compile(rb"Epoch 1 \(2 of 2\), round 1, 98.00 % sparse")
    with suppress(OSError):  # which is how a terminal ends
        while not line.search(printed) and (part := os.read(terminal, 2**16)):
            printed += part
    process.kill()
    process.wait()
    os.close(terminal)
    assert line.search(printed), printed.decode()
    assert b"2/2" in printed  # of the bar
    log = (tmp_path / "run" / "pruneflow.log").read_text()
    assert log.count("Epoch ") == 2


def test_the_model_loads_strict_into_the_plain_network_with_exact_zeros(finished):
    folder, _ = finished
    report = facts(folder)
    network = small_cnn(num_classes=10, in_channels=1)
    network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    zeros = sum(int((network.get_parameter(x["name"]) == 0).sum()) for x in report["layers"])
    weights = sum(layer["weights"] for layer in report["layers"])
    assert zeros == round(0.98 * weights) == sum(layer["zeros"] for layer in report["layers"])
    remaining = sum(int((p != 0).sum()) for p in network.parameters())
    assert report["size"]["remaining"] == pytest.approx(remaining, abs=2)  # a bias may be zero


def test_the_lines_in_the_report_classify_a_picture_in_a_fresh_process(finished):
    folder, _ = finished
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "report.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) == 3
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    said = re.fullmatch(r"Prediction\(name='(\d)', probability=(0\.\d+|1\.0)\)\n", run.stdout)
    assert said, run.stdout
    report = facts(folder)
    assert report["example"] in report["classifier"]["classes"]
    assert report["classifier"]["arguments"] == {"width": 32, "num_classes": 10, "in_channels": 1}
    assert len(report["classifier"]["mean"]) == len(report["classifier"]["std"]) == 1


def test_the_report_agrees_with_the_metrics(finished):
    folder, _ = finished
    report = facts(folder)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["dense"] * 2 + ["rounds"] * 3
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3, 4]
    assert [int(row["round"]) for row in rows] == [0, 0, 1, 2, 3]
    assert [line["epoch"] for line in report["rounds"]] == [2, 3, 4]
    assert all(float(row["train_loss"]) > 0 for row in rows)
    for line, row in zip(report["rounds"], rows[2:], strict=True):
        assert line["sparsity"] == pytest.approx(float(row["sparsity"]))
        assert line["fine_tuned_accuracy"] == float(row["val_accuracy"])
    assert report["final"]["val_accuracy"] == pytest.approx(float(rows[-1]["val_accuracy"]))
    assert report["dense"]["val_accuracy"] == pytest.approx(float(rows[1]["val_accuracy"]))
    assert report["command"].startswith("python -m pruneflow dense.epochs=2")


def test_a_sweep_trains_the_dense_phase_once_and_gives_the_same_as_single_runs(tmp_path, finished):
    single, _ = finished
    pruneflow(
        "-m",
        "recipe=digits",
        "schedule=compounding,linear",
        "schedule.target=0.5,0.98",
        *QUICK,
        cwd=tmp_path,
    )
    (sweep,) = tmp_path.glob("outputs/digits/sweep_*")
    reports = [facts(sweep / str(job)) for job in range(4)]
    assert [report["dense_cached"] for report in reports] == [False, True, True, True]
    assert [round(report["final"]["sparsity"], 3) for report in reports] == [0.5, 0.98, 0.5, 0.98]
    assert [report["schedule"].split("(")[0] for report in reports] == [
        "Compounding",
        "Compounding",
        "Linear",
        "Linear",
    ]
    assert len({report["dense"]["test_accuracy"] for report in reports}) == 1
    # Whether the dense phase came from the cache changes nothing.
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (sweep / "1", single))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_layer_scope_reparametrize_rewind_and_other_groups(tmp_path):
    pruneflow(
        *QUICK,
        "schedule=cubic",
        "schedule.target=0.8",
        "pruning.scope=layer",
        "pruning.rewind=learning_rate",
        "masking=reparametrize",
        "optimizer=adamw",
        "lr_scheduler=multistep",
        "importance=random",
        "logger=csv",
        "classifier.channels_last=true",
        "loss.label_smoothing=0.1",
        "trainer.precision=bf16-mixed",
        "hydra.run.dir=run",
        cwd=tmp_path,
    )
    for layer in facts(tmp_path / "run")["layers"]:
        assert layer["zeros"] == round(0.8 * layer["weights"])


def test_a_remainder_of_epochs_trains_at_a_learning_rate_and_bfloat16_works(tmp_path):
    pruneflow(
        "dense.epochs=1",
        "schedule.rounds=3",
        "pruning.epochs=7",
        "pruning.rewind=learning_rate",
        "trainer.precision=bf16-true",
        "deploy.batches=[2]",
        "hydra.run.dir=run",
        cwd=tmp_path,
    )
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))[1:]
    assert [int(row["round"]) for row in rows] == [1, 1, 2, 2, 3, 3, 3]
    assert all(float(row["lr"]) > 0 for row in rows)
    assert float(rows[0]["lr"]) == float(rows[2]["lr"]) == float(rows[4]["lr"])


def test_each_stage_has_a_learning_rate_schedule_of_its_own_length(tmp_path):
    pruneflow(
        "dense.epochs=2",
        "pruning.epochs=4",
        "schedule.rounds=2",
        "pruning.rewind=null",
        "optimizer.lr=0.1",
        "trainer.accumulate_grad_batches=2",
        "deploy.batches=[]",
        "hydra.run.dir=run",
        cwd=tmp_path,
    )
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    expected = [0.1, 0.05, 0.1, 0.0853553, 0.05, 0.0146447]  # half a cosine, as epochs begin
    assert rates == pytest.approx(expected, abs=1e-6)


def test_a_run_that_ends_early_says_so_and_loses_nothing(tmp_path):
    run = pruneflow(
        "dense.epochs=1",
        "pruning.epochs=2200",
        "deploy.batches=[]",
        "+trainer.max_time=00:00:00:04",
        "hydra.run.dir=run",
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == TARGET_MISSED
    report = facts(tmp_path / "run")
    assert 0 < len(report["rounds"]) < 11
    assert "**Target not reached.**" in (tmp_path / "run" / "report.md").read_text()
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_training_that_diverges_ends_with_one_message(tmp_path):
    arguments = ["optimizer.lr=1e30", "dense.epochs=0", "pruning.epochs=3", "schedule=one_shot"]
    run = pruneflow(*arguments, "hydra.run.dir=run", cwd=tmp_path, check=False)
    assert run.returncode == 1
    assert "training has diverged" in run.stderr and "; lower optimizer.lr" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_sweep_goes_on_after_a_job_that_fails(tmp_path):
    few = ["dense.epochs=0", "pruning.epochs=1", "schedule=one_shot", "deploy.batches=[]"]
    sweep = ["-m", *few, "optimizer.lr=0.1,1e30,-1,0.05", "hydra.sweep.dir=sweep"]
    run = pruneflow(*sweep, cwd=tmp_path, check=False)
    assert run.returncode == 1
    assert "failed jobs of the sweep: #1, #2; see" in run.stderr and "Traceback" not in run.stderr
    assert "has diverged" in run.stdout and "Invalid learning rate: -1" in run.stdout
    assert [(tmp_path / "sweep" / job / "report.md").exists() for job in "0123"] == [1, 0, 0, 1]


def test_a_sweep_ends_when_its_first_job_is_refused(tmp_path):
    run = pruneflow("-m", "seed=x,0", "hydra.sweep.dir=sweep", cwd=tmp_path, check=False)
    assert run.returncode == 1
    assert "`seed` must be a whole number, got 'x'" in run.stderr
    assert not (tmp_path / "sweep" / "1").exists()


def test_a_warning_is_a_line_in_the_output_and_in_the_log(tmp_path):
    few = ["dense.epochs=0", "pruning.epochs=1", "schedule=one_shot", "schedule.target=0.9999"]
    run = pruneflow(*few, "deploy.batches=[]", "hydra.run.dir=run", cwd=tmp_path)
    [line] = [line for line in run.stdout.splitlines() if "nothing is left of" in line]
    assert re.match(r"Warning: nothing is left of \d", line)
    assert line in (tmp_path / "run" / "pruneflow.log").read_text()
    assert "UserWarning" not in run.stdout + run.stderr


def test_structured_torch_method(tmp_path):
    pruneflow(
        *QUICK,
        "importance=ln_structured",
        "pruning.scope=layer",
        "schedule.target=0.5",
        "hydra.run.dir=run",
        cwd=tmp_path,
    )
    assert facts(tmp_path / "run")["final"]["sparsity"] == pytest.approx(0.5, abs=0.02)


def test_starts_from_given_weights_without_a_dense_phase(tmp_path, finished):
    folder, _ = finished
    pruneflow(
        *QUICK[1:],
        "dense.epochs=0",
        f"dense.weights={folder / 'checkpoints' / 'dense.safetensors'}",
        "hydra.run.dir=run",
        cwd=tmp_path,
    )
    report = facts(tmp_path / "run")
    assert report["dense"]["test_accuracy"] == facts(folder)["dense"]["test_accuracy"]
    assert report["plan"][0]["at"] == 0


def test_what_a_run_killed_at_its_very_end_has_left_is_deleted(finished):
    folder, _ = finished
    (folder / "checkpoints" / "rounds.ckpt").write_bytes(b"large")
    run = pruneflow(*QUICK, "hydra.run.dir=run", "resume=true", cwd=folder.parent)
    assert "Already finished" in run.stdout
    assert not list(folder.rglob("*.ckpt"))


def test_the_forms_of_a_checkpoint(tmp_path, finished):
    folder, _ = finished
    run = pruneflow(
        "task=deploy",
        f"checkpoint={folder / 'model.packed'}",
        f"dense.weights={folder / 'checkpoints' / 'dense.safetensors'}",
        "deploy.batches=[1,3]",
        "schedule.target=0.5",
        "++dense.epochs=3",
        "hydra.run.dir=forms",
        cwd=tmp_path,
    )
    assert "task=deploy does not use schedule.target=0.5, ++dense.epochs=3\n" in run.stdout
    forms = json.loads((tmp_path / "forms" / "forms.json").read_text())
    names = [form["name"] for form in forms]
    assert names[0] == "dense"
    assert {"packed", "shrunk", "sparse runtime"} <= set(names)
    report = facts(folder)
    for form in forms:
        said = r"[\d,]+ of [\d,]+ parameters and [\d,]+ of [\d,]+ multiply-adds are left\."
        assert re.fullmatch(said if form["name"] == "shrunk" else "", form["note"]), form
        stage = "dense" if form["name"].startswith("dense") else "final"
        assert form["accuracy"] == pytest.approx(report[stage]["test_accuracy"], abs=0.003)
        assert set(form["seconds"]) == {"1", "3"}
        assert form["bytes"] > 0 and form["peak_bytes"] > 0
    assert (tmp_path / "forms" / "forms.md").read_text().count("\n") == len(forms) + 2
    onnx = pytest.importorskip("onnx", reason="needs pip install 'pruneflow[deploy]'")
    about = facts(folder)["classifier"]
    exported = onnx.load(tmp_path / "forms" / "shrunk.onnx").metadata_props
    assert [json.loads(entry.value) for entry in exported if entry.key == KEY] == [about]
    classifier = load_classifier(tmp_path / "forms")
    assert classifier.predict(folder / "example.png") == load_classifier(folder).predict(
        folder / "example.png"
    )
    for file in ("model.packed", "shrunk.pt2", "shrunk.onnx"):
        assert (tmp_path / "forms" / file).stat().st_size > 0
    assert "Deployment formats" in run.stdout


def test_weights_of_another_network_are_refused_when_deployed(tmp_path, finished):
    checkpoint = f"checkpoint={finished[0] / 'model.packed'}"
    run = pruneflow("task=deploy", checkpoint, "model.width=8", cwd=tmp_path, check=False)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr


STAGES = {"the dense phase": "Dense phase:", "the rounds": "rounds:", "measuring": "Measuring"}


@pytest.mark.parametrize(
    ("number", "status", "stage", "kill"),
    [
        (signal.SIGTERM, 143, "the dense phase", os.kill),
        (signal.SIGINT, 130, "the rounds", os.kill),
        (signal.SIGTERM, 143, "measuring", os.kill),
        (signal.SIGINT, 130, "measuring", os.killpg),  # as Ctrl-C in a terminal does
    ],
)
def test_a_run_that_is_stopped_says_so_and_how_to_go_on(tmp_path, number, status, stage, kill):
    arguments = ["dense.epochs=40", "trainer.accelerator=cpu", "hydra.run.dir=a run"]
    if stage != "the dense phase":
        arguments += ["dense.epochs=1", f"pruning.epochs={1 if stage == 'measuring' else 40}"]
        arguments += ["schedule=one_shot", "deploy.batches=[1]"]
    arguments = list({a.partition("=")[0]: a for a in arguments}.values())
    with (tmp_path / "said.txt").open("w") as said:
        process = subprocess.Popen(
            [*COMMAND, *arguments], cwd=tmp_path, stdout=said, stderr=said, start_new_session=True
        )
    deadline = time.monotonic() + 120
    while STAGES[stage] not in (tmp_path / "said.txt").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill(process.pid, number)
    assert process.wait(60) == status
    said = (tmp_path / "said.txt").read_text()
    command = "Resume with: python -m pruneflow dense.epochs="
    assert f"stopped by {number.name}. {command}" in said
    assert "'hydra.run.dir=a run'" in said and "resume=true" in said


def test_a_disk_that_is_full_is_called_so(tmp_path):
    (tmp_path / "full.py").write_text(FULL_DISK)
    command = [sys.executable, "full.py", *QUICK, "dense.cache=null", "hydra.run.dir=run"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "pruneflow: no space left on the disk" in run.stderr
    assert "dense.ckpt" in run.stderr and "resume=true" in run.stderr
    assert "Traceback" not in run.stderr
    assert not [*tmp_path.rglob("*partial*")]


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=0,1"]])
@pytest.mark.parametrize("path", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, sweep, path):
    (tmp_path / "file").write_text("")
    key = "hydra.sweep.dir" if sweep else "hydra.run.dir"
    run = pruneflow(*sweep, f"{key}={path}", cwd=tmp_path, check=False)
    assert run.returncode == 1
    assert f"`{key}` must be a folder that can be written to, got '{path}' (" in run.stderr
    assert "Traceback" not in run.stderr


def test_help_and_cfg(tmp_path):
    shown = pruneflow("--help", cwd=tmp_path).stdout
    for word in ("resnet18_cifar10_short", "schedule: compounding, cubic", "pruning:"):
        assert word in shown
    config = pruneflow("--cfg", "job", "recipe=resnet18_cifar10_local", cwd=tmp_path).stdout
    assert "scope: layer" in config
    assert "max_epochs" not in config and "devices" not in config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedule.target=1.2"], "`target` must be a number in [0, 1), got 1.2"),
        (["schedule.rounds=50"], "`pruning.epochs` must be at least 50, one per round"),
        (["trainer.max_epochs=3"], "`dense.epochs` and `pruning.epochs`"),
        (["+trainer.max_epochs=3"], "`dense.epochs` and `pruning.epochs`"),
        (["loss=hinge"], "cross_entropy"),
        (["loss._target_=torch.nn.CrossEntropyLoss"], "(in `loss`; change or leave out loss._t"),
        (["callbacks=emma"], "early_stopping"),
        (["callbacks=[ema,lr_monitor]", "callbacks.ema.decai=1"], "callbacks.ema.decai"),
        (["callbacks=lr_monitor"], "`callbacks.lr_monitor` must have a logger"),
        (
            ["callbacks=ema", "callbacks.ema.decay=7"],
            "(in `callbacks.ema`; change or leave out callbacks.ema.decay=7",
        ),
        (["pruning.exclude=['fc.*']"], "`exclude` must match parameters of the model, got 'fc.*'"),
        (["importance=wanda", "pruning.include=['*.bias']"], "`evidence` must have an entry"),
        (["pruning.scope=erk", "costs=latency"], "`costs` must be None with scope 'erk'"),
        (["pruning.scope=channel"], "`scope` must be"),
        (["data=image_folder", "data.root=nowhere"], "nowhere"),
        (
            ["dense.weights=nowhere.pt"],
            "`dense.weights` must be an existing file, got 'nowhere.pt'",
        ),
        (["importance=ln_structured"], "`scope` must be 'layer' for LnStructured"),
        (["lr_scheduler.warmup_epochs=3"], "`warmup_epochs`"),
        (["classifier.label_smoothing=2"], "`label_smoothing`"),
        (["trainer.limit_val_batches=0"], "`trainer.limit_val_batches`"),
        (["resume=maybe"], "`resume` must be true or false"),
        (["deploy.batches=16"], "; set deploy.batches=[16]"),
        (["optimizer.lr=abc"], "`optimizer.lr` must be a number"),
        (
            ["optimizer.lr=-1"],
            "Invalid learning rate: -1\n(in `optimizer`; change or leave out opt",
        ),
        (
            ["trainer.accelerator=warp"],
            "(in `trainer`; change or leave out trainer.accelerator=warp",
        ),
        (["granularity=two_of_four", "granularity.n=9"], "(in `granularity`; change or leave out"),
        (["checkpoint=nowhere.pt"], "`checkpoint` must be an existing file, got 'nowhere.pt'"),
        (["trainer.devices=2"], "`trainer.devices` must be 1, got 2"),
        (["pruning.optimizer_state=forget"], "`optimizer_state` must be one of"),
        (["recipe=resnet"], "resnet18_cifar10_short"),
        (
            ["task=deploy"],
            "`checkpoint` must be a file of pruned weights for task=de",
        ),
        (
            ["task=deploy", "checkpoint=nowhere.pt"],
            "`checkpoint` must be an existing file, got 'nowhere.pt'",
        ),
        (
            ["task=deploy", "checkpoint=no.packed"],
            "`checkpoint` must be an existing file, got 'no.packed'",
        ),
        (["task=compare"], "`task` must be 'prune' or 'deploy', got 'compare'"),
        (["schedule=cubik"], "one_shot"),
        (["pruning.epoch=3"], "pruning.epoch"),
        (
            ["granularity=channels", "schedule.target=0.999"],
            "which leaves one channel in each layer",
        ),
        (
            ["granularity=channels", "costs=multiply_adds", "schedule.target=0.99999"],
            "which leaves one channel in each layer",
        ),
        (
            ["importance=ln_structured", "pruning.scope=layer", "costs=latency"],
            "be a function if `granularity` or `costs` is given",
        ),
    ],
)
def test_bad_input_is_refused_before_any_training(tmp_path, arguments, message):
    run = pruneflow(*arguments, "hydra.run.dir=run", cwd=tmp_path, check=False)
    assert run.returncode != 0
    assert message in run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    assert "Dense phase" not in run.stdout
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("costs", ["multiply_adds", "latency"])
def test_a_layer_without_costs_is_refused_before_any_training(tmp_path, costs):
    (tmp_path / "mine.py").write_text(UNUSED)
    model = ("model._target_=mine.Network", "model.width=4")
    run = pruneflow(*model, f"costs={costs}", "hydra.run.dir=run", cwd=tmp_path, check=False)
    assert "got none for unused.weight; add them, or `exclude` the tensors" in run.stderr
    assert "Dense phase" not in run.stdout
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "other.pt")
    run = pruneflow("dense.weights=other.pt", cwd=tmp_path, check=False)
    assert "`weights` must fit the network, with the tensors 0.weight" in run.stderr
    assert "(in `dense.weights`; change or leave out dense.weights=other.pt" in run.stderr


def test_a_misspelt_key_in_a_users_recipe_is_refused_with_near_names(tmp_path):
    recipes = tmp_path / "mine" / "recipe"
    recipes.mkdir(parents=True)
    text = "# @package _global_\nprunning:\n  epochs: 3\ndense:\n  epoch: 2\n"
    (recipes / "typo.yaml").write_text(text)
    run = pruneflow("--config-dir", "mine", "recipe=typo", cwd=tmp_path, check=False)
    assert run.returncode != 0
    assert "got `prunning` in 'typo'" in run.stderr
    assert "near names: pruning" in run.stderr
    assert "got `dense.epoch` in 'typo'" in run.stderr
    assert "dense.epochs" in run.stderr
    (recipes / "good.yaml").write_text(
        text.replace("prunning", "pruning").replace("epoch:", "epochs:")
    )
    pruneflow("--config-dir", "mine", "recipe=good", *QUICK[2:], cwd=tmp_path)


def test_old_names_are_accepted_with_a_note_in_a_recipe_too(tmp_path):
    recipes = tmp_path / "mine" / "recipe"
    recipes.mkdir(parents=True)
    (recipes / "old.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /granularity: weights\n"
        "  - override /callbacks: [lr_monitor]\n  - override /logger: csv\n"
        "classifier:\n  label_smoothing: 0.1\n"
        "callbacks:\n  mine:\n    _target_: lightning.Callback\n"
    )
    old = ("--config-dir", "mine", "recipe=old", "dense.epochs=0", "pruning.epochs=1")
    old = (*old, "schedule=one_shot", "deploy.batches=[]", "trainer.accelerator=cpu")
    run = pruneflow(*old, "costs=weights", "classifier.label_smoothing=0.2", cwd=tmp_path)
    for name in ("granularity=unstructured", "costs=none", "loss.label_smoothing"):
        assert f"is now called `{name}`" in run.stdout
    (folder,) = tmp_path.glob("outputs/old/*")
    config = (folder / "config.yaml").read_text()
    assert "label_smoothing: 0.2" in config and config.count("label_smoothing") == 1
    (folder / "report.html").unlink()  # as if it had been killed just before
    again = pruneflow(*old, "classifier.label_smoothing=0.2", "resume=true", cwd=tmp_path)
    assert f"Resuming the run in {folder}" in again.stdout


def test_a_killed_run_leaves_no_half_written_file_and_resumes_to_the_same_end(tmp_path, finished):
    process = subprocess.Popen(
        [*COMMAND, "hydra.run.dir=run", *QUICK],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "run" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and "rounds" in metrics.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with metrics.open() as file:
        rows = list(csv.reader(file))
    assert all(len(row) == len(rows[0]) for row in rows)
    load_file(tmp_path / "run" / "checkpoints" / "dense.safetensors")
    assert not (tmp_path / "run" / "report.json").exists()

    run = pruneflow("hydra.run.dir=run", *QUICK, "resume=true", cwd=tmp_path)
    assert "Resuming the run in" in run.stdout
    for name in ("model.safetensors", "metrics.csv", "checkpoints/dense.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (finished[0] / name).read_bytes()
