"""The `sortline` command. Data on standard output, everything else on standard error.

Exit status: 0 ok, 1 failed, 2 wrong usage or configuration, 3 refused, 4 not reachable, 130 interrupted. Heavy
libraries are imported by the commands that need them, so that `--help` is quick. A group of commands has a module.
"""

import typer

from control_plane.cli import identity, keys, learning, operating, serving
from control_plane.cli.bundles import bundles
from control_plane.cli.output import err
from control_plane.cli.recipe import recipes
from control_plane.cli.rollouts import rollouts
from models.errors import ConfigError, ConflictError, SortlineError, UnavailableError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Train, register and roll out models for visual sorting lines, and watch the fleet.

    **Try it:** `sortline demo` · **Train alone:** `sortline train --data DIR --name apples --output BUNDLE` ·
    **Serve:** `sortline keys init`, `sortline broker add agent-1`, `sortline broker run`, `sortline serve`""",
)
for command in (serving.serve, serving.worker, serving.demo, learning.train, learning.evaluate, learning.quantise):
    app.command()(command)
app.command("import-onnx")(learning.import_onnx)
app.command()(keys.export)
operating.models.command()(keys.release)
operating.models.command()(keys.withdraw)
for name, group in (
    ("datasets", operating.datasets),
    ("models", operating.models),
    ("recipe", recipes),
    ("rollouts", rollouts),
    ("agents", operating.agents),
    ("keys", keys.keys),
    ("bundle", bundles),
    ("broker", serving.broker),
    ("ca", identity.authority),
    ("config", operating.settings),
):
    app.add_typer(group, name=name)


def main(argv: list[str] | None = None) -> int:
    """Entry of the command; returns the exit status."""
    try:
        # A command that ends with an exit status hands it back here; the others return nothing.
        return int(app(args=argv, standalone_mode=False) or 0)
    except SortlineError as error:
        return _complain(error)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()  # a usage error of the command line itself
        return 2


_EXIT = ((ConfigError, 2), (UnavailableError, 4), (ConflictError, 3))


def _complain(error: SortlineError) -> int:
    err.print(f"[bold red]{error.code}[/]: {error}", highlight=False, soft_wrap=True)
    return next((status for family, status in _EXIT if isinstance(error, family)), 1)
