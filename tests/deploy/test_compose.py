"""The compose files: every image, port, path, environment name, command and setting in them exists in the product."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from control_plane.config import load_control_plane_config
from edge_agent.cli.commands import _parser
from edge_agent.config import load_agent_config
from tests.deploy.test_units import check_sortline

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose"
FILES = sorted(COMPOSE.glob("*.yml"))
OURS = {"sortline-control-plane": "control-plane.Dockerfile", "sortline-agent": "agent.Dockerfile"}
FOREIGN = {"postgres": {"/var/lib/postgresql/data"}, "eclipse-mosquitto": set(), "prom/prometheus": {"/prometheus"}}
"""Images of others, and where they keep what they keep."""
KNOWN_KEYS = frozenset(
    [
        "image",
        "build",
        "command",
        "entrypoint",
        "environment",
        "volumes",
        "ports",
        "secrets",
        "depends_on",
        "restart",
        "init",
        "read_only",
        "tmpfs",
        "cap_drop",
        "security_opt",
        "user",
        "pid",
        "ulimits",
        "healthcheck",
        "devices",
        "group_add",
    ]
)
FOREIGN_NAMES = {"PGPASSWORD", "POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD", "SORTLINE_BROKER_HOST"}


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def services() -> list[Any]:
    return [
        pytest.param(path, name, service, id=f"{path.stem}-{name}")
        for path in FILES
        for name, service in load(path)["services"].items()
    ]


def filled(text: str) -> str:
    """A value with its variables: the default, or a word where one must be given."""
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", text)
    return re.sub(r"\$\{(\w+):\?[^}]*\}", "given", text).replace("$$", "$")


def settings_of(service: dict[str, Any]) -> dict[str, str]:
    return {name: filled(str(value)) for name, value in service.get("environment", {}).items()}


def control_plane(service: dict[str, Any]) -> Any:
    return load_control_plane_config(COMPOSE / "control-plane.toml", environment=settings_of(service))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_has_the_form_of_compose(path: Path) -> None:
    content = load(path)
    assert {key for key in content if not key.startswith("x-")} <= {"name", "services", "volumes", "secrets"}
    for name, service in content["services"].items():
        assert set(service) <= KNOWN_KEYS, f"{name}: {sorted(set(service) - KNOWN_KEYS)}"
        for other, how in service.get("depends_on", {}).items():
            assert other in content["services"]
            assert how["condition"] in {"service_started", "service_healthy", "service_completed_successfully"}
        if "pid" in service:
            assert service["pid"].removeprefix("service:") in content["services"]
        for secret in service.get("secrets", []):
            assert secret in content["secrets"]


def test_dependencies_have_no_circle() -> None:
    for path in FILES:
        needs = {name: set(service.get("depends_on", {})) for name, service in load(path)["services"].items()}
        started: set[str] = set()
        while ready := {name for name, wanted in needs.items() if name not in started and wanted <= started}:
            started |= ready
        assert started == set(needs)


@pytest.mark.parametrize(("path", "name", "service"), services())
def test_the_image_is_ours_or_a_named_one(path: Path, name: str, service: dict[str, Any]) -> None:
    image = service["image"].partition(":")[0]
    if image in OURS:
        build = service["build"]
        assert (path.parent / build["context"]).resolve() == ROOT
        assert build["dockerfile"] == f"deploy/docker/{OURS[image]}"
        assert (ROOT / build["dockerfile"]).is_file()
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    else:
        assert image in FOREIGN
        assert ":" in service["image"], "a version is named"
        assert service["image"].rpartition(":")[2] != "latest"


@pytest.mark.parametrize(("path", "name", "service"), services())
def test_every_volume_is_declared_and_mounted_where_the_product_looks(
    path: Path, name: str, service: dict[str, Any]
) -> None:
    image, declared = service["image"].partition(":")[0], load(path)["volumes"]
    for volume in service.get("volumes", []):
        source, target, *mode = volume.split(":")
        if source.startswith("."):
            assert (path.parent / source).resolve().is_file(), f"{source} is not in the repository"
            assert mode == ["ro"]
            continue
        assert source in declared
        if image == "sortline-control-plane":
            config = control_plane(service)
            assert target in {config.data_dir, f"{config.data_dir}/mosquitto"}
        elif image == "sortline-agent":
            assert target == load_agent_config(COMPOSE / "agent.toml", {}, environment={}).state_dir
        else:
            assert target in FOREIGN[image] | {"/var/lib/sortline/mosquitto"}


@pytest.mark.parametrize(("path", "name", "service"), services())
def test_every_environment_name_is_one_the_product_reads(path: Path, name: str, service: dict[str, Any]) -> None:
    for variable in service.get("environment", {}):
        assert variable.startswith("SORTLINE__") or variable in FOREIGN_NAMES, variable
    if service["image"] == "sortline-control-plane":
        control_plane(service)  # refuses a name or a value it does not know


@pytest.mark.parametrize(("path", "name", "service"), services())
def test_every_command_exists_and_finds_its_configuration(path: Path, name: str, service: dict[str, Any]) -> None:
    mounted = {volume.split(":")[1] for volume in service.get("volumes", [])}
    calls: list[list[str]] = []
    if service["image"] == "sortline-agent":
        _parser().parse_args(service["command"])
        calls = [service["command"]]
    elif service["image"] == "sortline-control-plane" and "entrypoint" not in service:
        check_sortline(service["command"])
        calls = [service["command"]]
    elif service["image"] == "sortline-control-plane":
        (script,) = service["command"]
        for text in re.findall(r"\bsortline ((?:(?!;|\|\||\bsortline ).)*)", filled(script)):
            words = [word.strip('"') for word in text.replace("}", "").split()]
            check_sortline(words)
            calls.append(words)
        assert calls
    for words in calls:
        assert words[words.index("--config") + 1] in mounted


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_published_port_is_one_the_product_listens_on(path: Path) -> None:
    taken: set[str] = set()
    for name, service in load(path)["services"].items():
        for port in service.get("ports", []):
            host, inside = port.rpartition(":")[0].rpartition(":")[2], int(port.rpartition(":")[2])
            assert host not in taken, f"{host} is published twice"
            taken.add(host)
            config = load_control_plane_config(COMPOSE / "control-plane.toml", environment={})
            usual = {
                "broker": {config.broker.port},
                "prometheus": {9090},
            }.get(name, {config.server.port, config.identity.port})
            assert inside in usual
            if inside == config.server.port:
                assert port.startswith("127.0.0.1:"), "pages and API are not opened to the network"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_names_inside_match_certificates_and_guards(path: Path) -> None:
    content = load(path)
    config = load_control_plane_config(COMPOSE / "control-plane.toml", environment={})
    assert config.broker.host in content["services"]
    (script,) = content["services"]["setup"]["command"]
    assert f"--name {config.broker.host}" in script
    planes = [name for name in content["services"] if name.startswith("control-plane")]
    assert set(planes) <= set(config.server.allowed_hosts)
    assert config.server.token_file == "/run/secrets/api-token"
    if "prometheus" in content["services"]:
        scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
        targets = scrape["scrape_configs"][0]["static_configs"][0]["targets"]
        assert targets == [f"{plane}:{config.server.port}" for plane in planes]
        mounted = [volume.split(":")[1] for volume in content["services"]["prometheus"]["volumes"]]
        assert set(scrape["rule_files"]) <= set(mounted)
        replica = settings_of(content["services"]["control-plane-b"])["SORTLINE__BROKER__REPLICA"]
        assert f"ca replica {replica} " in script


def test_both_settings_files_are_good() -> None:
    load_agent_config(COMPOSE / "agent.toml", {}, environment={})
    for folder in ("compose", "config"):
        for name in ("agent", "control-plane"):
            path = ROOT / "deploy" / folder / f"{name}.toml"
            commented = re.sub(r"^# (\w+ = )", r"\1", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert tomllib.loads(commented)
            if name == "agent":
                load_agent_config(path, {}, environment={})
            else:
                load_control_plane_config(path, environment={})
