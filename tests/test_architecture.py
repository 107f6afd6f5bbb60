"""Who may import whom, what an agent may load, how large a file may grow, and that documents tell the truth."""

import ast
import re
import subprocess
import sys
from pathlib import Path

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
ONLY_IN = {
    "cv2": {"models/preprocess.py"},
    "onnxruntime": {"models/onnx_runtime.py"},
    "tuf": {"models/trust.py"},
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module named by an import statement, at any depth of the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_the_two_sides_never_import_each_other() -> None:
    for package, other in (("edge_agent", "control_plane"), ("control_plane", "edge_agent")):
        for path in sources(package):
            assert other not in top(imports(path)), f"{path} imports {other}"


def test_the_edge_never_imports_what_is_heavy() -> None:
    for path in sources("edge_agent"):
        assert not top(imports(path)) & set(HEAVY), path


def test_the_contract_imports_only_what_both_sides_have() -> None:
    allowed = MODELS_MAY_IMPORT | sys.stdlib_module_names
    for path in sources("models"):
        assert top(imports(path)) <= allowed, path
        for library, places in ONLY_IN.items():
            assert library not in top(imports(path)) or str(path.relative_to(ROOT)) in places, path


@pytest.mark.parametrize(
    "module", ["edge_agent.cli.commands", "edge_agent.supervisor.supervisor", "edge_agent.line.process"]
)
def test_a_fresh_agent_loads_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    ).stdout.split()
    assert not set(loaded) & set(HEAVY)
    if module != "edge_agent.line.process":
        assert not set(loaded) & {"cv2", "onnxruntime"}, "the supervisor only moves bundles"
    assert not set(loaded) & {"tuf", "securesystemslib", "cryptography"}, "signatures are verified in another process"


def test_no_file_outgrows_its_purpose() -> None:
    for package in PACKAGES:
        for path in sources(package):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= 600, f"{path} has {lines} lines"


def test_no_module_is_named_after_nothing() -> None:
    for package in PACKAGES:
        for path in sources(package):
            assert path.stem not in {"utils", "helpers", "manager", "common", "base", "misc"}, path


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
