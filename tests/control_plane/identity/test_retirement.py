"""A retirement names the agents that it would cut off, and the root's key opens with its passphrase alone."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from control_plane.cli import main
from control_plane.identity.authority import Authority, is_encrypted
from control_plane.identity.retirement import left_behind
from models.errors import ConfigError, ConflictError
from tests.simulators.site import Site, make_site, new_key, renewal

PASSPHRASE = "a passphrase in a test"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    found = make_site(tmp_path)
    yield found
    found.engine.dispose()


def names(site: Site) -> list[str]:
    return [one.agent_id for one in left_behind(site.engine, Authority(site.folder))]


def test_the_agents_that_have_not_renewed_since_a_rotation_are_named(site: Site) -> None:
    keys = {name: new_key() for name in ("line-1", "line-2", "line-3")}
    answers = {name: site.enrol(name, key) for name, key in keys.items()}
    assert names(site) == []
    site.enrolment.authority.rotate(site.now)
    assert names(site) == ["line-1", "line-2", "line-3"]
    site.forward(hours=1)
    site.enrolment.renew(renewal(answers["line-2"], keys["line-2"], new_key()), now=site.now)
    site.enrolment.revoke("line-3", reason="stolen", actor="t", now=site.now)
    assert names(site) == ["line-1"]
    [found] = left_behind(site.engine, Authority(site.folder))
    assert found.until > site.now + timedelta(days=29)
    assert found.seen_at is None


def test_the_command_names_them_and_needs_a_yes(site: Site, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("SORTLINE__DATABASE", str(site.engine.url))
    monkeypatch.setenv("SORTLINE__IDENTITY__FOLDER", str(site.folder))
    monkeypatch.setenv("SORTLINE__DATA_DIR", str(site.folder.parent / "data"))
    site.enrol("line-1")
    assert main(["ca", "rotate", "--json"]) == 0
    capsys.readouterr()
    assert main(["ca", "retire", "--json"]) == 3
    said = capsys.readouterr().err
    assert "line-1: has not renewed" in said
    assert "ca.would_cut_off" in said
    assert len(Authority(site.folder).trusted) == 2, "nothing was retired"
    assert main(["ca", "retire", "--yes", "--json"]) == 0
    states = [one["state"] for one in json.loads(capsys.readouterr().out)["generations"]]
    assert states == ["retired", "current"]


def test_a_site_where_nobody_enrolled_retires_without_a_question(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("SORTLINE__DATA_DIR", str(tmp_path / "data"))
    assert main(["ca", "init", "--json"]) == 0
    assert main(["ca", "rotate", "--json"]) == 0
    assert main(["ca", "retire", "--json"]) == 0


def test_the_roots_key_opens_with_its_passphrase_alone(tmp_path: Path) -> None:
    now, stick = datetime.now(UTC), tmp_path / "stick" / "root.key"
    made = Authority.create(tmp_path / "ca", site="S", names=["b"], now=now, root_key=stick, passphrase=PASSPHRASE)
    assert is_encrypted(stick)
    assert stick.stat().st_mode & 0o077 == 0
    for wrong in ("", "another passphrase"):
        with pytest.raises(ConfigError) as caught:
            made.rotate(now, root_key=stick, passphrase=lambda _path, word=wrong: word)
        assert caught.value.code == "ca.wrong_passphrase"
    assert Authority(tmp_path / "ca").current.number == 1
    asked: list[Path] = []

    def ask(path: Path) -> str:
        asked.append(path)
        return PASSPHRASE

    rotated = made.rotate(now, root_key=stick, passphrase=ask)
    assert asked == [stick]
    following = tmp_path / "stick" / "root-2.key"
    assert is_encrypted(following), "the new root's key is as safe as the old one's"
    assert rotated.rotate(now, root_key=following, keep_root=True, passphrase=ask).current.root == 2


def test_a_root_key_is_never_overwritten_and_a_short_passphrase_is_refused(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    (tmp_path / "root.key").write_text("of another site")
    with pytest.raises(ConflictError) as caught:
        Authority.create(tmp_path / "ca", site="S", names=["b"], now=now, root_key=tmp_path / "root.key")
    assert caught.value.code == "ca.key_exists"
    with pytest.raises(ConfigError) as weak:
        Authority.create(tmp_path / "ca", site="S", names=["b"], now=now, passphrase="short")
    assert weak.value.code == "ca.weak_passphrase"
    assert (tmp_path / "root.key").read_text() == "of another site"


def test_init_asks_for_a_passphrase_where_the_key_leaves_the_machine(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("SORTLINE_KEY_PASSPHRASE", PASSPHRASE)
    for name, extra, encrypted in (("a", [], True), ("b", ["--no-passphrase"], False)):
        monkeypatch.setenv("SORTLINE__DATA_DIR", str(tmp_path / name))
        key = tmp_path / f"{name}.key"
        assert main(["ca", "init", "--root-key", str(key), *extra, "--json"]) == 0
        assert is_encrypted(key) is encrypted
        assert main(["ca", "rotate", "--issuing-only", "--root-key", str(key), "--json"]) == 0
