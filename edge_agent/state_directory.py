"""The layout of an agent's state directory: the one place that spells the names of what stands in it.

Everything in it survives updates of the agent. One supervisor at a time owns it; commands beside it read, and leave
what they want to say where the supervisor looks.
"""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import IO, Final

from models.errors import ConflictError

_LOCK: Final = "lock"


class StateDirectory:
    """Where things stand.

    Args:
        root: The state directory; it need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def slots(self) -> Path:
        """Folder of the verified bundles, each under its digest."""
        return self.root / "slots"

    def slot(self, digest: str) -> Path:
        """Folder of one bundle."""
        return self.slots / digest

    @property
    def fetch(self) -> Path:
        """Folder of what is on its way into a slot."""
        return self.root / "fetch"

    @property
    def trust(self) -> Path:
        """Folder of the trust anchor and of what was verified."""
        return self.root / "trust"

    @property
    def identity(self) -> Path:
        """Folder of key and certificate."""
        return self.root / "identity"

    @property
    def staged(self) -> Path:
        """Folder that `sortline-agent import` leaves for the supervisor."""
        return self.root / "import"

    @property
    def building(self) -> Path:
        """The same while it is being copied."""
        return self.root / ".import.partial"

    @property
    def shadow_samples(self) -> Path:
        """Folder of items that champion and challenger judge differently."""
        return self.root / "shadow-samples"

    @property
    def champion(self) -> Path:
        """State file of the bundles."""
        return self.root / "state.json"

    @property
    def challenger(self) -> Path:
        """State file of the challenger."""
        return self.root / "challenger.json"

    @property
    def connection(self) -> Path:
        """Whether there is a broker, and why not."""
        return self.root / "connection.json"

    @property
    def lot(self) -> Path:
        """State file of the lot."""
        return self.root / "lot.json"

    @property
    def lot_request(self) -> Path:
        """Where `sortline-agent lot` leaves what an operator asks for."""
        return self.root / "lot-wish.json"

    @property
    def lot_taken(self) -> Path:
        """The same while the supervisor reads it."""
        return self.root / "lot-wish.taken"

    @property
    def camera_levels(self) -> Path:
        """What the camera's belt looks like when all is well; without it the line learns it again."""
        return self.root / "camera-levels"

    @property
    def trouble(self) -> Path:
        """What is wrong with the simulated line now, as `sortline-agent trouble` leaves it."""
        return self.root / "trouble"

    @property
    def spool(self) -> Path:
        """Records that wait for the control plane."""
        return self.root / "spool.sqlite"

    @property
    def ballast(self) -> Path:
        """File that is given up when the disk is full."""
        return self.root / "ballast"

    @property
    def lock_file(self) -> Path:
        """Held by the supervisor while it runs; touched when it begins."""
        return self.root / _LOCK

    def is_owned(self) -> bool:
        """Returns whether a supervisor runs on this directory now; changes nothing."""
        try:
            with self.lock_file.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def lock(self) -> IO[str]:
        """Makes this process the owner, as long as the returned file is open.

        Raises:
            ConflictError: `agent.already_running`: another process owns it.
        """
        stream = self.lock_file.open("a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.seek(0)
            owner = stream.read().strip() or "unknown"
            stream.close()
            raise ConflictError(
                "agent.already_running",
                f"Another agent (process {owner}) uses {self.root}; stop it or choose another --state-dir.",
                expected="one agent per state directory",
                got=f"process {owner}",
            ) from error
        os.utime(stream.fileno())  # a line that a supervisor before left behind sees that it has a successor
        with contextlib.suppress(OSError):  # a full disk is no reason not to start
            stream.seek(0)
            stream.truncate()
            stream.write(str(os.getpid()))
            stream.flush()
        return stream
