"""Every setting of the control plane stands in a document, and in the code with a sentence of its own."""

import ast
import re
from pathlib import Path

import msgspec

import control_plane.config
from control_plane.config import ControlPlaneConfig, ServerConfig

ROOT = Path(__file__).resolve().parents[2]


def names(kind: type[msgspec.Struct], prefix: str = "") -> list[str]:
    found = []
    for field in msgspec.structs.fields(kind):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            found += names(field.type, f"{prefix}{field.name}.")
        else:
            found.append(prefix + field.name)
    return found


def test_every_setting_stands_in_the_document() -> None:
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    missing = [name for name in names(ControlPlaneConfig) if f"`{name}`" not in text]
    assert not missing


def test_every_environment_variable_of_the_command_line_stands_in_the_document() -> None:
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    used = set()
    for path in (ROOT / "control_plane").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.update(re.findall(r"\bSORTLINE_[A-Z]+(?:_[A-Z]+)*\b(?!_)", node.value))
    assert used
    assert not {name for name in used if f"`{name}`" not in text}


def test_the_public_address_gives_host_origin_and_prefix() -> None:
    found = ServerConfig(public_url="https://Plant.example:8443/sort/")
    assert (found.prefix, found.public_origin) == ("/sort", "https://plant.example:8443")
    assert "plant.example" in found.hosts
    assert ServerConfig(public_url="http://[fe80::1]:1").hosts[-1] == "[fe80::1]"
    assert ServerConfig().hosts == ServerConfig().allowed_hosts
    assert ServerConfig(public_url="https://a.example/x", root_path="/y").prefix == "/y"


def test_mosquitto_listens_where_the_broker_is_configured() -> None:
    broker = control_plane.config.BrokerConfig
    assert broker().tls_port == 8883
    assert broker(port=18883).tls_port == 18883
