"""The one door to the terminal: foreign text is no markup, data is data, options of several commands are objects."""

import ast
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer

import control_plane.cli
from control_plane.cli import main
from control_plane.cli.output import facts_of, note, say, show, table_of, warn, with_options
from models.errors import InputError

CLI = Path(control_plane.cli.__file__).parent
NASTY = "photos [old] [/old] http://[fe80::1]:1 \x1b[31mred\x1b[0m :apple: [link=x]y[/link]"
SHOWN = "photos [old] [/old] http://[fe80::1]:1 \\x1b[31mred\\x1b[0m :apple: [link=x]y[/link]"


def test_no_other_file_of_the_command_line_writes_to_a_console() -> None:
    for path in CLI.glob("*.py"):
        if path.name == "output.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.module == "rich.console"), path
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"print", "typer.echo", "typer.secho", "sys.stdout.write"}, (path, node.lineno)


@pytest.mark.parametrize("door", [note, show, lambda text: warn("code", text)])
def test_foreign_text_is_shown_as_it_is(door, capsys) -> None:
    door(NASTY)
    captured = capsys.readouterr()
    assert SHOWN in captured.out + captured.err
    assert "\x1b" not in captured.out + captured.err


def test_foreign_text_in_tables_is_shown_as_it_is(capsys) -> None:
    show(table_of(["why"], [[NASTY]]), facts_of({"fault": {"message": NASTY}, "empty": {}, "list": [1, 2]}))
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 2
    assert "fault.message" in out
    assert "1, 2" in out


def test_a_long_digest_stays_on_one_line(capsys) -> None:
    digest = "0123456789abcdef" * 4
    show(f"bundle {digest}", table_of(["digest", "again"], [[digest, digest]]))
    assert capsys.readouterr().out.count(digest) == 3


def test_json_comes_only_where_it_is_asked_for(capsys) -> None:
    value = {"name": NASTY, "n": 1}
    say(value, as_json=True)
    assert json.loads(capsys.readouterr().out) == value
    say(value, as_json=False)
    with pytest.raises(json.JSONDecodeError):
        json.loads(capsys.readouterr().out)


def test_an_error_of_a_user_text_is_one_line_with_its_code(tmp_path: Path, capsys) -> None:
    assert (
        main(["train", "--data", str(tmp_path / "photos [/old]"), "--name", "x", "--output", str(tmp_path / "o")]) == 1
    )
    err = capsys.readouterr().err
    assert "photos [/old]" in err
    assert "dataset.missing" in err
    assert "Traceback" not in err


def test_an_error_names_only_what_is_known() -> None:
    assert str(InputError("a.b", "No.", got=3)) == "No. (got 3)"
    assert str(InputError("a.b", "No.", expected=2)) == "No. (expected 2)"
    assert str(InputError("a.b", "No.", expected=2, got=3)) == "No. (expected 2, got 3)"
    assert str(InputError("a.b", "No.")) == "No."


@dataclass(frozen=True)
class Options:
    name: Annotated[str, typer.Option(help="Name.")]
    size: Annotated[int, typer.Option(help="Size.")] = 3


def test_options_of_a_group_reach_the_command_as_one_object() -> None:
    seen = []

    @with_options
    def command(where: Annotated[str, typer.Argument()], options: Options, quick: bool = False) -> None:
        seen.append((where, options, quick))

    assert list(inspect.signature(command).parameters) == ["where", "name", "size", "quick"]
    app = typer.Typer()
    app.command()(command)
    app(["here", "--name", "x", "--quick"], standalone_mode=False)
    assert seen == [("here", Options("x", 3), True)]


def test_every_command_and_every_option_has_a_full_sentence(capsys) -> None:
    click_app = typer.main.get_command(control_plane.cli.app)
    poor = []

    def walk(command, path: str) -> None:
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{path} {name}")
        for param in command.params:
            if param.name == "help":
                continue
            text = getattr(param, "help", None) or ""
            if not text.endswith((".", ")")) or not (text[0].isupper() or text[0] in "`'."):
                poor.append(f"{path} {param.name}: {text}")
        if not (command.help or "").strip():
            poor.append(path)

    walk(click_app, "sortline")
    assert not poor
