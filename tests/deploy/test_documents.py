"""README and docs: commands exist, links lead somewhere, tables of rooms are those of the tree."""

import re
import shlex
from pathlib import Path

import pytest

from edge_agent.cli.commands import _parser
from tests.deploy.test_units import check_sortline
from tests.test_architecture import LAYERS

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[list[str]]:
    """Every call of one of the two commands in the code blocks of a document."""
    found = []
    for block in SHELL.findall(document.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            text = re.sub(r"(^|\s)#.*$", "", line)
            for part in re.split(r"&&|\|", text):
                words = without_prefix(shlex.split(part))
                if words and words[0] in {"sortline", "sortline-agent"}:
                    found.append(words)
    return found


def without_prefix(words: list[str]) -> list[str]:
    """A call without what runs it: another account, a container, variables set for it alone."""
    if words[:1] == ["sudo"]:
        words = words[3:] if words[1:2] == ["-u"] else words[1:]
    if words[:2] == ["docker", "compose"] and "exec" in words:
        words = words[words.index("exec") + 2 :]
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def slug(heading: str) -> str:
    """The anchor of a heading, as the usual renderers make it."""
    bare = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return bare.replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_a_code_block_parses(document: Path) -> None:
    for program, *words in commands(document):
        if program == "sortline":
            check_sortline(words)
        elif words:
            _parser().parse_args(words)


def test_there_are_commands_to_check() -> None:
    assert len(commands(ROOT / "README.md")) >= 20
    assert len(commands(ROOT / "docs" / "install.md")) >= 12


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{document.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_of_the_sources_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:models|edge_agent|control_plane|deploy|tests|benchmarks|docs)/[\w./@-]+)`", text):
        assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_every_test_that_the_page_of_situations_names_exists() -> None:
    sources: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        sources[path.name] = sources.get(path.name, "") + path.read_text(encoding="utf-8")
    text = (ROOT / "docs" / "field.md").read_text(encoding="utf-8")
    named, file = 0, ""
    for other, test in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", text):
        file = other or file
        if test:
            assert f"def {test}(" in sources[file], f"{file} has no {test}"
            named += 1
    assert named >= 40


def test_the_architecture_page_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package, layers in LAYERS.items():
        section = text.partition(f"**`{package}`**")[2].partition("\n**`")[0]
        named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\|.*$", section, re.MULTILINE))))
        rooms = {room for layer in layers for room in layer} - {"__main__"}
        assert named == rooms, f"{package}: {sorted(named ^ rooms)}"


def test_the_first_screen_answers_five_questions() -> None:
    """The first forty lines say what it is, for whom, why not the alternatives, and hold a picture and two commands."""
    screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40])
    assert "visual sorting lines" in screen
    assert "For packing houses" in screen
    for other in ("Greengrass", "Mender", "hawkBit", "vision platforms", "closed"):
        assert other in screen
    picture = re.search(r"!\[[^\]]+\]\(([^)]+)\)", screen)
    assert picture is not None
    assert (ROOT / picture[1]).stat().st_size < 200_000
    assert re.findall(r"^make \w+", screen, re.MULTILINE) == ["make demo", "make test"]
