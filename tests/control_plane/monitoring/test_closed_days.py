"""Closed days become whole Parquet files that hold what the table held; nothing is deleted before, whatever fails."""

import hashlib
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import pytest
from sqlmodel import func, select

from control_plane.config import RetentionConfig
from control_plane.database.engine import reading
from control_plane.database.tables.windows import Rollup
from control_plane.monitoring.upkeep import Upkeep
from control_plane.services import Services
from models.errors import ConfigError
from models.messages import decode_packed
from models.windows import Window
from tests.control_plane.monitoring.test_rollups import BOOTS, counted, store

DAY = datetime(2026, 3, 14, tzinfo=UTC)
FILE = "minutes-2026-03-14.parquet"


def policy(folder: Path, **days: int) -> RetentionConfig:
    return RetentionConfig(archive=str(folder), **days)


def fill(services: Services, first: int = 0, count: int = 30) -> None:
    """Windows of 14 and 15 March, an hour apart."""
    for number in range(first, first + count):
        started = DAY + timedelta(hours=number)
        store(services, [(BOOTS[0], number, counted(number, f"lot {number // 6}", started=started))], started)


def turn(services: Services, rules: RetentionConfig, now: datetime) -> None:
    Upkeep(services.engine, rules, services.counters, "test").turn(now)


def read(folder: Path, what: str = "*") -> list[tuple]:
    with duckdb.connect(":memory:") as connection:
        return connection.execute(f"SELECT {what} FROM '{folder / FILE}'").fetchall()


def test_a_closed_day_is_a_file_that_holds_what_the_table_held(services: Services, tmp_path: Path) -> None:
    fill(services)
    turn(services, policy(tmp_path / "a"), DAY + timedelta(days=1, hours=1))
    assert list((tmp_path / "a").iterdir()) == []
    turn(services, policy(tmp_path / "a"), DAY + timedelta(days=1, hours=3))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["manifest.json", FILE]
    expected = [number % 7 + 1 for number in range(24)]
    assert read(tmp_path / "a", "count(*), sum(items), sum(classes['sound'])") == [(24, sum(expected), sum(expected))]
    for start, items, payload, features in read(tmp_path / "a", "epoch_ms(start), items, payload, features"):
        window = decode_packed(payload, Window)
        assert (window.items, window.started_ms) == (items, start)
        assert window.feature_counts().tolist() == features
    (entry,) = json.loads((tmp_path / "a" / "manifest.json").read_text())["days"]
    assert (entry["day"], entry["file"], entry["rows"], entry["windows"]) == ("2026-03-14", FILE, 24, 24)
    assert entry["sha256"] == hashlib.sha256((tmp_path / "a" / FILE).read_bytes()).hexdigest()


def test_late_windows_are_in_the_file_that_is_written_when_none_can_come_any_more(
    services: Services, tmp_path: Path
) -> None:
    fill(services, count=20)
    rules = policy(tmp_path)
    turn(services, rules, DAY + timedelta(days=2))
    fill(services, first=20, count=4)
    turn(services, rules, DAY + timedelta(days=20))
    assert read(tmp_path, "count(*)") == [(20,)]
    turn(services, rules, DAY + timedelta(days=34))
    assert read(tmp_path, "count(*)") == [(24,)]
    written = (tmp_path / FILE).stat().st_mtime_ns
    turn(services, rules, DAY + timedelta(days=35))
    assert (tmp_path / FILE).stat().st_mtime_ns == written


def test_minutes_stay_until_their_day_is_archived_whatever_fails(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(services)
    rules, now = policy(tmp_path, windows_days=2, minutes_days=2), DAY + timedelta(days=9)
    real = Path.replace

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".parquet.part"):
            raise OSError(28, "No space left on device")
        return real(path, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", failing)
        turn(services, rules, now)
    assert services.counters["archive_failed"] == 1
    assert list(tmp_path.glob("*.parquet*")) + list(tmp_path.glob(".*")) == []
    query = select(func.count()).select_from(Rollup).where(Rollup.span_s == 60)
    with reading(services.engine) as session:
        assert session.exec(query).one() == 30
    turn(services, rules, now)
    with reading(services.engine) as session:
        assert session.exec(query).one() == 0
    assert read(tmp_path, "sum(windows)") == [(24,)]


def test_without_the_library_the_server_says_what_to_install(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(ConfigError) as caught:
        Upkeep(services.engine, policy(tmp_path), services.counters, "test")
    assert caught.value.code == "retention.no_library"
