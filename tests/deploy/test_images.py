"""The images: Dockerfiles follow their rules, build without a registry, and run as an unprivileged user."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.service_notice import HEARTBEAT

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))
NAMES = {"agent": "sortline-agent", "control-plane": "sortline"}
PACKAGES = "python3,python3-venv,ca-certificates"


def role(path: Path) -> str:
    return path.name.removesuffix(".Dockerfile")


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def test_there_is_an_image_for_each_side() -> None:
    assert [role(path) for path in DOCKERFILES] == sorted(NAMES)


@pytest.mark.parametrize("path", DOCKERFILES, ids=role)
def test_the_dockerfile_follows_the_rules(path: Path) -> None:
    found = instructions(path)
    names = [name for name, _ in found]
    values = {name: value for name, value in found if name != "RUN"}
    assert found[0][0] == "ARG"
    assert found[0][1].startswith("BASE="), "the base is an argument"
    assert values["FROM"] == "${BASE}"
    assert not values["FROM"].endswith("latest")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", values["USER"]), "an unprivileged user by number"
    assert names.index("USER") > max(k for k, name in enumerate(names) if name == "RUN"), (
        "nothing is built as that user"
    )
    assert values["ENTRYPOINT"] == f'["/usr/local/bin/{NAMES[role(path)]}"]'
    assert values["ENV"].startswith("ORT_DISABLE_TELEMETRY=1")
    beat = re.search(rf"{HEARTBEAT}=(\S+)", values["ENV"])
    assert beat is not None
    assert beat[1] in values["HEALTHCHECK"]
    assert "ADD" not in names
    assert not re.search(r"curl|wget|apt|http", " ".join(value for _, value in found)), (
        "nothing is downloaded but wheels"
    )


def buildah(*arguments: object, timeout: int = 900) -> str:
    done = subprocess.run(
        ["buildah", "--storage-driver", "vfs", *(str(argument) for argument in arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    """A base image that no registry has seen: a minimal Debian from its packages."""
    for program in ("buildah", "debootstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if os.geteuid() != 0:
        pytest.skip("root is needed")
    folder = Path(tempfile.mkdtemp(prefix="sortline-base-"))
    try:
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(folder)],
            check=True,
            capture_output=True,
            timeout=900,
        )
        container = buildah("from", "scratch").strip()
        buildah("copy", container, folder, "/")
        buildah("commit", "--rm", container, "sortline-test-base")
        yield "localhost/sortline-test-base"
        for name in (*NAMES, "base"):
            buildah("rmi", "--force", f"localhost/sortline-test-{name}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.images
@pytest.mark.parametrize("path", DOCKERFILES, ids=role)
def test_the_image_builds_without_a_registry_and_runs_unprivileged(path: Path, base: str, kit: Path) -> None:
    image = f"sortline-test-{role(path)}"
    buildah(
        "bud",
        "--isolation",
        "chroot",
        "--pull-never",
        "--format",
        "docker",  # the other one has no health check
        "--build-arg",
        f"BASE={base}",
        "--file",
        path,
        "--tag",
        image,
        kit,
    )
    container = buildah("from", "--pull-never", f"localhost/{image}").strip()
    try:

        def run(*command: str) -> str:
            return buildah("run", "--isolation", "chroot", container, "--", *command)

        program = f"/usr/local/bin/{NAMES[role(path)]}"
        assert "usage" in run(program, "--help").lower()
        uid = dict(instructions(path))["USER"].partition(":")[0]
        assert run("id", "-u").strip() == uid
        config = f"/etc/sortline/{role(path)}.toml"
        assert "state_dir" in run(program, "config", "show", "--config", config) or role(path) == "control-plane"
        assert (
            run("sh", "-c", "touch /opt/sortline/x 2>/dev/null; test ! -e /opt/sortline/x && echo refused").strip()
            == "refused"
        )
    finally:
        buildah("rm", container)
