"""A signed repository and a device that trusts it, for the tests of trust."""

from pathlib import Path

import pytest

from tests.simulators.trust_repository import Device, Repository


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


@pytest.fixture
def device(repository: Repository, tmp_path: Path) -> Device:
    return Device(repository.anchor, tmp_path / "device")
