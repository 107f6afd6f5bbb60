"""A challenger judges the champion's views, moves nothing, and never delays the line."""

import json
from pathlib import Path

import numpy as np
import pytest

from edge_agent.line.shadow import Shadow
from edge_agent.line_config import LineConfig
from edge_agent.offline.run import run_standalone
from edge_agent.sampling.disagreement import Disagreement, SampleFolder
from edge_agent.vision.judge import Judge
from models.errors import BundleError
from tests.simulators.tiny_bundle import tiny_bundle


@pytest.fixture
def bundles(tmp_path: Path) -> tuple[Path, Path]:
    tiny_bundle(tmp_path / "champion", bias=-2.5)
    tiny_bundle(tmp_path / "challenger", bias=-1.5)
    return tmp_path / "champion", tmp_path / "challenger"


def line(tmp_path: Path, **changes: object) -> LineConfig:
    return LineConfig(paced=False, lanes=2, seed=3, samples=str(tmp_path / "samples"), **changes)  # type: ignore[arg-type]


def verdicts(config: LineConfig, bundle: Path, path: Path) -> tuple[dict, list[dict]]:
    with path.open("w+") as stream:
        facts = run_standalone(config, bundle=bundle, seconds=8.0, verdicts=stream)
        stream.seek(0)
        return facts, [json.loads(row) for row in stream]


@pytest.mark.slow
def test_a_challenger_changes_no_verdict_and_every_item_is_compared_or_skipped(
    tmp_path: Path, bundles: tuple[Path, Path]
) -> None:
    champion, challenger = bundles
    alone, rows = verdicts(line(tmp_path), champion, tmp_path / "a")
    both, shadowed = verdicts(line(tmp_path, shadow=str(challenger)), champion, tmp_path / "b")
    assert shadowed == rows
    assert alone["shadow"] == {}
    assert sum(both["shadow"].values()) == both["items"]
    assert both["shadow"]["pass>reject"] > 0
    samples = sorted((tmp_path / "samples").glob("*.npz"))
    assert 0 < len(samples) <= both["shadow"]["pass>reject"]
    with np.load(samples[0]) as sample:
        assert sample["views"].dtype == np.uint8
        assert sample["champion"][0] > sample["challenger"][0]


@pytest.mark.slow
def test_the_same_bundle_never_disagrees_with_itself(tmp_path: Path, bundles: tuple[Path, Path]) -> None:
    champion, _ = bundles
    facts, _ = verdicts(line(tmp_path, shadow=str(champion)), champion, tmp_path / "a")
    assert not {"pass>reject", "reject>pass", "failed"} & set(facts["shadow"])
    assert not (tmp_path / "samples").exists()


def test_a_challenger_that_is_behind_is_skipped_not_waited_for(bundles: tuple[Path, Path]) -> None:
    shadow = Shadow(Judge(bundles[1]), waiting=4)  # its thread is not started, so the queue only fills
    for _ in range(10):
        shadow.offer(object(), "pass", "", "")  # type: ignore[arg-type]
    assert shadow.counts == {"skipped": 6}


def test_a_challenger_with_other_views_is_refused_by_name(tmp_path: Path, bundles: tuple[Path, Path]) -> None:
    tiny_bundle(tmp_path / "other", view_px=32)
    with pytest.raises(BundleError) as caught:
        run_standalone(line(tmp_path, shadow=str(tmp_path / "other")), bundle=bundles[0], seconds=1.0)
    assert caught.value.code == "shadow.other_views"


@pytest.mark.slow
def test_only_the_newest_samples_are_kept(tmp_path: Path, bundles: tuple[Path, Path]) -> None:
    champion, challenger = bundles
    config = line(tmp_path, shadow=str(challenger))
    run_standalone(config, bundle=champion, seconds=4.0)
    folder = SampleFolder(tmp_path / "samples", limit=3)
    with np.load(min((tmp_path / "samples").glob("*.npz"))) as sample:
        views = sample["views"]
    judge = Judge(challenger)
    verdict = judge.recipe.decide(judge.classifier.classify(views).probabilities)
    before = {path.name for path in (tmp_path / "samples").glob("*.npz")}
    for item in range(5):
        folder(Disagreement(item, views, verdict, verdict))
    names = sorted(path.name for path in (tmp_path / "samples").glob("*.npz"))
    assert len(names) == 3
    assert not before & set(names)
