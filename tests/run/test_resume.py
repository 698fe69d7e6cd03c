"""A run that is killed at any moment and resumed ends as if it had never been killed.

Starting Python and importing torch take seconds, so one process imports for a whole series of runs
and forks each of them. What is killed is a real process of its own, by SIGKILL.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from pruneflow.models import small_cnn
from pruneflow.run.ends import TARGET_MISSED
from pruneflow.run.folder import load_cached

RUNNER = '''
import functools, gc, importlib, itertools, json, os, shutil, signal, sys
from pathlib import Path
import lightning, torch
import pruneflow.run.experiment
from pruneflow.run.cli import main
from pruneflow.models import small_cnn


def dropping(**settings):
    """A network whose training depends on every random number drawn."""
    return torch.nn.Sequential(torch.nn.Dropout(0.1), small_cnn(**settings))


def stand_in(where):
    """Put a function, which is given the original, in the place of another one."""
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, name)
    return lambda function: setattr(
        owner, name, functools.wraps(original)(lambda *a, **k: function(original, *a, **k))
    )


def arm(where, count, moment):
    """Kill this process before, half-way through or after the `count`-th call of a function."""
    calls = itertools.count(1)

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "anything":

        @stand_in("lightning:Trainer.fit")
        def fit(original, *args, **kwargs):
            # Whenever something is called or returns.
            sys.setprofile(lambda *event: next(calls) == count and kill())
            original(*args, **kwargs)
            sys.setprofile(None)

        return

    @stand_in(where)
    def call(original, *args, **kwargs):
        if next(calls) != count:
            return original(*args, **kwargs)
        if moment != "before":
            original(*args, **kwargs)
        if moment == "half":  # of the file it writes
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        kill()


@stand_in("matplotlib.figure:Figure.savefig")
def savefig(original, figure, path):
    path.write_bytes(b"drawn")  # drawing would be most of a run's time


@stand_in("pruneflow.run.experiment:write_report")
def write_report(original, folder, *args):
    shutil.copy(folder / "checkpoints" / "rounds.ckpt", folder / "last.ckpt")  # soon deleted
    original(folder, *args)


def damage(name):
    """Before some starts: config.yaml of three runs, and the dense cache, each in another way."""
    if name == "beside them":
        runs = Path("outputs/digits")
        texts = {"cut": "data: {root: ", "list": "[1, 2]", "none": None, "text": "a: ${nowhere}"}
        for folder, text in texts.items():
            (runs / folder / "checkpoints").mkdir(parents=True)
            if text is not None:
                (runs / folder / "config.yaml").write_text(text)
        (runs / "latin").joinpath("checkpoints").mkdir(parents=True)
        (runs / "latin" / "config.yaml").write_bytes(b"a: \\xe9\\n")
    if name == "dense, damaged":
        (cache,) = Path("outputs/.dense").glob("*.safetensors")
        contents = bytearray(cache.read_bytes())
        contents[-5] ^= 1
        cache.write_bytes(contents)


gc.freeze()  # what is imported is not collected anew in each process
statuses = []
for number, (name, (folder, arguments, point)) in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        output = os.open(f"{number}.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.makedirs(folder, exist_ok=True)
        os.chdir(folder)
        damage(name)
        sys.argv[1:] = arguments
        if point:
            arm(*point)
        main()
        sys.exit()
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
'''

TINY = (
    "dense.epochs=4",
    "pruning.epochs=16",
    "schedule.rounds=4",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "model._target_=__main__.dropping",
    "model.width=8",
    "data.batch_size=16",
    "data.crop_padding=1",
    "deploy.batches=[]",
    "lr_scheduler=one_cycle",
)
OTHER = (
    *TINY,
    "masking=reparametrize",
    "importance=taylor",
    "optimizer=adamw",
    "lr_scheduler=cosine",
    "lr_scheduler.warmup_epochs=1",
    "pruning.rewind=learning_rate",
    "pruning.epochs=8",
    "dense.cache=null",
)
# Early stopping ends the rounds two epochs after their first, once trainer.min_epochs lets it.
AVERAGED = (
    *TINY,
    "callbacks=[ema,early_stopping]",
    "callbacks.ema.decay=0.8",
    "callbacks.early_stopping.patience=1",
    "callbacks.early_stopping.min_delta=100",
    "trainer.min_epochs=7",
    "pruning.epochs=8",
    "dense.cache=null",
)
SHORT = (*TINY, "dense.epochs=0", "pruning.epochs=2", "schedule.rounds=2")

SEED = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
MOMENTS = random.Random(SEED)


def training_step(count):
    return ["pruneflow.models:Classifier.training_step", count, "before"]


def anything():
    return ["anything", MOMENTS.randint(1, 100_000), ""]  # in an epoch or so


KILLS = {
    "in the dense phase": training_step(4),
    "any moment 1": anything(),
    "within a checkpoint's writing": ["torch:save", 1, "half"],
    "within a prune": ["pruneflow.pruning.pruner:Pruner.prune_to", 1, "after"],
    "any moment 2": anything(),
    "between two rounds": ["pruneflow.pruning.pruner:Pruner.prune_to", 2, "before"],
    "any moment 3": anything(),
    "after the row, before the checkpoint": ["lightning:Trainer.save_checkpoint", 1, "before"],
    "any moment 4": anything(),
    "within an epoch": training_step(4),
    "any moment 5": anything(),
    "within the deliverables": ["matplotlib.figure:Figure.savefig", 2, "before"],
}
OTHER_KILLS = {
    "other, within a prune": ["pruneflow.pruning.pruner:Pruner.prune_to", 2, "after"],
    "other, within an epoch": training_step(4),
    "other, within a checkpoint's writing": ["torch:save", 2, "half"],
}
SAVE = "lightning:Trainer.save_checkpoint"
AVERAGED_KILLS = {
    "averaged, in the dense phase": training_step(3),  # of two an epoch
    "averaged, before the dense phase's last checkpoint": [SAVE, 3, "before"],
    "averaged, between the phases": ["pruneflow.pruning.pruner:Pruner.prune_to", 1, "before"],
    "averaged, in the rounds": training_step(5),
    "averaged, before the rounds' last checkpoint": [SAVE, 1, "before"],
    "averaged, after the rounds": [
        "pruneflow.run.experiment:Experiment._evaluate",
        1,
        "before",
    ],
}
SWEEP = ("-m", *SHORT, "hydra.sweep.dir=sweep", "schedule.target=0.5,0.6")

# Each start: its working directory, its arguments, and where to kill it.
first, *others = KILLS
STARTS = {
    "whole": ("whole", (*TINY, "hydra.run.dir=run"), None),
    "finished": ("whole", (*TINY, "hydra.run.dir=run", "resume=true"), None),
    "other configuration": (
        "whole",
        (*TINY, "hydra.run.dir=run", "resume=true", "schedule.target=0.5", "~trainer.precision"),
        None,
    ),
    "in use": ("whole", (*TINY, "hydra.run.dir=used", "resume=true"), None),
    "older": (
        "killed",
        (*TINY, "hydra.run.dir=outputs/digits/older"),
        training_step(1),
    ),
    first: ("killed", TINY, KILLS[first]),
    "newer, truncated": (
        "killed",
        (*TINY, "hydra.run.dir=outputs/digits/newer", "seed=1"),
        ["lightning:Trainer.save_checkpoint", 1, "half"],
    ),
    # Without `hydra.run.dir`: each has to find what the one before it left.
    **{name: ("killed", (*TINY, "resume=true"), KILLS[name]) for name in others},
    "last": ("killed", (*TINY, "resume=true"), training_step(1)),  # all are done
    "truncated": ("killed", (*TINY, "resume=true", "seed=1"), None),
    "other, whole": ("whole", (*OTHER, "hydra.run.dir=other"), None),
    **{
        name: ("killed", (*OTHER, "hydra.run.dir=other", "resume=true"), point)
        for name, point in OTHER_KILLS.items()
    },
    "other, last": (
        "killed",
        (*OTHER, "hydra.run.dir=other", "resume=true"),
        training_step(2 * 4 + 1),  # those of four epochs are left
    ),
    "averaged, whole": ("whole", (*AVERAGED, "hydra.run.dir=averaged"), None),
    **{
        name: ("killed", (*AVERAGED, "hydra.run.dir=averaged", "resume=true"), point)
        for name, point in AVERAGED_KILLS.items()
    },
    "averaged, last": (
        "killed",
        (*AVERAGED, "hydra.run.dir=averaged", "resume=true"),
        training_step(1),  # all are done
    ),
    "sweep": ("sweep", SWEEP, training_step(6)),
    "sweep again": ("sweep", (*SWEEP, "resume=true"), None),
    "sweep without its folder": ("sweep", ("-m", *SHORT, "resume=true"), None),
    "other keys that do not matter": (
        "killed",
        (*SHORT, "hydra.run.dir=outputs/others/run", "dense.epochs=1"),
        training_step(1),
    ),
    "with other keys": (
        "killed",
        (
            *(*SHORT, "resume=true", "hydra.run.dir=outputs/others/run", "dense.epochs=1"),
            *("deploy.batches=[1]", "deploy.threads=1", "logger=csv", "data.num_workers=1"),
            "trainer.enable_progress_bar=true",
        ),
        training_step(1),
    ),
    "near": ("near", (*SHORT, "seed=3", "hydra.run.dir=outputs/digits/near"), training_step(1)),
    "far": (
        "near",
        (*SHORT, "seed=4", "data.batch_size=4", "hydra.run.dir=outputs/digits/far"),
        training_step(1),
    ),
    "beside them": ("near", (*SHORT, "resume=true"), None),
    "damaged": ("near", (*SHORT, "resume=true", "hydra.run.dir=outputs/digits/cut"), None),
    "dense": ("near", (*SHORT, "dense.epochs=1", "hydra.run.dir=dense"), None),
    "dense, damaged": ("near", (*SHORT, "dense.epochs=1", "hydra.run.dir=dense"), None),
    "to be replaced": (
        "replaced",
        (*SHORT, "hydra.run.dir=run", "seed=1"),
        training_step(3),
    ),
    "in its place": (
        "replaced",
        (*SHORT, "hydra.run.dir=run"),
        training_step(1),
    ),
}


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Exit status and output of each start, and the folder of them all."""
    base = tmp_path_factory.mktemp("resume")
    (base / "runner.py").write_text(RUNNER)
    shm = Path("/dev/shm")  # most often another file system than that of the runs
    with (
        tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as elsewhere,
        FileLock(base / "whole" / "used" / ".lock"),
    ):
        runner = subprocess.run(
            [sys.executable, "runner.py", json.dumps(list(STARTS.items()))],
            cwd=base,
            env={**os.environ, "TMPDIR": elsewhere},
            check=False,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert not [*Path(elsewhere).iterdir()]
    outputs = [(base / f"{number}.txt").read_text() for number in range(len(STARTS))]
    ends = zip(json.loads(runner.stdout), outputs, strict=True)
    return base, dict(zip(STARTS, ends, strict=True))


def equal(ours, theirs):
    """Whether two checkpoints hold the same, but for wall times."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(
            key == "seconds" or equal(ours[key], theirs[key]) for key in ours
        )
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return ours == theirs


def assert_ends_alike(killed, whole):
    for name in ("model.safetensors", "metrics.csv", "plan.txt", "checkpoints/dense.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (killed, whole))
    for report in (ours, theirs):
        assert all(seconds > 0 for seconds in report.pop("seconds").values())
        del report["command"], report["commit"]  # a developer may commit while this runs
    assert ours == theirs
    # Masks, optimizer, learning-rate schedule, rounds: all that was known at the last epoch's end.
    ours, theirs = (torch.load(folder / "last.ckpt") for folder in (killed, whole))
    assert ours["optimizer_states"][0]["state"]
    assert any("masks" in state for state in ours["callbacks"].values())
    assert equal(ours, theirs)
    files, others = ({file.name for file in folder.rglob("*")} for folder in (killed, whole))
    assert files == others
    assert not [name for name in files if "partial" in name]


def test_a_run_killed_at_any_moment_ends_as_if_it_had_never_been_killed(starts):
    base, ends = starts
    print(f"KILL_SEED={SEED}: {KILLS}")
    assert {name: ends[name][0] for name in KILLS} == dict.fromkeys(KILLS, -signal.SIGKILL)
    assert ends["last"][0] == 0, ends["last"][1]
    (report,) = (base / "killed").glob("outputs/digits/*/report.html")
    assert_ends_alike(report.parent, base / "whole" / "run")


def test_other_ways_of_masking_and_training_too(starts):
    base, ends = starts
    assert {ends[name][0] for name in OTHER_KILLS} == {-signal.SIGKILL}
    assert ends["other, last"][0] == 0, ends["other, last"][1]
    assert_ends_alike(base / "killed" / "other", base / "whole" / "other")


def test_callbacks_that_have_a_state_and_end_a_phase_early_too(starts):
    base, ends = starts
    assert {ends[name][0] for name in AVERAGED_KILLS} == {-signal.SIGKILL}
    for name in ("averaged, whole", "averaged, last"):
        assert ends[name][0] == TARGET_MISSED, ends[name][1]
    assert "Stopped early: the rounds (8 epochs) ended after epoch 6" in ends["averaged, whole"][1]
    assert "ended in round 2 of 4" in ends["averaged, whole"][1]
    assert_ends_alike(base / "killed" / "averaged", base / "whole" / "averaged")
    last = torch.load(base / "killed" / "averaged" / "last.ckpt")
    result = load_file(base / "killed" / "averaged" / "model.safetensors")
    for name, value in last["state_dict"].items():  # the average
        assert torch.equal(value, result[name.removeprefix("network.")])


def test_finds_the_newest_unfinished_run_of_the_same_configuration(starts):
    base, ends = starts
    for name in (*others, "last"):
        assert "Resuming the run in" in ends[name][1]
    folders = {folder.name: folder for folder in (base / "killed/outputs/digits").iterdir()}
    assert not (folders.pop("older") / "metrics.csv").read_text().count("dense")
    assert not (folders.pop("newer") / "report.json").exists()
    (found,) = folders.values()
    assert (found / "pruneflow.log").read_text().count("Resuming the run in") == len(KILLS)


def test_an_empty_folder_starts_a_new_run_and_says_so(starts):
    assert (
        "No unfinished run to resume; starting a new one in"
        in starts[1]["other, within a prune"][1]
    )


def test_a_run_that_is_not_to_be_resumed_replaces_what_is_there(starts):
    base, ends = starts
    assert {ends[name][0] for name in ("to be replaced", "in its place")} == {-signal.SIGKILL}
    assert not [*(base / "replaced" / "run").rglob("*.ckpt")]


def test_a_finished_run_says_so(starts):
    status, output = starts[1]["finished"]
    assert status == 0
    assert "Already finished" in output
    assert "Target reached." in output
    assert "Dense phase" not in output


def test_a_run_of_another_configuration_is_refused_with_what_differs(starts):
    status, output = starts[1]["other configuration"]
    assert status == 1
    assert "`schedule.target` was 0.98 and is 0.5; `trainer.precision` was" in output
    assert "Traceback" not in output


def test_what_does_not_change_the_result_may_differ(starts):
    assert "Resuming the run in" in starts[1]["with other keys"][1]


def test_a_run_that_is_nearly_the_same_is_named_with_what_differs(starts):
    status, output = starts[1]["beside them"]
    assert status == 0, output
    said = " ".join(output.split())
    assert (
        "no unfinished run of this configuration; the most similar one, outputs/digits/near"
        in said.replace(str(starts[0] / "near") + "/", "")
    )
    assert (
        "differs: `seed` was 3 and is 0; `data.seed` was 3 and is 0; use the same settings" in said
    )
    assert "far" not in said


@pytest.mark.parametrize("damaged", ["cut", "list", "none", "text", "latin"])
def test_damaged_folders_are_named_and_passed_over(starts, damaged):
    output = starts[1]["beside them"][1]
    assert re.search(rf"skips \S*/{damaged}: \S*config.yaml is missing or damaged \(", output)


def test_a_damaged_folder_that_is_asked_for_is_refused_with_the_remedy(starts):
    status, output = starts[1]["damaged"]
    assert status == 1
    assert re.search(r"got an error: \S*cut/config.yaml is missing or damaged \(.*; delete", output)
    assert "Traceback" not in output


def test_a_damaged_dense_cache_is_named_and_made_anew(starts):
    base, ends = starts
    assert ends["dense"][0] == ends["dense, damaged"][0] == 0
    assert (
        "is damaged (its contents do not match their digest); training it again"
        in ends["dense, damaged"][1]
    )
    assert "from the cache" not in ends["dense, damaged"][1]
    (cache,) = (base / "near" / "outputs" / ".dense").glob("*.safetensors")
    network = torch.nn.Sequential(torch.nn.Dropout(), small_cnn(10, 1, width=8))
    history = load_cached(network, cache)
    assert [row["stage"] for row in history] == ["dense"]


def test_a_truncated_checkpoint_is_refused(starts):
    status, output = starts[1]["truncated"]
    assert status == 1
    assert "dense.ckpt', which is truncated or damaged" in output
    assert "delete it" in output
    assert "Traceback" not in output


def test_a_folder_that_another_run_is_writing_to_is_refused(starts):
    status, output = starts[1]["in use"]
    assert status == 1
    assert "`hydra.run.dir` must be used by one run at a time, got" in output


def test_the_jobs_of_a_sweep_resume_in_their_folders(starts):
    base, ends = starts
    assert ends["sweep"][0] == -signal.SIGKILL
    status, output = ends["sweep again"]
    assert status == 0, output
    assert output.count("Already finished") == output.count("Resuming the run in") == 1
    targets = [
        json.loads((base / "sweep" / "sweep" / job / "report.json").read_text())["target"]
        for job in ("0", "1")
    ]
    assert targets == [0.5, 0.6]


def test_a_sweep_is_resumed_only_in_a_given_folder(starts):
    status, output = starts[1]["sweep without its folder"]
    assert status == 1
    assert "`hydra.sweep.dir` must be set to resume a sweep" in output
