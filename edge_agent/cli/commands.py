"""The `sortline-agent` command: its parser and its exit status. Data on standard output, all else on standard error.

Exit status: 0 ok, 1 failed, 2 wrong usage or configuration, 3 the state of the thing does not allow it, 4 something is
not reachable, 130 interrupted.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from edge_agent.cli import inspect, record, run, setup
from models.errors import CameraError, ConfigError, ConflictError, SortlineError, UnavailableError
from models.text import mask

_EPILOG = """examples:
  sortline-agent run --id line-1 --broker 10.0.0.5:1883 --camera /dev/video0
                                        join the fleet: receive bundles, sort, report
  sortline-agent enrol --token T --control-plane https://10.0.0.5:8443
                                        get this box's certificate; run finds it by itself
  sortline-agent run --bundle DIR --camera video.mp4 --unpaced --json
                                        judge a recording with one bundle, alone, every frame
  sortline-agent run --bundle DIR --camera simulated --seconds 30
                                        sort on the simulated line for 30 seconds
  sortline-agent run --bundle DIR --camera /dev/video0 --record REC --record-quota-mb 8000
                                        sort and record: for a bug report, or for tomorrow's model
  sortline-agent replay REC             was it the same, bit by bit? with the bundle that judged
  sortline-agent replay REC --bundle B  what would bundle B have done with that fruit?
  sortline-agent collect --output DIR --items 300
                                        labelled training views from the simulated line
  sortline-agent calibrate --camera line.mp4 --item-mm 75
                                        learn scale, lanes, direction and speed; writes geometry.toml
  sortline-agent picture --bundle DIR --camera line.mp4
                                        see what the line sees and decides; writes line.png
  sortline-agent import /media/stick --id line-1
                                        take up signed metadata, assignment and bundle from a stick
  sortline-agent lot --lot B-1182 --variety gala
                                        another lot runs from now on; needs no network
  sortline-agent selftest DIR           would this machine accept this bundle?
"""
_STATUS: tuple[tuple[type[SortlineError] | tuple[type[SortlineError], ...], int], ...] = (
    (ConfigError, 2),
    (ConflictError, 3),
    ((UnavailableError, CameraError), 4),
    (SortlineError, 1),
)
_DISK = {
    errno.ENOSPC: "disk.full",
    errno.EDQUOT: "disk.full",
    errno.EACCES: "output.not_writable",
    errno.EPERM: "output.not_writable",
    errno.EROFS: "output.not_writable",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sortline-agent",
        description="The box beside a sorting line: judges every item, fires ejectors, reports.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        run.add_run,
        record.add_replay,
        setup.add_enrol,
        record.add_collect,
        setup.add_calibrate,
        record.add_picture,
        setup.add_import,
        run.add_lot,
        run.add_trouble,
        setup.add_relearn_camera,
        inspect.add_selftest,
        inspect.add_capacity,
        inspect.add_status,
        inspect.add_config,
    ):
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the command; returns the exit status.

    Called without arguments, as the program is, it ends the process where a camera's driver holds a thread.
    """
    status = _answered(argv)
    live_camera = sys.modules.get("edge_agent.devices.live_camera")
    if argv is None and live_camera is not None and live_camera.left_behind():
        # The thread would return into an interpreter that is being torn down, and abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _answered(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.act(arguments)
        sys.stdout.flush()
    except SortlineError as error:
        sys.stderr.write(mask(f"{error.code}: {error}\n"))
        return next(status for family, status in _STATUS if isinstance(error, family))
    except BrokenPipeError:
        # The reader of the output has left (`| head`): the buffered rest is dropped without an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        code = _DISK.get(error.errno or 0, "agent.disk_failed")
        sys.stderr.write(mask(f"{code}: {place}{error.strerror or error}\n"))
        return 1
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
