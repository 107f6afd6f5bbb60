"""The hardware of a line, opened from its configuration: camera, encoder, ejectors, scales, belt; or a simulation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

import msgspec

from edge_agent.devices.cameras import is_live, open_camera
from edge_agent.devices.frames import PATIENCE_S, frames
from edge_agent.devices.image_encoder import LEARNING_FRAMES, ImageEncodedCamera, ImageEncoder, belt_of
from edge_agent.devices.live_camera import LiveCamera
from edge_agent.devices.orientation import OrientedCamera, size_before
from edge_agent.devices.video_file import VideoFile
from edge_agent.ejection.confirmation import ConfirmationLedger
from edge_agent.ejection.queue import EjectionQueue, EjectionRules
from edge_agent.interfaces import (
    BeltControl,
    Confirmation,
    Ejector,
    Encoder,
    Frame,
    FrameSource,
    Heartbeat,
    ItemScalars,
    Lane,
    LineGeometry,
    Shot,
)
from edge_agent.line_config import LineConfig
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from models.errors import CameraError, ConfigError
from models.text import mask

_LEAST_LANE_PX: Final = 8
"""A lane of fewer rows holds no item that could be judged."""


@dataclass(slots=True)
class NullEjector:
    """Stands in for valves where there are none, and counts the shots."""

    fired: int = 0

    def fire(self, _shot: Shot, _at_s: float) -> None:
        """Counts the shot."""
        self.fired += 1


class Closeable(Protocol):
    """A device that can be closed."""

    def close(self) -> None:
        """Closes the device. May be called twice."""


@dataclass(slots=True)
class EncoderStampedCamera:
    """A camera whose frames carry the belt position of an encoder at the line."""

    source: FrameSource
    encoder: Encoder

    def read(self, timeout_s: float) -> Frame | None:
        """See `FrameSource.read`."""
        frame = self.source.read(timeout_s)
        return None if frame is None else replace(frame, belt_mm=self.encoder.position_mm(frame.captured_s))

    def close(self) -> None:
        """Closes the camera."""
        self.source.close()


@dataclass(slots=True)
class LineHardware:
    """Camera, encoder, ejectors and other devices of one line."""

    source: FrameSource
    encoder: Encoder
    ejector: Ejector
    simulation: SimulatedLine | None = None
    description: str = ""
    confirmation: Confirmation | None = None
    belt: BeltControl | None = None
    weights: tuple[ItemScalars, ...] = ()
    """Sensor that weighs the items, for each lane; empty = none."""
    devices: tuple[Closeable, ...] = ()
    """Further devices that are closed with the line."""
    heartbeat: Heartbeat | None = None
    """Output that shows a PLC that the line is alive; None = there is none."""
    camera: VideoFile | LiveCamera | None = None
    """The real camera itself, for its counters; None for a simulated one."""
    patience_s: float = 0.0
    """Time for which commands wait for a camera that has stopped; 0 for recordings and simulations."""

    @property
    def frames_bad(self) -> int:
        """Frames the camera could not use so far: damaged, or of another size than the line's."""
        return self.camera.frames_bad if self.camera is not None else 0

    def close(self) -> None:
        """Closes camera and devices. May be called twice."""
        self.source.close()
        for device in self.devices:
            device.close()

    def show_heartbeat(self, url: str) -> None:
        """Opens the output that shows a PLC that the line is alive; it is closed with the other devices.

        Raises:
            ConfigError: As `devices.drivers.heartbeat.open_heartbeat`.
        """
        from edge_agent.devices.drivers.heartbeat import open_heartbeat  # noqa: PLC0415  an extra's driver

        output = open_heartbeat(url)
        self.heartbeat = output
        self.devices = (*self.devices, output)

    def ejection_queue(self, config: LineConfig, clock: Callable[[], float]) -> EjectionQueue:
        """Returns the queue that fires these ejectors by the configuration's rules."""
        rules = EjectionRules(
            lead_ms=config.lead_ms,
            window_mm=config.fire_window_mm,
            pitch_mm=config.ejector_pitch_mm,
            close=config.close_items,
        )
        ledger = ConfirmationLedger(eye_mm=config.confirmation_mm) if self.confirmation else None
        return EjectionQueue(self.encoder, self.ejector, clock=clock, rules=rules, ledger=ledger)


def prerender(config: LineConfig) -> SimulatedLine | None:
    """Draws the simulated line of a configuration, which takes a second or two; returns None for a real camera.

    Raises:
        ConfigError: The simulation's settings are impossible.
    """
    return _simulated(config, virtual=False) if config.camera == "simulated" else None


def _simulated(config: LineConfig, *, virtual: bool) -> SimulatedLine:
    file = Path(config.trouble_file) if config.trouble_file else None
    return SimulatedLine(simulation_config(config), schedule=config.trouble, faults_file=file, virtual=virtual)


def open_hardware(config: LineConfig, *, virtual: bool = False, drawn: SimulatedLine | None = None) -> LineHardware:
    """Opens camera, encoder and ejector of a configuration.

    Args:
        config: Configuration of the line.
        virtual: Whether the simulation's clock follows its frames.
        drawn: A simulated line that was drawn ahead; it starts now.

    Raises:
        CameraError: There is no such camera, or its pictures cannot be used.
        ConfigError: The settings are impossible: `line.no_encoder`, `line.no_belt_control`,
            `line.no_fail_safe_outlet`, `line.bad_lane_rows`, `line.bad_picture`.
    """
    _check_fail_safe(config)
    _check_picture(config)
    if config.camera == "simulated":
        line = drawn or _simulated(config, virtual=virtual)
        line.start()
        rolling = "photographs" if config.photos else "apples"
        cells = tuple(line.load_cell(lane) for lane in range(config.lanes))
        about = f"simulated, {config.lanes} lanes of {rolling}"
        if config.encoder != "image":
            return LineHardware(line, line, line, line, about, line, line, cells)
        measured = ImageEncoder(config.mm_per_px, nominal_mm_s=config.belt_mm_s)
        return LineHardware(ImageEncodedCamera(line, measured), measured, line, line, about, line, line, cells)
    no_pulses = config.encoder in {"", "image", "nominal"}
    if no_pulses and (config.ejector or config.weights or config.belt or config.confirmation):
        raise ConfigError(
            "line.no_encoder",
            "Ejectors, photo-eyes, load cells and a belt that is stopped need the pulses of an encoder.",
            expected="line.encoder with an address",
            got=config.encoder or "none",
        )
    camera, source = _open_camera(config)
    if not no_pulses:
        hardware = _with_devices(config, source)
    elif config.encoder == "nominal":
        hardware = LineHardware(source, camera.encoder, NullEjector(), None, mask(config.camera))
    else:
        encoder = _image_encoder(config)
        hardware = LineHardware(ImageEncodedCamera(source, encoder), encoder, NullEjector(), None, mask(config.camera))
    hardware.camera, hardware.patience_s = camera, PATIENCE_S if is_live(config.camera) else 0.0
    return hardware


def _open_camera(config: LineConfig) -> tuple[VideoFile | LiveCamera, FrameSource]:
    """Opens the real camera and turns its pictures where the configuration says so."""
    size_px = (config.width_px, config.height_px) if config.width_px else None
    camera = open_camera(
        config.camera,
        belt_mm_s=config.belt_mm_s,
        frames_per_s=config.frames_per_s,
        paced=config.paced,
        loop=config.loop,
        stall_s=config.stall_s,
        size_px=size_px and size_before(*size_px, config.orientation),
        depth_bits=config.depth_bits,
    )
    return camera, camera if config.orientation == "none" else OrientedCamera(camera, config.orientation)


def _image_encoder(config: LineConfig) -> ImageEncoder:
    """Returns an encoder that measures the belt from the picture; of a recording, the empty belt is learnt ahead."""
    belt = None
    if not is_live(config.camera):
        ahead, source = _open_camera(msgspec.structs.replace(config, paced=False, loop=False))
        try:
            belt = belt_of(frame.image for frame in frames(source, limit=LEARNING_FRAMES))
        except CameraError:
            # The same fault comes again, and is named, when the recording is played.
            belt = None
        finally:
            ahead.close()
    return ImageEncoder(config.mm_per_px, nominal_mm_s=config.belt_mm_s, belt=belt)


def _check_picture(config: LineConfig) -> None:
    """Refuses picture and lanes that contradict each other."""
    if bool(config.width_px) != bool(config.height_px):
        raise ConfigError(
            "line.bad_picture",
            "The size of the picture is its width and its height.",
            expected="line.width_px and line.height_px",
            got=(config.width_px, config.height_px),
        )
    if config.orientation != "none" and config.camera == "simulated":
        raise ConfigError(
            "line.bad_picture", "The simulated camera needs no turn.", expected="none", got=config.orientation
        )
    if not config.lane_rows:
        return
    edges = [edge for rows in config.lane_rows for edge in rows]
    ordered = all(bottom - top >= _LEAST_LANE_PX for top, bottom in config.lane_rows) and edges == sorted(edges)
    inside = edges[0] >= 0 and (not config.height_px or edges[-1] <= config.height_px)
    if not (ordered and inside and len(config.lane_rows) == config.lanes):
        raise ConfigError(
            "line.bad_lane_rows",
            "The rows of the lanes do not fit the picture or the number of lanes.",
            expected=f"{config.lanes} pairs (top, bottom) from top to bottom, each at least {_LEAST_LANE_PX} rows,"
            f" within 0 to {config.height_px or 'the height of the picture'}",
            got=config.lane_rows,
        )


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


def _with_devices(config: LineConfig, source: FrameSource) -> LineHardware:
    """Returns a camera with the encoder, ejector and load cells of its line."""
    # The drivers' libraries are extras: a line without such a device need not have them.
    from edge_agent.devices.drivers.belt import open_belt  # noqa: PLC0415
    from edge_agent.devices.drivers.ejectors import open_ejector  # noqa: PLC0415
    from edge_agent.devices.drivers.encoder import open_encoder  # noqa: PLC0415
    from edge_agent.devices.drivers.item_sensors import open_scalar  # noqa: PLC0415
    from edge_agent.devices.drivers.photo_eyes import open_photo_eyes, places_of  # noqa: PLC0415

    _check_eyes(config, places_of(config.confirmation))
    encoder = open_encoder(config.encoder)
    devices: list[Closeable] = [encoder]
    ejector: Ejector = NullEjector()
    if config.ejector:
        devices.append(driven := open_ejector(config.ejector, encoder))
        ejector = driven
    belt = open_belt(config.belt) if config.belt else None
    if belt is not None:
        devices.append(belt)
    eyes = open_photo_eyes(config.confirmation, encoder) if config.confirmation else None
    if eyes is not None:
        devices.append(eyes)
    cells = [open_scalar(url, encoder, sensor_mm=config.weight_mm, tolerance_mm=30.0) for url in config.weights]
    return LineHardware(
        EncoderStampedCamera(source, encoder),
        encoder,
        ejector,
        None,
        mask(config.camera),
        confirmation=eyes,
        belt=belt,
        weights=tuple(cell.join for cell in cells),
        devices=(*devices, *cells),
    )


def _check_eyes(config: LineConfig, places: set[tuple[int, str]]) -> None:
    """Refuses photo-eyes behind an ejector that the line does not have: all its shots would count as missed."""
    wrong = sorted(place for place in places if place[0] >= config.lanes or place[1] not in config.outlets_mm)
    if wrong or (places and not config.ejector):
        raise ConfigError(
            "line.no_ejector_for_eye",
            "A photo-eye stands behind an ejector that the line does not have.",
            expected=f"line.ejector, lanes below {config.lanes}, outlets among {sorted(config.outlets_mm)}",
            got=wrong or "no ejector",
        )


def simulation_config(config: LineConfig) -> SimulationConfig:
    """Returns the settings of the simulated line of a configuration."""
    return SimulationConfig(
        seed=config.seed,
        lanes=config.lanes,
        mm_per_px=config.mm_per_px,
        frames_per_s=config.frames_per_s,
        belt_mm_s=config.belt_mm_s,
        items_per_s=config.items_per_s,
        defect_share=config.defect_share,
        hollow_share=config.hollow_share,
        photos=config.photos,
        reject_mm=config.outlets_mm.get("reject", 700.0),
        valve_delay_ms=config.valve_delay_ms,
    )


def geometry_of(config: LineConfig, world: LineHardware, frame: Frame) -> LineGeometry:
    """Returns the lanes of the configuration in this camera's picture.

    Raises:
        CameraError: `camera.wrong_size` when lanes lie outside the picture.
    """
    if world.simulation is not None:
        return world.simulation.geometry
    height, width = frame.image.shape[:2]
    if config.lane_rows:
        if config.lane_rows[-1][1] > height:
            raise CameraError(
                "camera.wrong_size",
                "The rows of the lanes lie outside the picture; set the camera back or calibrate again.",
                expected=f"at least {config.lane_rows[-1][1]} rows",
                got=f"{width} x {height} px",
            )
        lanes = tuple(Lane(top, bottom) for top, bottom in config.lane_rows)
    else:
        lanes = tuple(Lane(k * height // config.lanes, (k + 1) * height // config.lanes) for k in range(config.lanes))
    return LineGeometry(width, height, config.mm_per_px, lanes, config.outlets_mm)
