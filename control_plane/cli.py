"""The `sortline` command. Data on standard output, everything else on standard error.

Exit status: 0 ok, 1 failed, 2 wrong usage or configuration, 3 refused, 4 not reachable, 130 interrupted. Heavy
libraries are imported by the commands that need them, so that `--help` is quick.
"""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from control_plane.client import Client
from control_plane.config import load_control_plane_config
from models.errors import ConfigError, ConflictError, SortlineError, UnavailableError

err = Console(stderr=True)
out = Console()
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Train, register and roll out models for visual sorting lines, and watch the fleet.

    **Try it:** `sortline demo` · **Train alone:** `sortline train --data DIR --name apples --output BUNDLE` ·
    **Serve:** `sortline broker add agent-1`, `sortline broker run`, `sortline serve`""",
)
datasets = typer.Typer(no_args_is_help=True, help="Folders of labelled photographs.")
models = typer.Typer(no_args_is_help=True, help="Models and their versions.")
rollouts = typer.Typer(no_args_is_help=True, help="Bring a version to agents, wave by wave.")
agents = typer.Typer(no_args_is_help=True, help="The fleet.")
bundles = typer.Typer(no_args_is_help=True, help="Bundles on disk.")
broker = typer.Typer(no_args_is_help=True, help="The embedded MQTT broker and its identities.")
settings = typer.Typer(no_args_is_help=True, help="Configuration.")
for name, group in (
    ("datasets", datasets),
    ("models", models),
    ("rollouts", rollouts),
    ("agents", agents),
    ("bundle", bundles),
    ("broker", broker),
    ("config", settings),
):
    app.add_typer(group, name=name)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Server = Annotated[str, typer.Option("--server", envvar="SORTLINE_URL", help="URL of the control plane.")]
Config = Annotated[Path | None, typer.Option("--config", help="TOML; SORTLINE__SECTION__KEY overrides it.")]


def _say(value: Any, *, as_json: bool, table: Callable[[Any], Table] | None = None) -> None:
    if as_json or table is None:
        sys.stdout.write(json.dumps(value, indent=None if as_json else 2, default=str) + "\n")
    else:
        out.print(table(value))


def _table(columns: list[str], rows: list[list[Any]]) -> Table:
    found = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        found.add_column(column)
    for row in rows:
        found.add_row(*("-" if cell is None else str(cell) for cell in row))
    return found


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=err,
        transient=False,
        disable=not sys.stderr.isatty(),
    )


# -- serving ----------------------------------------------------------------------------------------------------------


@app.command()
def serve(
    config: Config = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 chooses a free one.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Database, store, jobs.")] = None,
) -> None:
    """Run the control plane: API, pages, rollouts, worker processes."""
    from control_plane.serving import serve as run  # noqa: PLC0415

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    server = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    overrides: dict[str, Any] = {"server": server} if server else {}
    if data_dir is not None:
        overrides["data_dir"] = data_dir
    raise typer.Exit(run(load_control_plane_config(config, overrides)))


@app.command()
def worker(config: Config = None) -> None:
    """Run one worker process for training jobs, here or on another machine with the same database and data."""
    from control_plane.serving import work  # noqa: PLC0415

    work(load_control_plane_config(config))


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(help="End by itself after so long with sorting; 0 = until Ctrl-C.")] = 0.0,
    report: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    port: Annotated[int, typer.Option(help="Of the pages; 0 chooses a free one.")] = 8080,
    agents: Annotated[int, typer.Option(help="Edge agents.")] = 3,
    lanes: Annotated[int, typer.Option(help="Lanes of each line.")] = 2,
    items_per_s: Annotated[float, typer.Option(help="Items per second and lane.")] = 9.0,
    items: Annotated[int, typer.Option(help="Items collected for training.")] = 600,
    data_dir: Annotated[Path | None, typer.Option(help="Keep everything here instead of a temporary folder.")] = None,
) -> None:
    """The whole loop on this machine: train, push, sort, watch."""
    from control_plane.demo import DemoOptions, run_demo  # noqa: PLC0415

    options = DemoOptions(
        seconds=seconds,
        report=report,
        port=port,
        agents=agents,
        lanes=lanes,
        items_per_s=items_per_s,
        items=items,
        data_dir=data_dir,
    )
    raise typer.Exit(run_demo(options))


@broker.command("run")
def broker_run(
    credentials: Annotated[Path, typer.Option(help="File with identities (`sortline broker add`).")],
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 1883,
) -> None:
    """Run the embedded broker (MQTT 3.1.1). For a fleet of many boxes use mosquitto, EMQX or HiveMQ."""
    from control_plane.broker.__main__ import main as run  # noqa: PLC0415

    raise typer.Exit(run(["--host", host, "--port", str(port), "--credentials", str(credentials)]))


@broker.command("add")
def broker_add(
    identity: Annotated[str, typer.Argument(help="Agent id, or `control-plane`.")],
    credentials: Annotated[Path, typer.Option(help="File with identities; made when it is not there.")],
    password_file: Annotated[Path, typer.Option(help="Gets the new password; give it to that agent alone.")],
) -> None:
    """Add or renew an identity; its password is random and written once."""
    from control_plane.broker.access import Role, add_identity  # noqa: PLC0415
    from models.files import write_atomically  # noqa: PLC0415
    from models.messages import check_agent_id  # noqa: PLC0415

    role = Role.CONTROL_PLANE if identity == "control-plane" else Role.AGENT
    password = add_identity(credentials, check_agent_id(identity), role)
    write_atomically(password_file, password.encode(), mode=0o600)
    err.print(f"{identity} may connect as {role}; its password is in {password_file}")


@broker.command("remove")
def broker_remove(identity: str, credentials: Annotated[Path, typer.Option()]) -> None:
    """Remove an identity; a running broker drops its connections within a second."""
    from control_plane.broker.access import remove_identity  # noqa: PLC0415

    remove_identity(credentials, identity)


# -- learning ---------------------------------------------------------------------------------------------------------


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Folder with labels.csv, or one folder per class.")],
    name: Annotated[str, typer.Option(help="Name of the model.")],
    output: Annotated[Path | None, typer.Option(help="Write the bundle here, without a control plane.")] = None,
    effort: Annotated[str, typer.Option(help="quick or standard.")] = "standard",
    folds: Annotated[int, typer.Option(min=2, max=50, help="Of the cross-validation by item.")] = 5,
    seed: Annotated[int, typer.Option()] = 1,
    good_class: Annotated[str, typer.Option(help="Empty = sound, good or ok.")] = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Train a model from labelled photographs: cross-validate by item, convert, check parity, make a bundle.

    Example: `sortline train --data photos --name apples --output apples-bundle`
    """
    if output is not None:
        summary = _train_alone(data, output, name=name, effort=effort, folds=folds, seed=seed, good_class=good_class)
    else:
        client = Client(server)
        client.post("/api/v1/datasets", {"name": name, "root": str(data.resolve()), "actor": "cli"})
        body = {"dataset": name, "name": name, "effort": effort, "folds": folds, "seed": seed, "actor": "cli"}
        job = client.post("/api/v1/training-runs", body | {"good_class": good_class})
        summary = _follow(client, job["id"])
    _say(summary, as_json=as_json, table=_metrics_table)


def _train_alone(data: Path, output: Path, **options: Any) -> dict[str, Any]:
    from control_plane.training import pipeline  # noqa: PLC0415

    with _bar() as bar:
        task = bar.add_task("starting", total=1.0)
        trained = pipeline.train(
            data,
            pipeline.TrainSettings(**options),
            output,
            progress=lambda stage, share: bar.update(task, description=stage, completed=share),
        )
    return trained.summary()


def _follow(client: Client, job_id: int) -> dict[str, Any]:
    """Shows a job until it ends; Ctrl-C asks the server to cancel it."""
    with _bar() as bar:
        task = bar.add_task("waiting", total=1.0)
        try:
            job = client.follow_job(
                job_id, lambda j: bar.update(task, description=j["stage"] or j["state"], completed=j["progress"])
            )
        except KeyboardInterrupt:
            client.post(f"/api/v1/jobs/{job_id}/cancel", {"actor": "cli"})
            raise
    if job["state"] != "succeeded":
        error = job["error"] or {"code": f"job.{job['state']}", "message": f"The job was {job['state']}."}
        raise ConflictError(error["code"], error["message"], expected=error.get("expected"), got=error.get("got"))
    return dict(job["result"])


def _metrics_table(summary: dict[str, Any]) -> Table:
    rows = []
    for level in ("view", "item"):
        for metric, value in summary.get("metrics", {}).get(level, {}).items():
            if isinstance(value, dict) and value.get("value") is not None:
                low, high = value.get("low"), value.get("high")
                interval = f"{low:.3f} to {high:.3f}" if low is not None else value.get("reason", "")
                rows.append([level, metric.replace("_", " "), f"{value['value']:.3f}", interval])
    table = _table(["level", "metric", "value", "95 % interval over items"], rows)
    table.caption = f"bundle {summary.get('bundle', '')}"
    return table


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Option(help="Directory of the bundle.")],
    data: Annotated[Path, typer.Option(help="Labelled folder, as for training.")],
    exclude_doubt: Annotated[bool, typer.Option(help="Leave out views whose label is in doubt.")] = False,
    good_class: Annotated[str, typer.Option()] = "",
    as_json: AsJson = False,
) -> None:
    """Judge a labelled folder with a bundle exactly as an agent would; metrics per view and per item."""
    from control_plane.training.evaluation import evaluate as run  # noqa: PLC0415

    with _bar() as bar:
        task = bar.add_task("judging", total=1.0)
        report = run(
            bundle,
            data,
            exclude_doubt=exclude_doubt,
            good_class=good_class,
            progress=lambda share: bar.update(task, completed=share),
        )
    _say(report, as_json=as_json, table=_metrics_table)


@app.command("import-onnx")
def import_onnx(
    model: Annotated[Path, typer.Argument(help="An .onnx file, for example exported from PyTorch.")],
    name: Annotated[str, typer.Option(help="Name of the model.")],
    classes: Annotated[str, typer.Option(help="Class names in the model's order, comma separated.")],
    data: Annotated[Path, typer.Option(help="Labelled folder: golden views, reference and metrics come from it.")],
    inputs: Annotated[
        str, typer.Option(help="layout,channels of the image input: nchw,rgb · nchw,bgr · nhwc,rgb · nhwc,bgr")
    ] = "nchw,rgb",
    mean: Annotated[str, typer.Option(help="Subtracted after scaling, per channel.")] = "0,0,0",
    std: Annotated[str, typer.Option(help="Divided by, per channel.")] = "1,1,1",
    scale: Annotated[float, typer.Option(help="Pixels are multiplied by this first; 1/255 = 0.00392157.")] = 1 / 255,
    view_px: Annotated[int, typer.Option(help="Side of the model's input.")] = 64,
    logits: Annotated[bool, typer.Option(help="The output is logits, not probabilities.")] = True,
    good_class: Annotated[str, typer.Option()] = "",
    output: Annotated[Path | None, typer.Option(help="Write the bundle here, without a control plane.")] = None,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Make a bundle from a model trained elsewhere, with the same checks and golden views."""
    layout, _, channels = inputs.partition(",")
    options: dict[str, Any] = {
        "name": name,
        "classes": [c.strip() for c in classes.split(",")],
        "good_class": good_class,
        "view_px": view_px,
        "layout": layout,
        "channels": channels or "rgb",
        "scale": scale,
        "mean": [float(v) for v in mean.split(",")],
        "std": [float(v) for v in std.split(",")],
        "logits": logits,
        "data": str(data.resolve()),
    }
    if output is None:
        client = Client(server)
        body = {"path": str(model.resolve()), "settings": options, "actor": "cli"}
        _say(_follow(client, client.post("/api/v1/imports", body)["id"]), as_json=as_json)
        return
    from control_plane.training import importing  # noqa: PLC0415

    bundle = importing.import_onnx(model, importing.ImportSettings(**options), output)
    _say({"bundle": bundle.digest, "directory": str(output)}, as_json=as_json)


# -- bundles ----------------------------------------------------------------------------------------------------------


@bundles.command("show")
def bundle_show(directory: Path, as_json: AsJson = False) -> None:
    """Verify a bundle and say what is in it."""
    import msgspec  # noqa: PLC0415

    from models.bundle import read_bundle  # noqa: PLC0415

    bundle = read_bundle(directory)
    facts = {
        "digest": bundle.digest,
        "name": bundle.manifest.name,
        "size_bytes": bundle.manifest.size_bytes,
        "files": {entry.path: entry.size_bytes for entry in bundle.manifest.files},
        "preprocess": msgspec.to_builtins(bundle.preprocess),
        "recipe": msgspec.to_builtins(bundle.recipe),
        "lineage": bundle.lineage,
    }
    _say(facts, as_json=as_json)


@bundles.command("verify")
def bundle_verify(directory: Path) -> None:
    """Verify every file and reproduce the golden views on this machine."""
    from models.bundle import read_bundle  # noqa: PLC0415
    from models.classifier import OnnxClassifier  # noqa: PLC0415

    bundle = read_bundle(directory)
    difference = bundle.golden.check(OnnxClassifier(bundle.model))
    err.print(f"{bundle.digest} is whole; golden views reproduce within {difference:.2g}")


@bundles.command("pack")
def bundle_pack(directory: Path, archive: Path) -> None:
    """Pack a bundle into a tar."""
    from models.bundle import pack, read_bundle  # noqa: PLC0415
    from models.files import write_atomically  # noqa: PLC0415

    read_bundle(directory)
    write_atomically(archive, pack(directory))


@bundles.command("unpack")
def bundle_unpack(archive: Path, directory: Path) -> None:
    """Unpack and verify a tar."""
    from models.bundle import unpack  # noqa: PLC0415

    err.print(unpack(archive.read_bytes(), directory).digest)


# -- operating --------------------------------------------------------------------------------------------------------


@datasets.command("list")
def dataset_list(server: Server = "", as_json: AsJson = False) -> None:
    """All data sets."""
    found = Client(server).get("/api/v1/datasets")
    _say(
        found,
        as_json=as_json,
        table=lambda rows: _table(
            ["name", "folder", "versions"], [[r["name"], r["root"], len(r["versions"])] for r in rows]
        ),
    )


@datasets.command("add")
def dataset_add(name: str, root: Path, server: Server = "", as_json: AsJson = False) -> None:
    """Register a folder."""
    body = {"name": name, "root": str(root.resolve()), "actor": "cli"}
    _say(Client(server).post("/api/v1/datasets", body), as_json=as_json)


@models.command("list")
def model_list(server: Server = "", as_json: AsJson = False) -> None:
    """All models and versions."""

    def table(found: list[dict[str, Any]]) -> Table:
        rows = [
            [f"{m['name']}:{v['number']}", v["stage"], v["bundle"][:12], v["size_bytes"] // 1024, v["created_at"][:16]]
            for m in found
            for v in m["versions"]
        ]
        return _table(["version", "stage", "bundle", "KB", "made"], rows)

    _say(Client(server).get("/api/v1/models"), as_json=as_json, table=table)


@models.command("show")
def model_show(reference: str, server: Server = "", as_json: AsJson = False) -> None:
    """One version: NAME, NAME:NUMBER or a bundle digest."""
    _say(Client(server).get(f"/api/v1/versions/{reference}"), as_json=as_json)


@models.command("stage")
def model_stage(reference: str, stage: str, reason: Annotated[str, typer.Option()], server: Server = "") -> None:
    """Move a version to none, staging, production or archived."""
    body = {"stage": stage, "reason": reason, "actor": "cli"}
    _say(Client(server).post(f"/api/v1/versions/{reference}/stage", body), as_json=False)


@models.command("push")
def model_push(directory: Path, server: Server = "", as_json: AsJson = False) -> None:
    """Register a bundle from disk."""
    from models.bundle import pack, read_bundle  # noqa: PLC0415

    read_bundle(directory)
    _say(Client(server).post("/api/v1/versions?actor=cli", content=pack(directory)), as_json=as_json)


@rollouts.command("create")
def rollout_create(
    model: Annotated[str, typer.Option(help="NAME, NAME:VERSION or a bundle digest.")],
    selector: Annotated[list[str] | None, typer.Option(help="Label that agents must have, KEY=VALUE.")] = None,
    wave: Annotated[list[str] | None, typer.Option(help="Size of a wave: 3 or 50%; again for the next.")] = None,
    trial_items: Annotated[int, typer.Option(help="Items the bundle must judge before an agent commits it.")] = 50,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Start a rollout: `sortline rollouts create --model apples --selector site=north --wave 1 --wave 100%`."""
    labels = dict(pair.split("=", 1) for pair in selector or [] if "=" in pair)
    body = {
        "model": model,
        "selector": labels,
        "waves": wave or ["100%"],
        "trial_items": trial_items,
        "actor": "cli",
    }
    _say(Client(server).post("/api/v1/rollouts", body), as_json=as_json, table=_rollout_table)


def _rollout_table(found: dict[str, Any]) -> Table:
    rows = [[a["agent"], a["wave"] + 1, a["progress"], a["phase"]] for a in found["agents"]]
    table = _table(["agent", "wave", "progress", "phase"], rows)
    table.caption = f"rollout {found['id']}: {found['state']} {found['reason']}"
    return table


@rollouts.command("list")
def rollout_list(server: Server = "", as_json: AsJson = False) -> None:
    """All rollouts, newest first."""

    def table(found: list[dict[str, Any]]) -> Table:
        rows = [[r["id"], f"{r['model']}:{r['version']}", r["state"], r["counts"], r["reason"]] for r in found]
        return _table(["id", "model", "state", "agents", "reason"], rows)

    _say(Client(server).get("/api/v1/rollouts"), as_json=as_json, table=table)


@rollouts.command("show")
def rollout_show(rollout_id: int, server: Server = "", as_json: AsJson = False) -> None:
    """One rollout."""
    _say(Client(server).get(f"/api/v1/rollouts/{rollout_id}"), as_json=as_json, table=_rollout_table)


@rollouts.command("act")
def rollout_act(
    rollout_id: int,
    action: Annotated[str, typer.Argument(help="pause, resume, abort or rollback")],
    reason: Annotated[str, typer.Option()] = "",
    server: Server = "",
) -> None:
    """Pause, resume, abort or roll back."""
    body = {"reason": reason, "actor": "cli"}
    out.print(_rollout_table(Client(server).post(f"/api/v1/rollouts/{rollout_id}/{action}", body)))


@agents.command("list")
def agent_list(server: Server = "", as_json: AsJson = False) -> None:
    """All agents, worst first."""

    def table(found: list[dict[str, Any]]) -> Table:
        rows = [
            [a["id"], a["state"], a["reason"], a["active"][:12], a["items_per_s"], a["p99_ms"], a["drift_value"]]
            for a in found
        ]
        return _table(["agent", "state", "why", "bundle", "items/s", "p99 ms", "drift"], rows)

    _say(Client(server).get("/api/v1/agents"), as_json=as_json, table=table)


@agents.command("show")
def agent_show(agent_id: str, server: Server = "", as_json: AsJson = False) -> None:
    """One agent."""
    _say(Client(server).get(f"/api/v1/agents/{agent_id}"), as_json=as_json)


@settings.command("check")
def config_check(config: Config = None) -> None:
    """Say whether the configuration is good."""
    _ = load_control_plane_config(config).token
    err.print("the configuration is good")


@settings.command("show")
def config_show(config: Config = None) -> None:
    """Print the whole configuration, defaults included."""
    import msgspec  # noqa: PLC0415

    _say(msgspec.to_builtins(load_control_plane_config(config)), as_json=False)


def main(argv: list[str] | None = None) -> int:
    """Entry of the command; returns the exit status."""
    try:
        app(args=argv, standalone_mode=False)
    except typer.Exit as done:
        return int(done.exit_code)
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
    return 0


_EXIT = ((ConfigError, 2), (UnavailableError, 4), (ConflictError, 3))


def _complain(error: SortlineError) -> int:
    err.print(f"[bold red]{error.code}[/]: {error}", highlight=False, soft_wrap=True)
    return next((status for family, status in _EXIT if isinstance(error, family)), 1)
