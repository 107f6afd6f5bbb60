"""The options of a job are checked in one place, before anything long begins."""

from pathlib import Path
from typing import Any

import pytest

from control_plane.jobs.requests import ImportRequest, TrainRequest, check_import, check_training
from models.errors import InputError


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("name", "../x"),
        ("name", ""),
        ("name", "x" * 65),
        ("name", "a b"),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", 10**25),
        ("seed", 1.5),
        ("seed", True),
        ("effort", "fast"),
        ("precision", "int4"),
        ("scalars", ["weight g"]),
        ("scalars", ["weight_g", "weight_g"]),
        ("scalars", [f"s{k}" for k in range(17)]),
        ("folds", 1),
        ("folds", 51),
        ("abstain_budget", 1.1),
        ("abstain_budget", float("nan")),
        ("good_class", "a\x00b"),
    ],
)
def test_an_option_of_a_training_run_outside_its_bounds_is_named(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"`{option}`") as caught:
        check_training({"name": "apples"} | {option: value})
    assert caught.value.code == "training.bad_option"
    assert caught.value.expected


def test_an_unknown_option_is_refused_and_defaults_are_filled_in() -> None:
    with pytest.raises(InputError, match="effrot"):
        check_training({"name": "apples", "effrot": "quick"})
    assert check_training({"name": "apples"})["folds"] == 5


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("classes", ["one"]),
        ("mean", [0.1]),
        ("std", [0.0, 1.0, 1.0]),
        ("scale", float("nan")),
        ("scale", 0.0),
        ("layout", "sideways"),
        ("view_px", 8),
        ("view_px", 10**25),
        ("data", "a\x00b"),
        ("logits", "yes"),
    ],
)
def test_an_option_of_an_import_outside_its_bounds_is_named(tmp_path: Path, option: str, value: Any) -> None:
    (tmp_path / "m.onnx").write_bytes(b"x")
    good = {"name": "apples", "classes": ["a", "b"], "data": str(tmp_path)}
    check_import(tmp_path / "m.onnx", good)
    with pytest.raises(InputError, match=f"`{option}`") as caught:
        check_import(tmp_path / "m.onnx", good | {option: value})
    assert caught.value.code == "import.bad_settings"


@pytest.mark.parametrize("path", ["/none.onnx", "a\x00b", "/"])
def test_a_model_that_is_not_there_is_refused_before_it_is_queued(path: str) -> None:
    with pytest.raises(InputError) as caught:
        check_import(path, {"name": "x", "classes": ["a", "b"], "data": "/"})
    assert caught.value.code == "import.unreadable"


def test_the_check_covers_every_option_of_training_and_import() -> None:
    from control_plane.training.foreign.onnx_import import ImportSettings
    from control_plane.training.pipeline import TrainSettings

    assert set(TrainRequest.__struct_fields__) == set(TrainSettings.__struct_fields__)
    assert set(ImportRequest.__struct_fields__) == set(ImportSettings.__struct_fields__)
