"""Allowed imports, modules that an agent may load, sizes of files, and statements of documents about the tree.

The tables below are the architecture: a room (folder or ground-floor module) imports only rooms of lower layers.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "edge_agent", "control_plane")
HEAVY = (
    "control_plane",
    "sklearn",
    "scipy",
    "pandas",
    "onnx",
    "skl2onnx",
    "fastapi",
    "starlette",
    "sqlmodel",
    "sqlalchemy",
    "pydantic",
    "typer",
)
MODELS_MAY_IMPORT = {"models", "numpy", "msgspec", "cv2", "onnxruntime", "tuf"}

LAYERS: Final[dict[str, tuple[frozenset[str], ...]]] = {
    "edge_agent": (
        frozenset({"config", "line_config", "interfaces", "line_protocol", "events", "host", "state_directory"}),
        frozenset({"vision", "ejection", "simulation", "health", "identity", "telemetry"}),
        frozenset({"mqtt", "trust", "sampling"}),
        frozenset({"devices", "delivery"}),
        frozenset({"line", "supervisor"}),
        frozenset({"recording", "calibration"}),
        frozenset({"offline"}),
        frozenset({"cli"}),
        frozenset({"__main__"}),
    ),
    "control_plane": (
        frozenset({"config", "client", "listening", "logs", "guard", "database", "data", "broker"}),
        frozenset({"trust", "identity", "evaluation"}),
        frozenset({"registry", "training"}),
        frozenset({"fleet", "jobs"}),
        frozenset({"monitoring"}),
        frozenset({"detection"}),
        frozenset({"alarms"}),
        frozenset({"rollouts"}),  # its gates and the blast radius read windows
        frozenset({"backup"}),
        frozenset({"services"}),
        frozenset({"api", "pages"}),
        frozenset({"app"}),
        frozenset({"server", "demo"}),
        frozenset({"cli"}),
        frozenset({"__main__"}),
    ),
}
"""Layers of rooms, lowest first. Rooms of one layer do not import each other, except those of the lowest layer."""

SIDES: Final = (
    {"supervisor", "delivery", "trust", "telemetry", "identity"},
    {
        "line",
        "vision",
        "ejection",
        "health",
        "devices",
        "simulation",
        "recording",
        "calibration",
        "sampling",
        "offline",
    },
)
"""The two processes of an agent: a crash of one leaves the other working, so neither imports the other's rooms."""

ONLY_IN: Final[dict[str, tuple[str, ...]]] = {
    "cv2": (
        "models/preprocess.py",
        "edge_agent/vision/",
        "edge_agent/devices/",
        "edge_agent/simulation/",
        "edge_agent/recording/",
        "edge_agent/calibration/",
        "edge_agent/offline/",
        "edge_agent/health/",
        "edge_agent/line/process.py",
        "edge_agent/line/warm_up.py",
        "edge_agent/line/thread_tuning.py",
        "control_plane/training/augment.py",
    ),
    "onnxruntime": ("models/classifier.py", "control_plane/training/quantise.py"),
    "paho": ("edge_agent/mqtt.py", "control_plane/fleet/connection.py"),
    "tuf": ("models/trust.py", "control_plane/trust/"),
    "securesystemslib": ("control_plane/trust/keys.py",),
    "cryptography": ("edge_agent/identity/enrolment.py", "control_plane/identity/", "control_plane/trust/keys.py"),
    "sklearn": ("control_plane/training/", "control_plane/evaluation/"),
    "onnx": ("control_plane/training/",),
    "skl2onnx": ("control_plane/training/onnx_graph.py",),
    "alembic": ("control_plane/database/",),
    "jinja2": ("control_plane/pages/rendering.py",),
    "prometheus_client": ("control_plane/monitoring/prometheus.py",),
    "typer": ("control_plane/cli/", "control_plane/demo/options.py"),
    "rich": ("control_plane/cli/", "control_plane/demo/"),
    "httpx2": ("control_plane/client.py", "control_plane/alarms/senders.py"),
    "uvicorn": ("control_plane/server.py", "control_plane/identity/listener.py"),
    "duckdb": ("control_plane/monitoring/closed_days.py",),
    "pymodbus": ("edge_agent/devices/drivers/",),
    "gpiod": ("edge_agent/devices/drivers/",),
}
"""One library, one importing place, where it can be."""
NEVER_IN: Final = {
    "sqlmodel": ("control_plane/cli/", "control_plane/training/", "control_plane/evaluation/"),
    "sqlmodel.select": ("control_plane/api/", "control_plane/pages/"),  # queries belong to the rooms of the tables
}

MOST_MODULES: Final = {"models": 26, "control_plane/cli": 18, "control_plane/api": 18}
_MOST_MODULES_OF_A_ROOM: Final = 14
MOST_LINES: Final = 500
TWIN_NAMES: Final = {
    "belt",  # the simulated belt and the driver that stops a real one
    "connection",  # one client of the embedded broker; the control plane's own to any broker
    "leases", "audit",  # a table and what works on it
    "mqtt",  # the agent's link and the driver of devices that speak MQTT
    "run",  # the command, and the line without a fleet that it may start
    "server",  # the broker's listener and the control plane's process
}  # fmt: skip
_PER_SUBJECT: Final = (
    "control_plane/api/",
    "control_plane/pages/",
    "control_plane/cli/",
    "control_plane/database/tables/",
)
"""Here a file bears the name of its subject, as in the room that holds the subject's rules."""


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@cache
def loaded_at_once(path: Path) -> frozenset[str]:
    """Every module that importing a file imports: not those named for types alone or inside a function."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module named by an import statement, at any depth of the file; `from a import b` names `a.b`, too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def top(names: frozenset[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    """The folder of a package a file stands in, or the module itself on the ground floor; empty for `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "" if parts[1] == "__init__" else parts[1]


def crossings(package: str) -> Iterator[tuple[Path, str, str]]:
    """(file, its room, a room of the same package it imports)."""
    for path in sources(package):
        home = room_of(path)
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1 and parts[1] != home:
                yield path, home, parts[1]


def test_the_two_sides_never_import_each_other() -> None:
    for package, other in (("edge_agent", "control_plane"), ("control_plane", "edge_agent")):
        for path in sources(package):
            assert other not in top(imports(path)), f"{path} imports {other}"


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_every_room_stands_in_one_layer(package: str) -> None:
    rooms = [room for layer in LAYERS[package] for room in layer]
    assert len(rooms) == len(set(rooms))
    found = {room_of(path) for path in sources(package)} - {""}
    assert found == set(rooms), f"rooms without a layer, or layers without a room: {sorted(found ^ set(rooms))}"


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_rooms_import_only_what_stands_below_them(package: str) -> None:
    height = {room: k for k, layer in enumerate(LAYERS[package]) for room in layer}
    wrong = {
        f"{relative(path)} imports {package}.{other}"
        for path, home, other in crossings(package)
        if home == "" or not (height[other] < height[home] or height[other] == height[home] == 0)
    }
    assert not wrong, sorted(wrong)


def test_supervisor_side_and_line_side_never_import_each_other() -> None:
    wrong = {
        relative(path)
        for path, home, other in crossings("edge_agent")
        if any(home in side and other in opposite for side, opposite in (SIDES, SIDES[::-1]))
    }
    assert not wrong, sorted(wrong)


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_no_two_files_import_each_other_in_a_circle(package: str) -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources(package)}
    needs = {name: loaded_at_once(path) & set(modules) for name, path in modules.items()}
    settled: set[str] = set()
    while ready := {name for name, wanted in needs.items() if name not in settled and wanted <= settled | {name}}:
        settled |= ready
    assert not set(needs) - settled, f"a circle among {sorted(set(needs) - settled)}"


def test_the_edge_never_imports_what_is_heavy() -> None:
    for path in sources("edge_agent"):
        assert not top(imports(path)) & set(HEAVY), path


def test_the_contract_imports_only_what_both_sides_have() -> None:
    allowed = MODELS_MAY_IMPORT | sys.stdlib_module_names
    for path in sources("models"):
        assert top(imports(path)) <= allowed, path


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_a_library_is_imported_in_its_place_only(library: str) -> None:
    found = {relative(path) for package in PACKAGES for path in sources(package) if library in top(imports(path))}
    assert not {path for path in found if not path.startswith(ONLY_IN[library])}
    unused = {place for place in ONLY_IN[library] if not any(path.startswith(place) for path in found)}
    assert not unused or library in {"pymodbus", "gpiod"}, f"nothing in {sorted(unused)} imports {library}"


@pytest.mark.parametrize("library", sorted(NEVER_IN))
def test_a_library_stays_out_of_rooms_that_hold_no_data(library: str) -> None:
    for package in PACKAGES:
        for path in sources(package):
            found = imports(path) | top(imports(path))
            assert library not in found or not relative(path).startswith(NEVER_IN[library]), path


@pytest.mark.parametrize(
    "module", ["edge_agent.cli.commands", "edge_agent.supervisor.supervisor", "edge_agent.line.process"]
)
def test_a_fresh_agent_loads_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=600
    ).stdout.split()
    assert not set(loaded) & set(HEAVY)
    if module != "edge_agent.line.process":
        assert not set(loaded) & {"cv2", "onnxruntime"}, "the supervisor only moves bundles"
    assert not set(loaded) & {"tuf", "securesystemslib", "cryptography"}, "signatures are verified in another process"


def test_no_file_outgrows_its_purpose() -> None:
    large = {
        relative(path): lines
        for package in PACKAGES
        for path in sources(package)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not large


def test_no_room_outgrows_its_purpose() -> None:
    crowded = {}
    for folder in {path.parent for package in PACKAGES for path in sources(package)}:
        modules = [path for path in folder.glob("*.py") if not path.stem.startswith("__")]
        if folder.name != "versions" and len(modules) > MOST_MODULES.get(relative(folder), _MOST_MODULES_OF_A_ROOM):
            crowded[relative(folder)] = len(modules)
    assert not crowded


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_modules_share_a_name(package: str) -> None:
    homes: dict[str, list[str]] = {}
    for path in sources(package):
        if not path.stem.startswith("__") and not relative(path).startswith(_PER_SUBJECT):
            homes.setdefault(path.stem, []).append(relative(path))
    assert not {stem: paths for stem, paths in homes.items() if len(paths) > 1 and stem not in TWIN_NAMES}


def test_no_module_is_named_after_nothing() -> None:
    nothing = {"utils", "helpers", "manager", "common", "base", "misc"}
    for package in PACKAGES:
        for path in sources(package):
            assert path.stem not in nothing, path
            assert path.parent.name not in nothing, path


def test_every_room_names_each_file_beside_it() -> None:
    missing = {
        relative(path)
        for package in PACKAGES
        for path in sources(package)
        if not path.stem.startswith("__")
        and "versions" not in path.parts
        and (path.parent / "__init__.py").exists()
        and not re.search(
            rf"`(?:\w+\.)*{path.stem}\b",
            (ast.get_docstring(ast.parse((path.parent / "__init__.py").read_text())) or ""),
        )
    }
    assert not missing, f"no docstring of their package names {sorted(missing)}"


def test_package_docstrings_name_no_file_that_is_gone() -> None:
    wrong = set()
    for package in PACKAGES:
        for path in sources(package):
            if path.name != "__init__.py":
                continue
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            for name in re.findall(r"`([a-z_]+)`", docstring):
                if not (path.parent / f"{name}.py").exists() and not (path.parent / name).is_dir():
                    wrong.add(f"{relative(path)}: {name}")
    assert not wrong - _NO_FILES, sorted(wrong)


_NO_FILES: Final = {
    "control_plane/__init__.py: sortline",
    "control_plane/cli/__init__.py: sortline",
    "control_plane/database/__init__.py: reading",
    "control_plane/database/__init__.py: writing",
    "edge_agent/devices/drivers/__init__.py: counters",
}
"""Words in backticks in a package's docstring that name no file of it."""


def test_every_error_code_is_documented_where_operators_look() -> None:
    documents = "\n".join(p.read_text(encoding="utf-8") for p in (*ROOT.glob("*.md"), *ROOT.rglob("docs/*.md")))
    documents += "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "models").glob("*.md"))
    pattern = re.compile(r'(?:Error|Fault)\(\s*(?:code=)?"([a-z_]+\.[a-z_]+)"')
    missing = {
        match
        for package in PACKAGES
        for path in sources(package)
        for match in pattern.findall(path.read_text(encoding="utf-8"))
        if match not in documents
    }
    assert not missing, f"no document mentions {sorted(missing)}"
