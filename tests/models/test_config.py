"""Configuration is refused with the nearest key before anything starts; errors keep their parts across processes."""

import pickle
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from models.config import load_config
from models.errors import BundleError, ConfigError
from models.files import write_atomically


class Broker(msgspec.Struct, frozen=True):
    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 1883


class Config(msgspec.Struct, frozen=True):
    name: str = "x"
    broker: Broker = Broker()


def load(path: Path | None = None, environment: dict[str, str] | None = None, **overrides: object) -> Config:
    return load_config(Config, path, environment=environment or {}, prefix="SORTLINE_AGENT", overrides=overrides)


def test_defaults_file_environment_and_flags_in_that_order(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('name = "file"\n[broker]\nport = 1884\nhost = "a"\n')
    assert load() == Config()
    assert load(path) == Config("file", Broker("a", 1884))
    environment = {"SORTLINE_AGENT__BROKER__PORT": "1885", "OTHER__BROKER__PORT": "9"}
    assert load(path, environment).broker == Broker("a", 1885)
    assert load(path, environment, broker={"port": 1886}).broker == Broker("a", 1886)


@pytest.mark.parametrize(
    ("text", "code", "hint"),
    [
        ("nam = 1", "config.unknown_key", "did you mean name?"),
        ("[broker]\nprot = 1", "config.unknown_key", "did you mean broker.port?"),
        ("[broker]\nport = 99999", "config.bad_value", "broker.port"),
        ("[broker]\nport = []", "config.bad_value", "broker.port"),
        ("broker = 3", "config.bad_value", "broker"),
        ("name = ", "config.malformed", "TOML"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(tmp_path: Path, text: str, code: str, hint: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.code == code
    assert hint in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "none.toml")
    assert caught.value.code == "config.unreadable"


def test_errors_keep_their_parts_across_processes() -> None:
    error = BundleError("bundle.wrong_digest", "Not the one.", expected="a", got="b", path="x")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is BundleError
    assert copy.as_dict() == error.as_dict()
    assert "expected a, got b" in str(copy)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text is no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
