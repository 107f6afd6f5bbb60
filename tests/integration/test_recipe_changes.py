"""A change of recipe on its way: by the command on a real server, over a real broker onto a line that is at work."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import uvicorn

from control_plane.app import create_app
from control_plane.cli import main
from control_plane.registry.recipes import with_recipe
from models.bundle import LINEAGE, read_bundle, write_bundle
from models.messages import Event, Phase, decode_packed
from models.recipe import UNSURE, Recipe, Terms
from tests.control_plane.evaluation.test_operating_point import held
from tests.integration.test_whole_system import Plane, agent, end, plane
from tests.simulators.plane import make_services
from tests.simulators.processes import free_port, wait_until
from tests.simulators.tiny_bundle import tiny_bundle, tiny_files

__all__ = ["plane"]  # the fixture of the whole-system tests: enrolled, signed, both brokers


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    services = make_services(tmp_path / "plane")
    port = free_port()
    app = create_app(services)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, "the server")
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)
    services.engine.dispose()


def test_the_command_changes_the_recipe_of_a_registered_version(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTLINE_URL", url)
    lineage = {"held_out": msgspec.to_builtins(held(80))}
    write_bundle(tmp_path / "b", "apples", tiny_files() | {LINEAGE: msgspec.json.encode(lineage)})
    assert main(["models", "push", str(tmp_path / "b")]) == 0
    change = ["--variety", "golden", "--escape-cost", "3", "--abstain-budget", "0.05", "--outlet", "unsure=recheck"]
    assert main(["recipe", "set", "apples", *change, "--reason", "claims from the market"]) == 0
    shown = capsys.readouterr()
    assert "version 2 has the new recipe" in shown.err
    assert "terms (golden)" in shown.out
    assert main(["recipe", "show", "apples:2", "--variety", "golden", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["terms"]["escaped"] == 3.0
    assert found["costs"]["recipe"]["abstain"]["value"] <= 0.05
    assert main(["recipe", "tune", "apples:2", "--waste-cost", "9", "--plot", str(tmp_path / "cost.svg")]) == 0
    assert (tmp_path / "cost.svg").read_text().startswith("<svg")
    assert main(["recipe", "set", "apples:2", *change, "--reason", "again"]) == 1
    assert "recipe.unchanged" in capsys.readouterr().err


@pytest.mark.slow
def test_a_changed_recipe_is_signed_and_rolled_out_like_a_model_and_its_budget_is_watched(
    plane: Plane,
    tmp_path: Path,
) -> None:
    tiny_bundle(tmp_path / "before")
    terms = Terms(abstain_budget=0.01, abstain_above=1e-4)  # learnt on other fruit: nearly every item is unsure
    recipe = Recipe(classes=("sound", "defect"), good_class="sound", terms=terms, unsure_outlet="reject")
    changed = with_recipe(tmp_path / "before", tmp_path / "after", recipe, reason="the market moved")
    before = read_bundle(tmp_path / "before")

    def events() -> list[str]:
        records = list(plane.stored.items())
        return [decode_packed(payload, Event).code for key, payload in records if key not in plane.window_keys]

    process = agent(plane, tmp_path / "state", "--camera", "simulated")
    try:
        plane.offer(tmp_path / "before")
        plane.desire(before.digest, 1)
        wait_until(lambda: plane.phase(Phase.COMMITTED, before.digest), "the first commit")
        plane.offer(tmp_path / "after")
        plane.desire(changed.digest, 2)
        wait_until(lambda: plane.phase(Phase.COMMITTED, changed.digest), "the second commit")
        wait_until(lambda: "recipe.over_budget" in events(), "the event")
    finally:
        assert end(process) == 0
    by_bundle = {w.bundle: w for w in plane.windows() if w.items}
    assert UNSURE not in by_bundle[before.digest].grades
    after = by_bundle[changed.digest]
    assert after.grades[UNSURE] > 0.05 * after.items
    assert after.outlets["reject"] >= after.grades[UNSURE]
    assert events().count("recipe.over_budget") == 1
