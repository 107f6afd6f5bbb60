"""What a person decides about the demo."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Size of the simulated plant, and how long it runs."""

    seconds: Annotated[
        float, typer.Option(help="Seconds of sorting after which it ends; 0 = until Ctrl-C, which is the default.")
    ] = 0.0
    report: Annotated[Path | None, typer.Option(help="File for the figures, as JSON. Without it, none.")] = None
    port: Annotated[int, typer.Option(help="Port of the pages; 0 chooses a free one.")] = 8080
    agents: Annotated[int, typer.Option(help="Number of edge agents, one line each.")] = 3
    lanes: Annotated[int, typer.Option(help="Lanes of each line.")] = 2
    items_per_s: Annotated[
        float, typer.Option(help="Items per second and lane; reduced to what the machine carries.")
    ] = 9.0
    items: Annotated[int, typer.Option(help="Items collected for training.")] = 600
    story: Annotated[
        bool,
        typer.Option(
            "--story", help="Let a lens get dirty after the rollout, show its alarm, wipe the lens, and let it close."
        ),
    ] = False
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder that keeps everything. Without it, a temporary folder is deleted.")
    ] = None
