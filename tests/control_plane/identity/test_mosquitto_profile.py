"""The profile of mosquitto on disk: written once, extended by people, moved with its control plane."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from control_plane.identity.authority import Authority
from control_plane.identity.mosquitto import CONF, write_profile
from control_plane.identity.publication import refresh_site

NOW = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority.create(tmp_path / "identity", site="Test", names=["localhost"], now=NOW)
    refresh_site(made, NOW)
    return made


def test_a_profile_that_was_moved_names_its_new_folder(authority: Authority, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "moved away" / "profile"
    write_profile(authority, old)
    conf = old / CONF
    conf.write_text(
        conf.read_text(encoding="utf-8") + "# ours\npersistence_location /var/spool/ours/\n", encoding="utf-8"
    )
    new.parent.mkdir()
    old.rename(new)
    write_profile(authority, new)
    text = (new / CONF).read_text(encoding="utf-8")
    assert str(old) not in text
    for name in ("cafile", "certfile", "keyfile", "crlfile", "acl_file", "pid_file"):
        assert f"\n{name} {new}/" in text
    assert text.endswith("# ours\npersistence_location /var/spool/ours/\n"), "what people wrote stays"


def test_a_profile_in_its_place_is_not_written_again(authority: Authority, tmp_path: Path) -> None:
    write_profile(authority, tmp_path / "profile")
    (tmp_path / "profile" / CONF).write_text("# all mine\n", encoding="utf-8")
    write_profile(authority, tmp_path / "profile")
    assert (tmp_path / "profile" / CONF).read_text(encoding="utf-8") == "# all mine\n"
