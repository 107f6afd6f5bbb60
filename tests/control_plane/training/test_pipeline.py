"""Training makes a bundle from photographs; evaluation gives the figures of a bundle on a folder."""

import json
from pathlib import Path

import pytest

from control_plane.evaluation.evaluate import evaluate, judged_items
from control_plane.evaluation.operating_point import cost_report, held_out_of
from control_plane.training import cross_validation
from control_plane.training.pipeline import TrainSettings, train
from models.bundle import read_bundle
from models.classifier import OnnxClassifier
from tests.simulators.photographs import folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("data") / "photos", items=24)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("trained") / "bundle"
    stages: list[tuple[str, float]] = []
    settings = TrainSettings(name="discs", effort="quick", folds=3)
    found = train(data, settings, output, progress=lambda name, share: stages.append((name, share)))
    shares = [share for _, share in stages]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    return output, found.summary()


def test_training_makes_a_working_bundle_and_reports_its_figures(trained: tuple[Path, dict]) -> None:
    output, summary = trained
    bundle = read_bundle(output)
    bundle.golden.check(OnnxClassifier(bundle.model))
    assert summary["metrics"]["view"]["auc"]["value"] > 0.9
    assert summary["metrics"]["item"]["items"] == 24
    assert summary["parity"]["passed"]
    assert summary["parity"]["views"] == 2 * 96
    assert bundle.profile.items == 24
    assert bundle.recipe.fusion.calibration_items == 24
    assert "Brier score" in bundle.card
    assert "24 items in 2 bins" in bundle.card
    assert "- contrast in colour, 1/1: " in bundle.card
    held = held_out_of(bundle.lineage, bundle.recipe)
    assert len(held.truth) == 24
    assert bundle.lineage["fusion"]["log_loss"].keys() == {"1", "2", "3", "4"}
    assert str(output) not in json.dumps(bundle.lineage)


def test_evaluating_judges_a_folder_as_an_agent_would(trained: tuple[Path, dict], tmp_path: Path) -> None:
    other = folder(tmp_path / "other", items=10, seed=77)
    report = evaluate(trained[0], other)
    assert report["metrics"]["view"]["auc"]["value"] > 0.9
    assert report["metrics"]["item"]["rows"] == 10
    less = evaluate(trained[0], other, exclude_doubt=True)
    assert less["metrics"]["view"]["rows"] == 30
    assert json.loads(json.dumps(report)) == report


@pytest.mark.slow
def test_training_stops_on_request(data: Path, tmp_path: Path) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def progress(_stage: str, share: float) -> None:
        if share > 0.1:
            raise Stop

    with pytest.raises(Stop):
        train(data, TrainSettings(name="x", effort="quick", folds=3), tmp_path / "b", progress=progress)
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_the_number_of_processes_changes_no_byte(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_validation, "_LEAST_VIEWS", 0)
    settings = TrainSettings(name="discs", folds=2)
    digests = {train(data, settings, tmp_path / f"{n}", processes=n).bundle.digest for n in (1, 2)}
    assert len(digests) == 1


def test_costs_can_be_counted_on_a_folder_the_model_never_saw(trained: tuple[Path, dict], tmp_path: Path) -> None:
    held = judged_items(trained[0], folder(tmp_path / "other", items=10, seed=77))
    assert held.truth.count(1) == 5
    report = cost_report(held, read_bundle(trained[0]).recipe)
    assert report["items"] == 10
    assert report["recipe"]["escape_rate"]["value"] < 0.5
