"""A change of recipe is a version like any model: through the API, the command and the page; refused by name."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest
from fastapi.testclient import TestClient
from sqlmodel import select

from control_plane.cli import main
from control_plane.database.audit import broken_audit_entry
from control_plane.database.engine import reading
from control_plane.database.tables.audit import Audit
from control_plane.pages.cost_chart import cost_chart
from control_plane.registry.recipes import changed, described, parse_change, with_recipe
from control_plane.services import Services
from models.bundle import LINEAGE, PARTS, RECIPE, pack, read_bundle, write_bundle
from models.classifier import OnnxClassifier
from models.errors import InputError
from models.messages import Presence, encode
from models.recipe import Recipe
from models.topics import Channel, agent_topic
from tests.control_plane.evaluation.test_operating_point import held
from tests.control_plane.fleet.test_fleet import BOOT, A, batch, reported, window
from tests.simulators.plane import make_client, make_services, release
from tests.simulators.tiny_bundle import tiny_bundle, tiny_files

RECIPE_URL = "/api/v1/versions/apples:1/recipe"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = tiny_files()
    lineage = msgspec.json.decode(files[LINEAGE]) | {"held_out": msgspec.to_builtins(held(300)), "metrics": {}}
    directory = tmp_path_factory.mktemp("recipes") / "apples"
    write_bundle(directory, "apples", files | {LINEAGE: msgspec.json.encode(lineage)})
    return directory


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    found = make_services(tmp_path / "plane")
    yield found
    found.engine.dispose()


@pytest.fixture
def client(services: Services, bundle: Path) -> Iterator[TestClient]:
    with make_client(services) as found:
        assert found.post("/api/v1/versions?actor=test", content=pack(bundle)).status_code == 201
        yield found


@pytest.fixture(scope="module")
def reader(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A registry for the tests that change nothing."""
    services = make_services(tmp_path_factory.mktemp("reader") / "plane")
    with make_client(services) as found:
        assert found.post("/api/v1/versions?actor=test", content=pack(bundle)).status_code == 201
        yield found
    services.engine.dispose()


def test_a_changed_bundle_shares_everything_but_recipe_and_manifest(bundle: Path, tmp_path: Path) -> None:
    before = read_bundle(bundle)
    change = parse_change({"terms": {"escaped": 3.0, "prices": {"sound": 0.4}}})
    with_recipe(bundle, tmp_path / "new", changed(before.recipe, change, held(300)), reason="rot is claimed")
    after = read_bundle(tmp_path / "new")
    assert after.digest != before.digest
    differing = [part for part in PARTS if (bundle / part).read_bytes() != (tmp_path / "new" / part).read_bytes()]
    assert differing == [RECIPE]
    assert after.golden.check(OnnxClassifier(after.model)) <= after.golden.tolerance
    assert (after.recipe.replaces, after.recipe.reason) == (before.digest, "rot is claimed")
    assert after.recipe.fusion == before.recipe.fusion
    assert after.recipe.threshold() == pytest.approx(1.4 / (1.4 + 2.6))
    with pytest.raises(InputError) as caught:
        with_recipe(tmp_path / "new", tmp_path / "again", after.recipe, reason="nothing")
    assert caught.value.code == "recipe.unchanged"


def test_a_change_becomes_a_version_with_its_reason_author_and_origin(client: TestClient, services: Services) -> None:
    body = {
        "terms": {"prices": {"sound": 0.3}, "escaped": 2.0, "defect_share": 0.1, "abstain_budget": 0.05},
        "unsure_outlet": "recheck",
        "reason": "the market moved",
        "actor": "ida",
    }
    made = client.post(RECIPE_URL, json=body)
    assert made.status_code == 201
    assert made.json()["number"] == 2
    assert made.json()["metrics"]["costs"]["abstain"]["value"] <= 0.05
    version = client.get("/api/v1/versions/apples:2").json()
    assert version["lineage"]["recipe_of"] == "apples:1"
    assert "held_out" not in version["lineage"], "it stays in the bundle"
    assert version["created_by"] == "ida"
    shown = client.get("/api/v1/versions/apples/recipe").json()
    assert shown["terms"]["escaped"] == 2.0
    assert shown["recipe"]["unsure_outlet"] == "recheck"
    assert shown["recipe"]["replaces"] == client.get("/api/v1/versions/apples:1").json()["bundle"]
    assert shown["thresholds"]["defect"]["unsure"][0] < shown["thresholds"]["defect"]["threshold"]
    services.ingest.take(agent_topic("line-1", Channel.REPORTED), encode(reported()))
    refused = client.post("/api/v1/rollouts", json={"model": "apples:2"})
    assert refused.json()["code"] == "trust.not_released", "a change of recipe is signed like a model"
    release(services, version["bundle"])
    assert client.post("/api/v1/rollouts", json={"model": "apples:2"}).status_code == 201
    with reading(services.engine) as session:
        entry = session.exec(select(Audit).where(Audit.action == "recipe.change")).one()
        assert broken_audit_entry(session) is None
    assert (entry.actor, entry.object, entry.details["reason"]) == ("ida", "apples:2", "the market moved")
    assert entry.details["change"]["terms"]["prices"] == {"sound": 0.3}


def test_a_preview_changes_nothing_and_shows_the_cost_of_the_change(reader: TestClient) -> None:
    plain = reader.get(RECIPE_URL).json()
    other = reader.post(f"{RECIPE_URL}/preview", json={"terms": {"escaped": 5.0}}).json()
    assert other["thresholds"]["defect"]["threshold"] < plain["thresholds"]["defect"]["threshold"]
    rate = "escape_rate"
    assert other["costs"]["recipe"][rate]["value"] < plain["costs"]["recipe"][rate]["value"]
    assert reader.get(RECIPE_URL).json() == plain
    assert len(reader.get("/api/v1/models").json()[0]["versions"]) == 1


def test_a_variety_has_terms_of_its_own_and_loses_them_again(client: TestClient) -> None:
    body = {"terms": {"wasted": 4.0}, "variety": "russet", "reason": "russet looks ill"}
    assert client.post(RECIPE_URL, json=body).status_code == 201
    url = "/api/v1/versions/apples:2/recipe"
    assert client.get(url).json()["thresholds"]["defect"]["threshold"] == pytest.approx(0.5)
    assert client.get(f"{url}?variety=russet").json()["thresholds"]["defect"]["threshold"] == pytest.approx(0.8)
    body = {"variety": "russet", "forget": True, "reason": "it was the lamp"}
    assert client.post(url, json=body).json()["number"] == 3
    assert client.get("/api/v1/versions/apples:3/recipe").json()["recipe"]["varieties"] == {}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"reason": "x"}, "recipe.unchanged"),
        ({"terms": {"escaped": 1.5}}, "api.malformed"),
        ({"terms": {"escaped": 1.5}, "reason": ""}, "api.malformed"),
        ({"terms": {"escpaed": 1.5}, "reason": "x"}, "api.malformed"),
        ({"terms": {"escaped": -1.0}, "reason": "x"}, "recipe.bad_change"),
        ({"terms": {"escaped": "Infinity"}, "reason": "x"}, "recipe.bad_change"),
        ({"terms": {"defect_share": 1.0}, "reason": "x"}, "recipe.bad_change"),
        ({"terms": {"prices": {"plum": 1.0}}, "reason": "x"}, "recipe.bad_change"),
        ({"outlets": {"plum": "bin"}, "reason": "x"}, "recipe.bad_change"),
        ({"outlets": {"sound": "../x"}, "reason": "x"}, "recipe.bad_change"),
        ({"grades": {"a": {"outlet": "x", "classes": ["sound"]}}, "reason": "x"}, "recipe.bad_change"),
        ({"variety": "a", "lot": "b", "terms": {"escaped": 2.0}, "reason": "x"}, "recipe.bad_change"),
        ({"forget": True, "reason": "x"}, "recipe.bad_change"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(reader: TestClient, body: dict[str, object], code: str) -> None:
    answer = reader.post(RECIPE_URL, json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert len(reader.get("/api/v1/models").json()[0]["versions"]) == 1


def test_the_learnt_band_cannot_be_set_by_hand() -> None:
    with pytest.raises(InputError, match="learnt"):
        parse_change({"terms": {"abstain_above": 0.1}})


def test_a_bundle_without_held_out_items_has_a_recipe_but_no_costs_and_no_budget(tmp_path: Path) -> None:
    recipe = tiny_bundle(tmp_path / "b").recipe
    assert described(recipe, None)["costs"] is None
    assert changed(recipe, parse_change({"terms": {"escaped": 2.0}}), None).threshold() == pytest.approx(1 / 3)
    with pytest.raises(InputError) as caught:
        changed(recipe, parse_change({"terms": {"abstain_budget": 0.05}}), None)
    assert caught.value.code == "recipe.no_held_out"


def test_the_chart_is_whole_and_marks_what_it_is_about() -> None:
    recipe = changed(Recipe(classes=("sound", "defect"), good_class="sound"), parse_change({}), held(50))
    shown = described(recipe, held(50))
    root = ET.fromstring(str(cost_chart(shown, alone=True)))
    texts = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    assert "threshold 50.0%" in texts
    assert any(text.startswith("● cheapest") for text in texts)
    kinds = {element.get("class") for element in root.iter()}
    assert {"cost", "band", "escape", "waste", "mark", "best-line"} <= kinds
    numbers = re.findall(r"-?\d+\.\d", root.find(".//*[@class='cost']").get("d"))  # type: ignore[union-attr]
    assert all(0.0 <= float(number) <= 760.0 for number in numbers)
    assert "<style>" not in cost_chart(shown), "the pages' policy forbids it"


def test_the_page_shows_costs_and_asks_what_other_terms_would_cost(reader: TestClient) -> None:
    page = reader.get("/models/apples:1")
    assert page.status_code == 200
    assert "threshold 50.0%" in page.text
    asked = reader.get("/models/apples:1", params={"escaped": "4", "wasted": "1", "price.sound": "0.3"})
    assert "threshold 50.0%" not in asked.text
    assert "--escape-cost 4" in asked.text
    assert "--waste-cost" not in asked.text, "it is as it was"
    assert "--price sound=0.3" in asked.text
    for terms in ({"escaped": "<script>x"}, {"escaped": "-3"}, {"price.plum": "1"}, {"defect_share": "1e999"}):
        wrong = reader.get("/models/apples:1", params=terms)
        assert wrong.status_code == 200
        assert "recipe.bad_change" in wrong.text or 'role="alert"' in wrong.text
        assert "<script>x" not in wrong.text
    assert reader.get("/models/none").status_code == 404
    assert 'href="/models/apples:1"' in reader.get("/models").text


def test_the_command_shows_tunes_and_sets(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "cost.svg"
    options = ["--price", "sound=0.3", "--escape-cost", "2", "--escape-cost", "defect=3", "--defect-share", "0.1"]
    assert main(["recipe", "tune", "--bundle", str(bundle), *options, "--plot", str(plot), "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["terms"]["escaped_by_class"] == {"defect": 3.0}
    ET.fromstring(plot.read_text())
    made = ["recipe", "set", "--bundle", str(bundle), "--output", str(tmp_path / "new"), *options, "--reason", "test"]
    grades = ["--grade", "first=pass:sound", "--grade", "juice=bin:defect", "--outlet", "unsure=recheck"]
    assert main([*made[:-2], *grades, "--reason", "test"]) == 1, "prices name the grades there are"
    assert "recipe.bad_change" in capsys.readouterr().err
    assert main([*made, "--abstain-budget", "0.05"]) == 0
    assert "-> unsure about defect" in capsys.readouterr().out
    assert main(["recipe", "show", "--bundle", str(tmp_path / "new"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["recipe"]["reason"] == "test"
    assert shown["thresholds"]["defect"]["threshold"] == pytest.approx(tuned["thresholds"]["defect"]["threshold"])


def test_the_share_of_unsure_items_is_shown_per_agent(client: TestClient, services: Services) -> None:
    services.ingest.take(agent_topic("line-1", Channel.PRESENCE), encode(Presence(online=True, boot_id=BOOT)))
    services.ingest.take(agent_topic("line-1", Channel.REPORTED), encode(reported(active=A)))
    payload = batch(window(40, grades={"sound": 37, "unsure": 3}), window(60, grades={"sound": 60}))
    services.ingest.take(agent_topic("line-1", Channel.BATCH), payload)
    status = client.get("/api/v1/agents/line-1").json()
    assert status["grades"] == {"sound": 97, "unsure": 3}
    assert status["unsure_share"] == pytest.approx(0.03)
    assert "unsure about 3.0 %" in client.get("/agents/line-1").text
    assert 'sortline_unsure_share{agent="line-1"} 0.03' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["tune"], "The command needs a version"),
        (["tune", "--bundle", "B", "--price", "sound"], "NAME=VALUE"),
        (["tune", "--bundle", "B", "--price", "sound=much"], "a number"),
        (["tune", "apples", "--data", "photos"], "--bundle DIR"),
        (["set", "--bundle", "B", "--reason", "x"], "--output DIR"),
    ],
)
def test_the_command_says_what_is_wrong(bundle: Path, options: list[str], text: str, capsys) -> None:
    assert main(["recipe", *(str(bundle) if option == "B" else option for option in options)]) == 1
    assert text in capsys.readouterr().err.replace("\n", " ")
