"""The disk of the control plane fills up during an upload: a real small file system, one answer with a code."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from models.bundle import pack
from tests.simulators.plane import make_client, make_services
from tests.simulators.tiny_bundle import tiny_bundle

SIZE = 24 * 1024 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system of its own cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def client(disk: Path) -> Iterator[TestClient]:
    services = make_services(disk / "plane")
    with make_client(services) as found:
        yield found
    services.engine.dispose()


def test_an_upload_that_fills_the_disk_is_refused_with_507_and_leaves_nothing(
    client: TestClient, disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_bundle(tmp_path / "large", padding=SIZE)
    tiny_bundle(tmp_path / "small")
    before = sorted(path.name for path in (disk / "plane").iterdir())
    answer = client.post("/api/v1/versions", content=pack(tmp_path / "large"))
    assert (answer.status_code, answer.json()["code"]) == (507, "disk.full")
    assert "nothing was changed" in answer.json()["message"]
    lines = [record for record in caplog.records if "disk is full" in record.getMessage()]
    assert len(lines) == 1
    assert not [record for record in caplog.records if record.exc_info], "no traceback"
    assert sorted(path.name for path in (disk / "plane").iterdir()) == before, "what had arrived is removed"
    assert client.get("/api/v1/models").json() == []
    assert client.get("/readyz").status_code in {200, 503}
    assert client.post("/api/v1/versions", content=pack(tmp_path / "small")).status_code == 201
