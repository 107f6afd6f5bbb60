"""A PLC as a process of its own: pymodbus' server with 1000 registers. `python -m tests.simulators.plc PORT`."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator

from pymodbus.server import StartTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from tests.simulators.processes import running, wait_until


@contextlib.contextmanager
def plc_process(port: int) -> Iterator[subprocess.Popen]:
    """The PLC on a port of this machine, once it listens."""
    command = [sys.executable, "-m", "tests.simulators.plc", str(port)]
    with running(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: _listens(port) or process.poll() is not None, "the PLC")
        yield process


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
        return True
    return False


if __name__ == "__main__":
    registers = SimData(0, count=1000, values=0, datatype=DataType.REGISTERS)
    StartTcpServer(SimDevice(id=1, simdata=[registers]), address=("127.0.0.1", int(sys.argv[1])))
