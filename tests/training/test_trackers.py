"""wandb, tensorboard or nothing; and wandb goes offline by itself where it cannot report."""

import json
from argparse import Namespace
from typing import ClassVar

import pytest
from wandb.errors import AuthenticationError

import train_ldm_only
from tests.support import small
from training import trackers


class FakeWandB:
    """What accelerate's tracker is asked to do."""

    made: ClassVar[list] = []

    def __init__(self, project, **options):
        self.project, self.options, self.rows, self.images, self.finished = project, options, [], [], False
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
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return FakeWandB


def open_one(tmp_path):
    return trackers.open_trackers(Namespace(report_to="wandb", logging_dir="logs", exp_name="run", seed=3), tmp_path)


def test_without_a_key_it_runs_offline_and_says_where(wandb, place, tmp_path, monkeypatch, few_steps):
    monkeypatch.setattr("wandb.login", lambda prompt: prompt)
    plain = dict(enc_type="None", proj_coeff=0, report_to="wandb", num_preview=1, sampling_steps=4)
    online = dict(eval_steps=4, eval_samples=8, eval_reference=place.data, eval_features=place.encoder)
    train_ldm_only.main(small.ldm_options(place, tmp_path, "run", **plain, **online))
    (tracker,) = wandb.made
    assert tracker.options == {"name": "run", "dir": str(tmp_path / "run" / "logs"), "mode": "offline"}
    assert tracker.config["learning_rate"] == 1e-4 and tracker.config["report_to"] == "wandb"
    *rows, evaluation = [{key: row[key] for key in row if key != "images_per_second"} for row in tracker.rows]
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


def test_tensorboard_gets_the_rows_of_the_metrics(place, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_ldm_only.main(small.ldm_options(place, tmp_path, "run", report_to="tensorboard", max_train_steps=2))
    rows = small.metrics(tmp_path, "run")
    (folder,) = {path.parent for path in (tmp_path / "run" / "logs" / "run").glob("*tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert set(rows[0]) - {"step"} <= set(events.Tags()["scalars"])
    logged = [(event.step, event.value) for event in events.Scalars("sit_loss")]
    assert logged == [(row["step"], pytest.approx(row["sit_loss"], rel=1e-6)) for row in rows]
