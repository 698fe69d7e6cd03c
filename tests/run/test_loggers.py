"""A job has one run of its logger, whatever the number of Trainers and jobs before it."""

import csv
import json

import forked
import pytest
from lightning.pytorch.loggers import Logger

from pruneflow.run.loggers import one_run

RECORDING = '''
import json
from lightning.pytorch.loggers import Logger


class Run:
    """Of a client that has one for the whole process."""

    current = None

    def finish(self, exit_code=0):
        Run.current = None
        record("finish", exit_code)


def record(*event):
    with open("events.jsonl", "a") as file:
        file.write(json.dumps(event) + "\\n")


class Recording(Logger):
    name, version = "recording", 0

    def __init__(self):
        record("made")

    @property
    def experiment(self):
        if Run.current is None:
            Run.current = Run()
            record("run")
        return Run.current

    def log_hyperparams(self, params):
        self.experiment
        record("settings", params)

    def log_metrics(self, metrics, step):
        self.experiment
        record("metrics", step, metrics)

    def finalize(self, status):
        record(status)
'''

TINY = (
    "recipe=digits",
    "dense.epochs=2",
    "pruning.epochs=2",
    "schedule.rounds=2",
    "trainer.limit_train_batches=4",
    "trainer.accumulate_grad_batches=2",
    "trainer.accelerator=cpu",
    "deploy.batches=[]",
)


def run(*arguments, cwd):
    ended = forked.run(*arguments, *TINY, cwd=cwd)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """What the logger of each of two jobs of a sweep was asked to do."""
    cwd = tmp_path_factory.mktemp("loggers")
    (cwd / "recording.py").write_text(RECORDING)
    run("-m", "schedule.target=0.5,0.6", "+logger._target_=recording.Recording", cwd=cwd)
    events = [json.loads(line) for line in (cwd / "events.jsonl").read_text().splitlines()]
    second = [name for name, *_ in events].index("made", 1)
    return events[:second], events[second:]


def test_each_job_is_one_run_that_is_closed_once(jobs):
    for events in jobs:
        names = [name for name, *_ in events]
        assert names[:3] == ["made", "run", "settings"]
        assert set(names[3:-2]) == {"metrics"}
        assert names[-2:] == ["success", "finish"]


def test_the_configuration_is_logged_with_each(jobs):
    settings = [events[2][1] for events in jobs]
    assert [each["schedule"]["target"] for each in settings] == [0.5, 0.6]
    assert settings[0]["optimizer"]["lr"] > 0


def metrics(events):
    return [(event[1], event[2]) for event in events if event[0] == "metrics"]


def test_steps_go_on_over_the_stages_also_where_the_dense_phase_is_cached(jobs):
    for events, expected in zip(jobs, ({0: 1, 1: 3, 2: 5, 3: 7}, {2: 5, 3: 7}), strict=True):
        steps = [step for step, _ in metrics(events)]
        assert steps == sorted(steps)
        trained = {v["epoch"]: step for step, v in metrics(events) if "train_loss" in v}
        assert trained == expected


def test_the_tests_are_logged_last(jobs):
    for events in jobs:
        step, last = metrics(events)[-1]
        assert step == 8
        assert last.keys() >= {"test_accuracy", "dense_test_accuracy"}


def test_all_that_csv_logs_is_in_one_version(tmp_path):
    run("logger=csv", "hydra.run.dir=run", cwd=tmp_path)
    (version,) = (tmp_path / "run" / "csv").iterdir()
    with (version / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["epoch"] for row in rows} >= {"0", "1", "2", "3"}
    assert rows[-1]["test_accuracy"]
    assert "rounds: 2" in (version / "hparams.yaml").read_text()


class Tiny(Logger):
    name, version = "tiny", 0

    def __init__(self):
        self.statuses = []

    def log_hyperparams(self, params):
        self.params = params

    def log_metrics(self, metrics, step):
        pass

    def finalize(self, status):
        self.statuses.append(status)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_closes_it_and_passes(error):
    logger = Tiny()

    def job():
        with one_run(logger, {"seed": 0}):
            logger.finalize("success")  # as a Trainer does after each fit
            raise error

    with pytest.raises(error):
        job()
    assert logger.statuses == ["failed"]
    assert logger.params == {"seed": 0}
