"""install.sh in a fresh root folder: installed without network, run by other accounts, killed, upgraded, removed."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.conftest import PYTHON
from tests.simulators.processes import free_port, running, wait_until
from tests.simulators.tiny_bundle import tiny_bundle

ROOT = Path(__file__).parents[2]
INSTALL, KIT = ROOT / "deploy" / "install.sh", ROOT / "deploy" / "kit.sh"
AGENT, PLANE = "nobody", "daemon"
CONFINED = """
import ctypes, os, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE: what MemoryDenyWriteExecute=yes asks for
    sys.stderr.write("this kernel has no PR_SET_MDWE\\n")
os.umask(0o077)
os.execv(sys.argv[1], sys.argv[1:])
"""


def install(*arguments: object, status: int = 0, network: bool = True) -> str:
    command = ["bash", str(INSTALL), *(str(argument) for argument in arguments)]
    if not network:
        command = ["unshare", "--net", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def as_user(name: str, *command: object) -> list[str]:
    """A command as the unit would run it: another account, no way to more rights, no memory both written and run."""
    rights = [f"--reuid={name}", f"--regid={name if name != 'nobody' else 'nogroup'}", "--clear-groups"]
    confined = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", PYTHON, "-c", CONFINED]
    return ["setpriv", *rights, *confined, *(str(word) for word in command)]


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*")) if "__pycache__" not in str(path)}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", str(INSTALL), str(KIT)], capture_output=True, text=True, check=False)
    assert not done.stdout
    assert done.returncode == 0


def test_a_dry_run_changes_nothing_and_says_what_it_would_do(tmp_path: Path) -> None:
    root = tmp_path / "root"
    said = install("agent", "--root", root, "--dry-run")
    assert not root.exists()
    assert f"would write: {root}/etc/systemd/system/sortline-agent.service" in said
    assert "--require-hashes" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage:"),
        (["everything"], "usage:"),
        (["agent", "--rot", "/x"], "unknown option --rot"),
        (["agent", "--root"], "--root needs a value"),
        (["agent", "--wheelhouse", "/not/there"], "there is no folder /not/there"),
        (["agent", "--root", "/tmp/none", "--dry-run", "--python", "no-such-python"], "there is no no-such-python"),
        (["rollback", "agent", "--root", "/tmp/none", "--dry-run"], "there is no release before this one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_call_says_what_is_wrong(arguments: list[str], said: str) -> None:
    status = 2 if said == "usage:" else 1
    assert said in install(*arguments, status=status)


@pytest.fixture
def root() -> Iterator[Path]:
    """A fresh root folder that other accounts may pass through."""
    folder = Path(tempfile.mkdtemp(prefix="sortline-root-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


class Site:
    """The installed control plane, with free ports, run by another account."""

    def __init__(self, root: Path) -> None:
        self.root, self.data = root, root / "var/lib/sortline"
        self.http, self.mqtt, self.enrolment = free_port(), free_port(), free_port()
        names = {"SERVER__PORT": self.http, "BROKER__PORT": self.mqtt, "IDENTITY__PORT": self.enrolment}
        clean = {name: text for name, text in os.environ.items() if not name.startswith("SORTLINE")}
        self.environment = clean | {f"SORTLINE__{name}": str(value) for name, value in names.items()}
        self.environment |= {"HOME": str(self.data), "SORTLINE_URL": f"http://127.0.0.1:{self.http}"}

    def command(self, *words: object) -> list[str]:
        return as_user(PLANE, self.root / "opt/sortline/control-plane/bin/sortline", *words)

    def run(self, *words: object, given: str | None = None) -> str:
        done = subprocess.run(
            self.command(*words),
            env=self.environment,
            cwd=self.data,
            capture_output=True,
            text=True,
            check=False,
            input=given,
            timeout=180,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def config(self) -> list[object]:
        return ["--config", self.root / "etc/sortline/control-plane.toml"]

    @contextlib.contextmanager
    def started(self, log: Path) -> Iterator[None]:
        """Broker and server; the server first, which waits for its broker."""
        options = {"env": self.environment, "cwd": self.data}
        broker = ["broker", "run", *self.config, "--host", "127.0.0.1", "--port", self.mqtt]
        with (
            log.open("w") as stream,
            running(self.command("serve", *self.config), stderr=stream, stdout=stream, **options),
            running(self.command(*broker), stderr=stream, stdout=stream, **options),
        ):
            wait_until(self.ready, f"the control plane, see {log.read_text(encoding='utf-8')[-500:]}")
            yield

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/readyz", timeout=20) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def agents(self) -> list[dict]:
        return json.loads(self.run("agents", "list", "--json"))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="other accounts are needed: run as root")
def test_installed_started_killed_upgraded_rolled_back_and_removed(kit: Path, root: Path, tmp_path: Path) -> None:
    common = ["--root", root, "--wheelhouse", kit / "wheelhouse", "--python", PYTHON]
    install("control-plane", *common, "--user", PLANE, network=False)
    said = install("agent", *common, "--user", AGENT, network=False)
    assert "is installed" in said
    binaries = root / "opt/sortline/agent/bin"
    first = binaries.parent.resolve()

    # Again: nothing changes.
    before = tree(root / "opt")
    assert "is there already" in install("agent", *common, "--user", AGENT, network=False)
    assert tree(root / "opt") == before

    # A box has the agent alone, and says so.
    done = subprocess.run([binaries / "sortline", "serve"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "sortline-agent" in done.stderr
    assert not list(first.rglob("sklearn")), "the agent's lock has no training in it"
    unit = (root / "etc/systemd/system/sortline-agent.service").read_text(encoding="utf-8")
    assert f"ExecStart={binaries}/sortline-agent run --config {root}/etc/sortline/agent.toml" in unit
    assert f"User={AGENT}" in unit

    site = Site(root)
    site.run("ca", "init", *site.config)
    site.run("keys", "init", "--development", "--trust", site.data / "trust")
    bundle = tmp_path / "bundle"
    digest = tiny_bundle(bundle).digest
    shared = root / "srv"
    shutil.copytree(bundle, shared)
    agent_data, config = root / "var/lib/sortline-agent", root / "etc/sortline/agent.toml"
    environment = {name: text for name, text in os.environ.items() if not name.startswith("SORTLINE")}
    environment |= {"HOME": str(agent_data)}
    options = {"env": environment, "cwd": agent_data, "stderr": subprocess.STDOUT}

    def agent(*words: object) -> list[str]:
        return as_user(AGENT, binaries / "sortline-agent", *words, "--config", config)

    def judges() -> bool:
        """The line has judged items with the bundle in the last windows."""
        return any(digest.startswith(one.get("active") or "-") and one.get("items_per_s") for one in site.agents())

    with site.started(tmp_path / "plane.log"), (tmp_path / "agent.log").open("w") as log:
        token = site.run("agents", "enrol", "line-1")
        enrol = agent("enrol", "--token", "-", "--control-plane", f"https://127.0.0.1:{site.enrolment}")
        subprocess.run(enrol, input=token, text=True, check=True, env=environment, cwd=agent_data, timeout=120)
        site.run("models", "push", shared)
        name = json.loads(site.run("models", "list", "--json"))[0]["name"]
        site.run("models", "release", name, "--key", site.data / "trust/development/release.pem")

        with running(agent("run"), stdout=log, **options) as supervisor:
            wait_until(lambda: any(one["state"] != "never seen" for one in site.agents()), "the agent")
            site.run("rollouts", "create", "--model", name, "--wave", "100%", "--trial-items", "5", "--yes")
            wait_until(judges, "judged items")
            supervisor.kill()
            supervisor.wait(30)
        # The line sorts on without its supervisor; the next one takes over.
        with running(agent("run"), stdout=log, **options):
            wait_until(judges, "its return")

        # Another release beside the first: the link changes, and what ran keeps its files until it is restarted.
        said = install("agent", *common, "--user", AGENT, "--with-devices", network=False)
        second = binaries.parent.resolve()
        assert second != first
        assert f"before: {first.name}" in said
        assert first.exists()
        with running(agent("run"), stdout=log, **options):
            wait_until(judges, "the upgraded agent")
        text = (tmp_path / "agent.log").read_text(encoding="utf-8")
        assert "Traceback" not in text, text[-3000:]

    assert first.name in install("rollback", "agent", "--root", root)
    assert binaries.parent.resolve() == first
    assert not list((root / "var/lib").rglob(".cache")), "nothing is written under HOME's cache"

    install("uninstall", "agent", "--root", root)
    assert not (root / "opt/sortline/agent").exists()
    assert not first.exists()
    assert not second.exists()
    assert (agent_data / "identity").is_dir(), "configuration and data stay"
    assert config.exists()
    install("uninstall", "agent", "--root", root, "--purge")
    assert not agent_data.exists()
    assert not config.exists()
    install("uninstall", "control-plane", "--root", root, "--purge")
    left = [path for path in root.rglob("*") if path.is_file() and path.parent != shared]
    assert not left
