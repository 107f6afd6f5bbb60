"""Key files have ids that can be looked up, a rotation that cannot be made writes nothing, and a stick is shared."""

import json
from pathlib import Path
from typing import Any

import pytest

from control_plane.cli import main
from control_plane.database.tables.columns import utc_now
from control_plane.services import Services
from control_plane.trust.export import export_agent
from models.errors import InputError
from models.messages import encode
from models.offline_export import DESIRED, find_export
from models.topics import Channel
from tests.control_plane.fleet.test_fleet import register_tiny, reported, say, start_rollout
from tests.simulators.plane import make_client, make_services, withdraw

PASSPHRASE = "a passphrase in a test"


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three root keys and a release key; public metadata in `trust`."""
    monkeypatch.setenv("SORTLINE_KEY_PASSPHRASE", PASSPHRASE)
    roots = [tmp_path / f"root-{n}.pem" for n in (1, 2, 3)]
    flags = [flag for path in roots for flag in ("--root-key", str(path))]
    release = tmp_path / "release.pem"
    assert main(["keys", "init", "--trust", str(tmp_path / "trust"), *flags, "--release-key", str(release)]) == 0
    return [*roots, release]


def rotation(keys: list[Path], trust: Path) -> list[str]:
    return ["keys", "rotate", "root", "--trust", str(trust), "--key", str(keys[0]), "--key", str(keys[1])]


def ids(keys: list[Path], trust: Path, capsys) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["keys", "id", *map(str, keys), "--trust", str(trust), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_id_of_a_key_file_is_the_one_that_status_and_rotate_name(keys: list[Path], tmp_path: Path, capsys) -> None:
    found = ids(keys, tmp_path / "trust", capsys)
    assert [row["role"] for row in found] == ["root", "root", "root", "targets"]
    assert main(["keys", "status", "--trust", str(tmp_path / "trust"), "--json"]) == 0
    roles = {row["role"]: row["keys"] for row in json.loads(capsys.readouterr().out)["roles"]}
    assert roles["root"] == sorted((row["id"][:12] for row in found[:3]), key=roles["root"].index)
    lost = found[2]["id"][:8]
    rotate = [
        "keys",
        "rotate",
        "root",
        "--trust",
        str(tmp_path / "trust"),
        "--key",
        str(keys[0]),
        "--key",
        str(keys[1]),
    ]
    assert main([*rotate, "--retire", lost, "--new", str(tmp_path / "root-4.pem")]) == 0
    again = ids([keys[2], tmp_path / "root-4.pem"], tmp_path / "trust", capsys)
    assert [row["role"] for row in again] == ["", "root"]


@pytest.mark.parametrize("options", [["--new", "NEW"], ["--new", "NEW", "--retire", "ffff"], ["--retire", "ffff"]])
def test_a_rotation_that_cannot_be_made_writes_no_key(
    keys: list[Path], tmp_path: Path, options: list[str], capsys
) -> None:
    new = tmp_path / "root-4.pem"
    rotate = [
        "keys",
        "rotate",
        "root",
        "--trust",
        str(tmp_path / "trust"),
        "--key",
        str(keys[0]),
        "--key",
        str(keys[1]),
    ]
    assert main([*rotate, *(str(new) if word == "NEW" else word for word in options)]) == 1
    assert "keys.unknown_key" in capsys.readouterr().err
    assert not new.exists()


@pytest.fixture
def plane(tmp_path: Path) -> Services:
    found = make_services(tmp_path / "plane")
    yield found
    found.engine.dispose()


class Source:
    """The control plane's answers, without a network."""

    def __init__(self, plane: Services) -> None:
        self._client = make_client(plane)

    def get(self, path: str) -> bytes:
        answer = self._client.get(path)
        if answer.status_code != 200:
            raise InputError("test.refused", answer.text)
        return answer.content


def test_a_stick_holds_other_files_and_other_lines_and_is_brought_up_to_date(plane: Services, tmp_path: Path) -> None:
    for agent in ("line-1", "line-2"):
        say(plane, Channel.REPORTED, encode(reported()), agent)
    first = register_tiny(plane, tmp_path / "1", padding=200_000)
    start_rollout(plane, reference=first, waves=("100%",))
    plane.rollouts.step(utc_now())
    stick = tmp_path / "stick"
    stick.mkdir()
    (stick / "holiday.jpg").write_bytes(b"a photograph")
    found = export_agent(Source(plane), "line-1", stick)
    assert found["written"] == found["files"]
    assert export_agent(Source(plane), "line-1", stick)["written"] == 0
    export_agent(Source(plane), "line-2", stick)
    assert (find_export(stick, "line-1") / DESIRED).exists()
    assert find_export(find_export(stick, "line-1"), "line-1") == stick / "sortline" / "line-1"
    before = {path.name for path in (stick / "sortline" / "line-1").rglob("*") if path.is_file()}
    second = register_tiny(plane, tmp_path / "2", bias=1.0)
    start_rollout(plane, reference=second, waves=("100%",))
    plane.rollouts.step(utc_now())
    assert export_agent(Source(plane), "line-1", stick)["bundle"] == second
    after = {path.name for path in (stick / "sortline" / "line-1").rglob("*") if path.is_file()}
    assert before - after, "blobs of the bundle before are gone"
    assert find_export(stick, "line-2").is_dir()
    assert (stick / "holiday.jpg").read_bytes() == b"a photograph"


def test_an_export_never_leaves_its_folder(plane: Services, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        export_agent(Source(plane), "../line-1", tmp_path)
    assert caught.value.code == "agent.bad_id"


def test_released_and_withdrawn_stand_on_the_pages(plane: Services, tmp_path: Path) -> None:
    first = register_tiny(plane, tmp_path / "1")
    register_tiny(plane, tmp_path / "2", bias=1.0)
    withdraw(plane, first)
    client = make_client(plane)
    models = client.get("/models").text
    assert models.count(">withdrawn<") == 1
    assert models.count(">released<") == 1
    assert ">withdrawn<" in client.get("/models/tiny:1").text
    assert ">released<" in client.get("/models/tiny:2").text
    assert client.get("/api/v1/trust").json()["withdrawn"] == [first]
