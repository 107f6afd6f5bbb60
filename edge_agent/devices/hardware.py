"""The hardware of a line, opened from its configuration: camera, encoder, ejectors, scales, belt; or a simulation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from edge_agent.devices.cameras import open_camera
from edge_agent.ejection.confirmation import ConfirmationLedger
from edge_agent.ejection.queue import EjectionQueue, EjectionRules
from edge_agent.interfaces import (
    BeltControl,
    Confirmation,
    Ejector,
    Encoder,
    Frame,
    FrameSource,
    ItemScalars,
    Lane,
    LineGeometry,
    Shot,
)
from edge_agent.line_config import LineConfig
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from models.errors import ConfigError


@dataclass(slots=True)
class NullEjector:
    """For cameras without valves: counts what would have been fired."""

    fired: int = 0

    def fire(self, _shot: Shot, _at_s: float) -> None:
        """Counts."""
        self.fired += 1


class Closeable(Protocol):
    """A device that can be let go of."""

    def close(self) -> None:
        """May be called twice."""


@dataclass(slots=True)
class EncoderStampedCamera:
    """A camera whose frames carry the belt position of a real encoder."""

    source: FrameSource
    encoder: Encoder

    def read(self, timeout_s: float) -> Frame | None:
        """See `FrameSource`."""
        frame = self.source.read(timeout_s)
        return None if frame is None else replace(frame, belt_mm=self.encoder.position_mm(frame.captured_s))

    def close(self) -> None:
        """See `FrameSource`."""
        self.source.close()


@dataclass(slots=True)
class LineHardware:
    """What the line is connected to."""

    source: FrameSource
    encoder: Encoder
    ejector: Ejector
    simulation: SimulatedLine | None = None
    description: str = ""
    confirmation: Confirmation | None = None
    belt: BeltControl | None = None
    weights: tuple[ItemScalars, ...] = ()
    """Per lane, what weighs its items; empty = nothing does."""
    devices: tuple[Closeable, ...] = ()
    """Opened with the world, closed with it."""

    def close(self) -> None:
        """Lets go of camera and devices. May be called twice."""
        self.source.close()
        for device in self.devices:
            device.close()

    def ejection_queue(self, config: LineConfig, clock: Callable[[], float]) -> EjectionQueue:
        """The queue that fires this world's ejectors by the configuration's rules."""
        rules = EjectionRules(
            lead_ms=config.lead_ms,
            window_mm=config.fire_window_mm,
            pitch_mm=config.ejector_pitch_mm,
            close=config.close_items,
        )
        ledger = ConfirmationLedger() if self.confirmation else None
        return EjectionQueue(self.encoder, self.ejector, clock=clock, rules=rules, ledger=ledger)


def prerender(config: LineConfig) -> SimulatedLine | None:
    """The simulated line of a configuration, its pictures drawn (which takes a second or two); None for a real camera.

    Raises:
        ConfigError: The simulation's settings are impossible.
    """
    return SimulatedLine(simulation_config(config), schedule=config.trouble) if config.camera == "simulated" else None


def open_hardware(config: LineConfig, *, virtual: bool = False, drawn: SimulatedLine | None = None) -> LineHardware:
    """Opens camera, encoder and ejector of a configuration.

    Args:
        config: The line.
        virtual: The simulation's clock follows its frames.
        drawn: A simulated line that was drawn ahead; it starts now.

    Raises:
        CameraError: There is no such camera.
        ConfigError: The simulation's settings are impossible.
    """
    _check_fail_safe(config)
    if config.camera == "simulated":
        line = drawn or SimulatedLine(simulation_config(config), schedule=config.trouble, virtual=virtual)
        line.start()
        rolling = "photographs" if config.photos else "apples"
        cells = tuple(line.load_cell(lane) for lane in range(config.lanes))
        return LineHardware(line, line, line, line, f"simulated, {config.lanes} lanes of {rolling}", line, line, cells)
    camera = open_camera(
        config.camera,
        belt_mm_s=config.belt_mm_s,
        frames_per_s=config.frames_per_s,
        paced=config.paced,
        loop=config.loop,
        stall_s=config.stall_s,
    )
    if config.encoder:
        return _with_devices(config, camera)
    if config.ejector or config.weights or config.belt:
        raise ConfigError(
            "line.no_encoder",
            "Ejectors, load cells and a belt that is stopped need a belt position.",
            expected="line.encoder",
            got="none",
        )
    return LineHardware(camera, camera.encoder, NullEjector(), None, config.camera)  # type: ignore[attr-defined]


def _check_fail_safe(config: LineConfig) -> None:
    if "stop-line" in config.fail_safe.actions and not config.belt and config.camera != "simulated":
        raise ConfigError(
            "line.no_belt_control", "Nothing can stop the belt for the fail-safe.", expected="line.belt", got="none"
        )
    if "eject-all" in config.fail_safe.actions and config.fail_safe.outlet not in config.outlets_mm:
        raise ConfigError(
            "line.no_fail_safe_outlet",
            "The outlet of the fail-safe is none of the line's.",
            expected=sorted(config.outlets_mm),
            got=config.fail_safe.outlet,
        )


def _with_devices(config: LineConfig, camera: FrameSource) -> LineHardware:
    """A camera with the encoder, ejector and load cells of a real line."""
    # The drivers' libraries are extras: whoever has no such device need not have them.
    from edge_agent.devices.drivers.belt import open_belt  # noqa: PLC0415
    from edge_agent.devices.drivers.ejectors import open_ejector  # noqa: PLC0415
    from edge_agent.devices.drivers.encoder import open_encoder  # noqa: PLC0415
    from edge_agent.devices.drivers.item_sensors import open_scalar  # noqa: PLC0415

    encoder = open_encoder(config.encoder)
    devices: list[Closeable] = [encoder]
    ejector: Ejector = NullEjector()
    if config.ejector:
        devices.append(driven := open_ejector(config.ejector, encoder))
        ejector = driven
    belt = open_belt(config.belt) if config.belt else None
    if belt is not None:
        devices.append(belt)
    cells = [open_scalar(url, encoder, sensor_mm=config.weight_mm, tolerance_mm=30.0) for url in config.weights]
    return LineHardware(
        EncoderStampedCamera(camera, encoder),
        encoder,
        ejector,
        None,
        config.camera,
        belt=belt,
        weights=tuple(cell.join for cell in cells),
        devices=(*devices, *cells),
    )


def simulation_config(config: LineConfig) -> SimulationConfig:
    """The simulated line of a line configuration."""
    return SimulationConfig(
        seed=config.seed,
        lanes=config.lanes,
        mm_per_px=config.mm_per_px,
        frames_per_s=config.frames_per_s,
        belt_mm_s=config.belt_mm_s,
        items_per_s=config.items_per_s,
        defect_share=config.defect_share,
        photos=config.photos,
        reject_mm=config.outlets_mm.get("reject", 700.0),
        valve_delay_ms=config.valve_delay_ms,
    )


def geometry_of(config: LineConfig, world: LineHardware, frame: Frame) -> LineGeometry:
    """Lanes of the configuration in this camera's image."""
    if world.simulation is not None:
        return world.simulation.geometry
    height, width = frame.image.shape[:2]
    if config.lane_rows:
        lanes = tuple(Lane(max(0, top), min(height, bottom)) for top, bottom in config.lane_rows)
    else:
        lanes = tuple(Lane(k * height // config.lanes, (k + 1) * height // config.lanes) for k in range(config.lanes))
    return LineGeometry(width, height, config.mm_per_px, lanes, config.outlets_mm)
