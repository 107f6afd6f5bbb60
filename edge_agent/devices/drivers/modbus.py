"""Modbus/TCP through pymodbus: one connection, used by one thread, and a thread that polls registers.

Any answer may be late, torn or of the wrong length, and any library may break on it: every failure becomes an
`UnavailableError`, closes the connection and is counted. The next request connects again.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, Protocol, TypeAlias

from edge_agent.devices.drivers.address import Table, load_extra
from models.errors import UnavailableError

log = logging.getLogger("sortline.drivers")
WordOrder: TypeAlias = Literal["big", "little"]
_MAX_PAUSE_S: Final = 2.0
MAX_READ: Final = 125
MAX_WRITE: Final = 123
"""Most registers in one request (MODBUS Application Protocol Specification V1.1b3, 6.3, 6.4 and 6.12)."""


_READS: Final[dict[Table, str]] = {
    "input": "read_input_registers",
    "holding": "read_holding_registers",
    "discrete": "read_discrete_inputs",
    "coil": "read_coils",
}


class Registers(Protocol):
    """The registers of a device; one thread uses them."""

    def read(self, table: Table, address: int, count: int) -> list[int]:
        """Returns `count` registers from `address`; raises UnavailableError."""

    def write(self, address: int, values: Sequence[int]) -> None:
        """Writes holding registers in one request; raises UnavailableError."""

    def close(self) -> None:
        """Closes the connection; the next request opens it again."""


class ModbusPort:
    """A connection to a Modbus/TCP device.

    Args:
        host: Name or address.
        port: TCP port.
        unit: Unit number behind a gateway; 1 for most devices.
        timeout_s: Of connecting and of each answer.

    Raises:
        ConfigError: `driver.missing_library`.
    """

    def __init__(self, host: str, port: int, *, unit: int = 1, timeout_s: float = 0.5) -> None:
        library = load_extra("pymodbus.client", "industrial")
        # pymodbus logs every failed attempt as an error; failures are counted here and logged when they begin.
        logging.getLogger("pymodbus.logging").setLevel(logging.CRITICAL)
        self._client: Any = library.ModbusTcpClient(host, port=port, timeout=timeout_s, retries=0)
        self._unit = unit
        self._where = f"{host}:{port}"
        self.counters: Counter[str] = Counter()

    def read(self, table: Table, address: int, count: int) -> list[int]:
        """See `Registers`."""
        answer = self._ask(_READS[table], address, count=count)
        registers = getattr(answer, "registers", None)
        if table in {"discrete", "coil"}:
            # The answer is filled up to whole bytes.
            bits = getattr(answer, "bits", None)
            registers = [int(bit) for bit in bits[:count]] if isinstance(bits, list) else None
        if not isinstance(registers, list) or len(registers) != count or not all(map(_is_word, registers)):
            self.counters["malformed"] += 1
            self.close()
            raise self._unavailable("an answer that does not fit the request")
        return registers

    def write(self, address: int, values: Sequence[int]) -> None:
        """See `Registers`."""
        self._ask("write_registers", address, values=list(values))

    def write_coil(self, address: int, *, active: bool) -> None:
        """Sets one coil; raises UnavailableError."""
        self._ask("write_coil", address, value=active)

    def _ask(self, request: str, address: int, **arguments: Any) -> Any:
        try:
            if not self._client.connect():
                self.counters["connect_failed"] += 1
                raise self._unavailable("no connection")
            answer = getattr(self._client, request)(address, device_id=self._unit, **arguments)
        except UnavailableError:
            raise
        except Exception as error:
            # The library raises unrelated types on hostile bytes; the connection is given up and the thread continues.
            self.counters["failed"] += 1
            self.close()
            raise self._unavailable(error) from error
        if answer.isError():
            self.counters["refused"] += 1
            raise self._unavailable(answer)
        return answer

    def _unavailable(self, got: object) -> UnavailableError:
        return UnavailableError("driver.no_answer", "The device does not answer.", expected=self._where, got=got)

    def close(self) -> None:
        """See `Registers`."""
        self._client.close()


def _is_word(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 0xFFFF


def unsigned(words: Sequence[int], order: WordOrder) -> int:
    """Returns registers as one unsigned number; `order` names the register that comes first."""
    number = 0
    for word in words if order == "big" else reversed(words):
        number = number << 16 | word
    return number


class RegisterPoller:
    """Reads the same registers periodically in a thread of its own.

    Args:
        registers: The device; closed by this thread when it ends.
        table: Which table.
        address: First register.
        count: How many.
        every_s: From one request to the next.
        deliver: Gets the registers and the monotonic time they stand for: the middle of the request.
        slow_s: An answer that took longer stands for no moment; it is counted and dropped.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        registers: Registers,
        table: Table,
        address: int,
        count: int,
        *,
        every_s: float,
        deliver: Callable[[list[int], float], None],
        slow_s: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registers, self._deliver, self._clock = registers, deliver, clock
        self._what: tuple[Table, int, int] = (table, address, count)
        self._every_s, self._slow_s = every_s, slow_s
        self._failures = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.counters: Counter[str] = Counter()

    def poll(self) -> float:
        """Makes one request; returns the seconds until the next, which grow while the device does not answer."""
        began_s = self._clock()
        try:
            words = self._registers.read(*self._what)
        except UnavailableError as error:
            self.counters["no_answer"] += 1
            self._failures += 1
            if self._failures == 1:
                log.warning("%s", error)
            return min(self._every_s * 2.0 ** min(self._failures, 10), _MAX_PAUSE_S)
        if self._failures:
            log.info("the device answers again after %d failures", self._failures)
            self._failures = 0
        ended_s = self._clock()
        if ended_s - began_s > self._slow_s:
            self.counters["slow"] += 1
        else:
            self._hand_on(words, (began_s + ended_s) / 2.0)
        return max(self._every_s - (ended_s - began_s), 0.001)

    def _hand_on(self, words: list[int], at_s: float) -> None:
        try:
            self._deliver(words, at_s)
        except Exception:
            self.counters["deliver_failed"] += 1
            log.exception("a reading could not be used")

    def start(self, name: str) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(self.poll()):
            pass
        self._registers.close()

    def close(self) -> None:
        """Ends the thread. May be called twice."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(3.0)
