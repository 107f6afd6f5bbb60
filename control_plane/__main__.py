"""`python -m control_plane` is `sortline`; says so where only the agent is installed."""

import sys

_OURS = frozenset({"models", "edge_agent", "control_plane"})


def main() -> int:
    """Runs the `sortline` command; returns its exit status.

    One wheel holds both sides. A box installed from `requirements/agent.lock` has the agent's libraries alone, so the
    command explains what is missing there.
    """
    try:
        from control_plane.cli import main as run  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in _OURS:
            raise
        sys.stderr.write(
            f"This installation has no control plane ({error.name} is not installed). On a sorting line's box the "
            "command is sortline-agent; the control plane is installed by deploy/install.sh control-plane, or from "
            "requirements/runtime.lock.\n"
        )
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
