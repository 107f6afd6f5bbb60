"""The order from frame to verdict: no verdict waits for a later frame, scalars reach the model, outlets must exist."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_agent.interfaces import Lane, LineGeometry
from edge_agent.line.loader import Loader, load_judge
from edge_agent.line_config import LineConfig
from edge_agent.line_protocol import Load, LoadFailed
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from edge_agent.vision.judge import Judge
from edge_agent.vision.segmentation import Detection
from edge_agent.vision.tracking import Tracker, ViewPicker
from models.bundle import RECIPE, write_bundle
from models.errors import BundleError
from models.preprocess import features_of_views, view_features
from models.recipe import Grade, Recipe
from models.view_spec import PreprocessSpec
from tests.edge_agent.line.test_process import core_of, drive
from tests.simulators.tiny_bundle import tiny_bundle, tiny_files

DENSE = SimulationConfig(apples=8, varieties=("golden",), items_per_s=10.0, seed=3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory)
    return directory


def test_no_verdict_waits_for_a_frame_after_the_last_view_also_where_items_touch(bundle: Path) -> None:
    line = SimulatedLine(DENSE, virtual=True)
    core = core_of(line, Judge(bundle))
    waited: list[float] = []
    views: list[int] = []

    def note(found: object, _outlet: str) -> None:
        waited.append(line.now() - found.track.viewed_s)  # type: ignore[attr-defined]
        views.append(len(found.track.views))  # type: ignore[attr-defined]

    core.on_verdict = note
    drive(line, core, 250)
    assert len(waited) > 120
    # Before the rule one item in a hundred waited 100 ms: it was lost at the edge together with a neighbour.
    assert sum(seconds > 0.0 for seconds in waited) <= 0.002 * len(waited)
    assert np.mean(views) == pytest.approx(6.0, abs=0.2)
    ids = core.counter.total["items"] + core.counter.total["items_unjudged"] + core.tracker.open
    assert ids == pytest.approx(core._ids, abs=4)


def place(left_px: int, right_px: int, *, touching: bool = False, whole: bool = True) -> Detection:
    return Detection(0, (left_px + right_px) / 2.0, left_px, right_px, 20, 120, whole, touching)


@pytest.mark.parametrize(
    ("seen", "others", "last"),
    [
        (place(400, 500), [], False),
        (place(500, 600), [], True),
        (place(420, 520, touching=True), [place(520, 620, touching=True)], True),
        (place(420, 520, touching=True), [place(300, 420, touching=True)], False),
        (place(420, 520), [place(560, 640, whole=False)], False),
    ],
)
def test_the_last_view_is_the_one_before_the_edge_takes_the_item_or_its_neighbour(
    seen: Detection, others: list[Detection], *, last: bool, bundle: Path
) -> None:
    core = core_of(SimulatedLine(DENSE, virtual=True), Judge(bundle))
    assert core._is_last(seen, [seen, *others], 53.0) is last
    assert core._is_last(seen, [seen, *others], 0.0) is False, "a belt that stands takes nothing"


def test_a_picker_takes_the_last_view_wherever_it_is_and_no_further_one() -> None:
    geometry = LineGeometry(640, 170, 0.625, (Lane(0, 170),))
    tracker, picker = Tracker(geometry, iter(range(9)).__next__), ViewPicker(geometry, 6)
    ((track, _),), _ = tracker.update([place(300, 400)], 0, 0.0, 0.0)
    assert picker.wants(track, place(300, 400))
    track.views.append(np.zeros((64, 64, 3), np.uint8))
    assert not picker.wants(track, place(302, 402))
    assert picker.wants(track, place(302, 402), last=True)
    assert track.complete
    assert not picker.wants(track, place(530, 630), last=True)


def test_features_of_many_views_are_those_of_each_view() -> None:
    rng = np.random.default_rng(5)
    views = rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    views[1] = 0
    views[2, :20] = views[2, 44:] = 0
    views[3, :, :30] = 0
    together = features_of_views(views)
    assert together.tobytes() == np.stack([view_features(view) for view in views]).tobytes()
    assert np.isnan(together[1]).all()
    assert not np.isnan(together[[0, 2, 3, 4]]).any()


# -- scalars ----------------------------------------------------------------------------------------------------------


class Scale:
    """Weighs every second item."""

    def value_for(self, item_mm: float) -> float | None:
        return 150.0 if int(abs(item_mm) / 100.0) % 2 else None


def test_every_declared_scalar_reaches_the_model_and_missing_ones_are_counted(bundle: Path) -> None:
    line = SimulatedLine(DENSE, virtual=True)
    judge = Judge(bundle)
    names = ("length_mm", "brix", "weight_g")
    judge.preprocess = msgspec.structs.replace(judge.preprocess, scalars=names)
    given: list[np.ndarray] = []
    classify = judge.classifier.classify

    def note(views: object, scalars: np.ndarray | None = None) -> object:
        assert scalars is not None
        given.append(scalars)
        return classify(views)  # type: ignore[arg-type]

    judge.classifier.classify = note  # type: ignore[method-assign, assignment]
    core = core_of(line, judge)
    core.weights = (Scale(), Scale())
    drive(line, core, 120)
    rows = np.concatenate(given)
    assert rows.dtype == np.float32
    assert rows.shape[1] == 3
    assert ((rows[:, 0] > 40.0) & (rows[:, 0] < 120.0)).all(), "the length comes from the picture"
    assert np.isnan(rows[:, 1]).all(), "a scalar that this line does not know is missing"
    assert 0 < np.isnan(rows[:, 2]).sum() < len(rows)
    assert set(rows[~np.isnan(rows[:, 2]), 2]) == {150.0}
    window = core.counter.close_window()
    assert window.scalars_missing["brix"] == window.items
    assert 0 < window.scalars_missing["weight_g"] < window.items
    assert "length_mm" not in window.scalars_missing
    assert core.counter.close_window().scalars_missing == {}


def test_the_weight_decides_where_the_bundle_says_so(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "b", weighs=True, bias=-2.5)
    rejected = []
    for weights in ((), (Scale(), Scale())):
        line = SimulatedLine(DENSE, virtual=True)
        core = core_of(line, Judge(tmp_path / "b"))
        core.weights = weights
        drive(line, core, 90)
        window = core.counter.close_window()
        rejected.append(window.outlets.get("reject", 0))
        assert window.scalars_missing.get("weight_g", 0) > 0
    assert rejected[1] > rejected[0]


# -- outlets ----------------------------------------------------------------------------------------------------------


def juice_bundle(directory: Path) -> str:
    """Writes a bundle whose recipe names the outlet `juice`; returns its digest."""
    grades = {"fresh": Grade(outlet="pass", classes=("sound",)), "juice": Grade(outlet="juice", classes=("defect",))}
    recipe = Recipe(classes=("sound", "defect"), good_class="sound", grades=grades)
    return write_bundle(directory, "juice", tiny_files() | {RECIPE: msgspec.json.encode(recipe)}).digest


def test_a_bundle_whose_recipe_names_an_outlet_that_the_line_lacks_is_refused(tmp_path: Path) -> None:
    juice_bundle(tmp_path / "juice")
    config = LineConfig(bundle=str(tmp_path / "juice"), threads=1)
    with pytest.raises(BundleError) as caught:
        load_judge(config, lambda _directory, _digest: 1)
    assert caught.value.code == "recipe.unknown_outlet"
    assert "juice" in str(caught.value)
    equipped = msgspec.structs.replace(config, outlets_mm={"juice": 700.0})
    assert load_judge(equipped, lambda _directory, _digest: 1) is not None


def test_the_running_bundle_stays_when_the_new_ones_outlet_is_unknown(tmp_path: Path) -> None:
    digest = juice_bundle(tmp_path / "juice")
    reports: list[object] = []
    loader = Loader(1, reports.append, lambda: None, LineConfig().outlets)
    loader.load(Load(digest=digest, directory=str(tmp_path / "juice")))
    assert not loader.judge
    (report,) = reports
    assert isinstance(report, LoadFailed)
    assert report.fault.code == "recipe.unknown_outlet"


def test_outlets_of_unsure_and_late_items_count_too() -> None:
    recipe = Recipe(classes=("sound", "rot"), good_class="sound", unsure_outlet="again", late_outlet="end")
    assert recipe.outlets == {"pass", "reject", "again", "end"}
    with pytest.raises(BundleError) as caught:
        recipe.check_outlets({"pass", "reject", "again"})
    assert caught.value.code == "recipe.unknown_outlet"


def test_a_preprocessing_without_scalars_gives_the_model_none() -> None:
    assert PreprocessSpec().scalar_row({"weight_g": 1.0}).shape == (0,)
