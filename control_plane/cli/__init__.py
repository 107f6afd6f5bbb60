"""The `sortline` command. Data on standard output, everything else on standard error.

Exit status: 0 ok, 1 failed, 2 wrong usage or configuration, 3 refused, 4 not reachable, 130 interrupted. Heavy
libraries are imported by the commands that need them, so that `--help` is quick.

One file per noun: `serve` (control plane, worker, demo), `train` (and import), `evaluate` (and quantise), `datasets`,
`models`, `agents`, `alarms`, `rollouts`, `recipes`, `bundles`, `keys`, `ca`, `broker`, `config`, `backup` (and
restore). `output` is the one door to the terminal.
"""

import errno
import os
import sys

import typer

from control_plane.cli.agents import agents, export
from control_plane.cli.alarms import alarms
from control_plane.cli.backup import backup, restore
from control_plane.cli.broker import broker
from control_plane.cli.bundles import bundles
from control_plane.cli.ca import authority
from control_plane.cli.config import settings
from control_plane.cli.datasets import datasets
from control_plane.cli.evaluate import evaluate, quantise
from control_plane.cli.keys import keys
from control_plane.cli.models import models
from control_plane.cli.output import warn
from control_plane.cli.recipes import recipes
from control_plane.cli.rollouts import rollouts
from control_plane.cli.serve import demo, serve, worker
from control_plane.cli.train import import_onnx, train
from models.errors import CapacityError, ConfigError, ConflictError, InputError, SortlineError, UnavailableError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Train, register and roll out models for visual sorting lines, and watch the fleet.

    **Try it:** `sortline demo` · **Train alone:** `sortline train --data DIR --name apples --output BUNDLE`

    **Serve on this machine:** `sortline keys init --development`, `sortline ca init`, `sortline broker run`, and in
    another terminal `SORTLINE__BROKER__TLS=true SORTLINE__BROKER__PORT=8883 sortline serve`""",
)
for command in (serve, worker, demo, train, evaluate, quantise, export, backup, restore):
    app.command()(command)
app.command("import-onnx")(import_onnx)
for name, group in (
    ("datasets", datasets),
    ("models", models),
    ("recipe", recipes),
    ("rollouts", rollouts),
    ("agents", agents),
    ("alarms", alarms),
    ("keys", keys),
    ("bundle", bundles),
    ("broker", broker),
    ("ca", authority),
    ("config", settings),
):
    app.add_typer(group, name=name)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    try:
        # A command that ends with an exit status returns it here; the others return nothing.
        return int(app(args=argv, standalone_mode=False) or 0)
    except SortlineError as error:
        return _complain(error)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader of a pipe (`| head`) is gone; the interpreter must not try to flush into it when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _complain(_of_the_system(error))
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()  # a usage error of the command line itself
        return 2


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def _of_the_system(error: OSError) -> SortlineError:
    """Returns an error of the operating system as one of ours: which file, and what is the matter with it."""
    where = f"{error.filename}" if error.filename else "A file"
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return CapacityError("disk.full", f"{where} cannot be written: the disk is full.", got=reason)
    if error.errno in _DENIED:
        return InputError("file.denied", f"{where} cannot be read or written.", expected="permission", got=reason)
    return InputError("file.unusable", f"{where} cannot be used.", got=reason)


_EXIT = ((ConfigError, 2), (UnavailableError, 4), (ConflictError, 3))


def _complain(error: SortlineError) -> int:
    warn(error.code, str(error))
    return next((status for family, status in _EXIT if isinstance(error, family)), 1)
