"""wandb, tensorboard or nothing; and wandb goes offline by itself where it cannot report."""

import json
from argparse import Namespace
from typing import ClassVar

import pytest
from wandb.errors import AuthenticationError

import train_ldm_only
from tests.support import small
from training import trackers
from training.window import SPEEDS


class FakeWandB:
    """What accelerate's tracker is asked to do."""

    made: ClassVar[list] = []

    starting_step: ClassVar[int] = 0  # of the run, as wandb's server knows it

    def __init__(self, project, **options):
        self.project, self.options, self.rows, self.images, self.finished = project, options, [], [], False
        self.tracker = Namespace(starting_step=self.starting_step)
        self.made.append(self)

    def start(self):
        pass

    def store_init_configuration(self, config):
        self.config = config

    def log(self, row, step):
        self.rows.append({"step": step, **row})

    def log_images(self, images, step):
        self.images.append((step, {name: pictures.shape for name, pictures in images.items()}))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """wandb with a tracker that only remembers, a reachable server of its own, and a valid key."""
    monkeypatch.setattr("accelerate.tracking.WandBTracker", FakeWandB)
    monkeypatch.setattr(FakeWandB, "made", [])
    monkeypatch.setattr("wandb.setup", lambda: Namespace(settings=Namespace(base_url="https://wandb.here.org:8080")))
    monkeypatch.setattr("wandb.login", lambda prompt: True)
    monkeypatch.setattr(trackers, "reachable", lambda url: url == "https://wandb.here.org:8080")
    for name in ("MODE", "PROJECT", "ENTITY", "RUN_ID"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    return FakeWandB


def open_one(folder, **options):
    args = Namespace(report_to="wandb", logging_dir="logs", exp_name="run", seed=3)
    return trackers.open_trackers(args, folder, **options)


def plain(place, output, name="run", **options):
    """A run of train_ldm_only.py that reports to wandb, and the tracker that it made."""
    usual = dict(enc_type="None", proj_coeff=0, report_to="wandb")
    train_ldm_only.main(small.ldm_options(place, output, name, **usual | options))
    return FakeWandB.made[-1]


def test_without_a_key_it_runs_offline_and_says_where(wandb, place, tmp_path, monkeypatch, few_steps):
    monkeypatch.setattr("wandb.login", lambda prompt: prompt)
    online = dict(eval_steps=4, eval_samples=8, eval_reference=place.data, eval_features=place.encoder)
    tracker = plain(place, tmp_path, num_preview=1, sampling_steps=4, **online)
    assert wandb.made == [tracker]
    where = {"name": "run", "dir": str(tmp_path / "run" / "logs"), "mode": "offline"}
    assert where.items() <= tracker.options.items()
    assert tracker.config["learning_rate"] == 1e-4 and tracker.config["report_to"] == "wandb"
    *rows, evaluation = [{key: row[key] for key in row if key not in SPEEDS} for row in tracker.rows]
    assert rows == small.metrics(tmp_path, "run")
    assert evaluation == json.loads((tmp_path / "run" / "evaluations.jsonl").read_text())
    assert tracker.images == [(4, {"samples": (1, small.RESOLUTION, 8 * small.RESOLUTION, 3)})]
    assert tracker.finished
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "there is no key" in log and "offline" in log and str(tmp_path / "run" / "logs") in log


def test_it_reports_online_where_it_can(wandb, tmp_path, caplog):
    (tracker,) = open_one(tmp_path)
    assert tracker.options["mode"] is None and not caplog.text


def test_without_a_connection_it_runs_offline(wandb, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "reachable", lambda url: False)
    monkeypatch.setattr("wandb.login", lambda prompt: pytest.fail("it would wait for the server"))
    (tracker,) = open_one(tmp_path)
    assert tracker.options["mode"] == "offline" and "wandb.here.org was not reached within 10 s" in caplog.text


def test_with_a_key_that_is_refused_it_runs_offline(wandb, tmp_path, monkeypatch, caplog):
    def refuse(prompt):
        raise AuthenticationError("the key has\n39 letters")

    monkeypatch.setattr("wandb.login", refuse)
    (tracker,) = open_one(tmp_path)
    assert tracker.options["mode"] == "offline" and "the key has 39 letters; it runs offline" in caplog.text


def test_a_mode_that_the_user_chose_stays(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(trackers, "reachable", lambda url: False)
    (tracker,) = open_one(tmp_path)
    assert tracker.options["mode"] is None


def test_project_and_entity_are_those_of_the_environment(wandb, tmp_path, monkeypatch):
    (tracker,) = open_one(tmp_path)
    assert (tracker.project, tracker.options["entity"]) == ("REPA-E", None)
    monkeypatch.setenv("WANDB_PROJECT", "digits")
    monkeypatch.setenv("WANDB_ENTITY", "our-lab")
    (tracker,) = open_one(tmp_path)
    assert (tracker.project, tracker.options["entity"]) == ("digits", "our-lab")


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(wandb, place, tmp_path):
    first = plain(place, tmp_path, max_train_steps=2)
    resumed = plain(place, tmp_path, resume="latest")
    elsewhere = dict(resume_step=2, continue_train_exp_dir=tmp_path / "run")
    others = [plain(place, tmp_path, "other", **elsewhere), plain(place, tmp_path, overwrite=True, max_train_steps=1)]
    assert resumed.options["resume"] == "allow" and resumed.options["id"] == first.options["id"]
    assert [row["step"] for row in resumed.rows] == [3, 4]
    assert len({tracker.options["id"] for tracker in (first, *others)}) == 3
    assert (tmp_path / "run" / "wandb-run.txt").read_text() == others[1].options["id"] + "\n"


def test_an_id_that_the_user_chose_is_kept(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    (tracker,) = open_one(tmp_path)
    monkeypatch.delenv("WANDB_RUN_ID")
    (again,) = open_one(tmp_path)
    assert tracker.options["id"] == again.options["id"] == "mine"


def test_rows_that_wandb_has_are_not_sent_again(wandb, tmp_path, monkeypatch, caplog):
    """A job went on to step 5 after its checkpoint of step 2: wandb refuses rows of steps that it has."""
    monkeypatch.setattr(wandb, "starting_step", 6)
    (tracker,) = open_one(tmp_path, start_step=2)
    for step in range(3, 8):
        tracker.log({"loss": 0.5}, step=step)
        tracker.log_images({}, step=step)
    tracker.finish()
    (behind,) = wandb.made
    assert [row["step"] for row in behind.rows] == [step for step, _ in behind.images] == [6, 7] and behind.finished
    assert "wandb has rows of this run up to step 5, and keeps them: those after step 2" in caplog.text
    caplog.clear()
    (tracker,) = open_one(tmp_path, start_step=5)
    assert isinstance(tracker, FakeWandB) and not caplog.text


def test_tensorboard_gets_the_rows_of_the_metrics_and_the_pictures(place, tmp_path, few_steps):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_ldm_only.main(
        small.ldm_options(place, tmp_path, "run", report_to="tensorboard", max_train_steps=2, num_preview=1)
    )
    rows = small.metrics(tmp_path, "run")
    (folder,) = {path.parent for path in (tmp_path / "run" / "logs" / "run").glob("*tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert set(rows[0]) - {"step"} <= set(events.Tags()["scalars"])
    (picture,) = events.Images("samples")
    assert (picture.step, picture.height, picture.width) == (2, small.RESOLUTION, 8 * small.RESOLUTION)
    logged = [(event.step, event.value) for event in events.Scalars("sit_loss")]
    assert logged == [(row["step"], pytest.approx(row["sit_loss"], rel=1e-6)) for row in rows]
