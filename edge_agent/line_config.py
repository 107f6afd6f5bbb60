"""Configuration of the line process: what the camera is, where lanes and outlets are, how it runs."""

from typing import Annotated, Literal

import msgspec

from models.messages import LotText

Positive = Annotated[float, msgspec.Meta(gt=0.0)]


Action = Literal["pass", "eject-all", "stop-line"]


class FailSafeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to do while the camera has this fault; what is not said follows `default`."""

    default: Action = "pass"
    absent: Action | None = None
    stalled: Action | None = None
    frozen: Action | None = None
    corrupt: Action | None = None
    black: Action | None = None
    overexposed: Action | None = None
    wrong_size: Action | None = None
    failed: Action | None = None
    slow: Action = "pass"
    """A slow camera still sees: its frames are judged, whatever is chosen here comes on top."""
    outlet: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] = "reject"
    """Where `eject-all` sends everything; one of the line's outlets."""
    pitch_mm: Annotated[float, msgspec.Meta(ge=5.0, le=500.0)] = 30.0
    """Distance of the shots of `eject-all`: closer than the smallest item is long, so that each is hit."""

    def action(self, fault: str) -> Action:
        """For a code such as `camera.frozen`."""
        chosen: Action | None = getattr(self, fault.removeprefix("camera."), None)
        return chosen or self.default

    @property
    def actions(self) -> set[Action]:
        """All that may be asked for."""
        others = {"default", "outlet", "pitch_mm"}
        return {self.action(name) for name in self.__struct_fields__ if name not in others}


class LineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One camera over one belt."""

    camera: str = "simulated"
    """`simulated`, a video file, a folder of frames, a device (`/dev/video0`) or a URL (`rtsp://...`)."""
    paced: bool = True
    """Recordings play at camera speed; false = as fast as possible, every frame judged."""
    loop: bool = False
    """Recordings start again at their end."""
    frames_per_s: Positive = 30.0
    """Of a live camera, which is slow when it gives much less; of a folder, and of a video that does not say."""
    stall_s: Annotated[float, msgspec.Meta(ge=0.2, le=10.0)] = 1.0
    """A live camera without a frame for so long is stalled: its reader is given up and replaced."""
    slow_share: Annotated[float, msgspec.Meta(ge=0.0, le=0.95)] = 0.6
    """Below this share of its rate a live camera is slow; 0 = never."""
    fail_safe: FailSafeConfig = FailSafeConfig()
    """What happens to the items while the camera is at fault."""
    belt_mm_s: Positive = 1000.0
    """Nominal belt speed where there is no encoder."""
    encoder: str = ""
    """Where belt pulses come from (`modbus://...`, `mqtt://...`, see `devices.drivers.encoder`); empty = nominal
    speed, or the simulation's own encoder."""
    ejector: str = ""
    """What fires (`modbus://...`, `mqtt://...`, `gpio://...`, see `devices.drivers.ejectors`); needs an encoder."""
    belt: str = ""
    """What stops the belt for a fail-safe (`modbus://...`, `mqtt://...`, see `devices.drivers.belt`)."""
    weights: Annotated[tuple[str, ...], msgspec.Meta(max_length=8)] = ()
    """Per lane, where the weight of an item comes from (`modbus://...`, `mqtt://...`); empty = not known."""
    weight_mm: float = -200.0
    """Distance of the load cells behind column 0 of the image; negative = in front of the camera."""
    lanes: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    """Equal strips of the image from top to bottom, unless `lane_rows` says where they are."""
    lane_rows: tuple[tuple[int, int], ...] = ()
    """Explicit rows (top, bottom) of each lane, pixels."""
    mm_per_px: Positive = 0.625
    outlets_mm: dict[str, Positive] = msgspec.field(default_factory=lambda: {"reject": 700.0})
    """Distance of each outlet from column 0 of the image; an outlet that is not listed needs no ejection."""
    lead_ms: Annotated[float, msgspec.Meta(ge=0.0, le=1000.0)] = 0.0
    """From command to effect of the valves, until a photo-eye has taught each ejector's own."""
    fire_window_mm: Positive = 20.0
    """A shot that could only be fired so far behind its place is dropped: it would hit the next item."""
    ejector_pitch_mm: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    """Closest distance of two shots of one ejector; 0 = no limit."""
    close_items: Literal["hold", "skip"] = "hold"
    """Two items closer than that: `hold` the valve open over both, or `skip` the second one (late outlet)."""
    valve_delay_ms: Annotated[float, msgspec.Meta(ge=0.0, le=200.0)] = 0.0
    """Of the simulated valves: what their photo-eyes should find out."""
    window_s: Annotated[float, msgspec.Meta(gt=0.05, le=600.0)] = 10.0
    """Length of a statistics window."""
    threads: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """Of ONNX Runtime, and of OpenCV in the line process; 0 = measured when the line starts (and 1 without a line)."""
    opencv_threads: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """Of OpenCV in the line process; 0 = as `threads`."""
    lot: LotText = ""
    """Which runs at the first start; from then on operator or control plane say it (`sortline-agent lot`)."""
    variety: LotText = ""
    trouble: str = ""
    """Schedule for the simulated line, such as `30s brightness=0.7; 60s clear`."""
    seed: int = 1
    items_per_s: Annotated[float, msgspec.Meta(gt=0.0, le=12.5)] = 9.0
    """Simulated items per second and lane."""
    photos: str = ""
    """Folder of real photographs that the simulated line rolls."""
    defect_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.25
    """Of simulated items."""
    lifetime_items: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Judged before this start; set by the supervisor."""
    bundle: str = ""
    """Directory of the bundle to start with: the last good one."""
    digest: str = ""
    """Which bundle that must be."""
    shadow: str = ""
    """Directory of a challenger's bundle that judges the same items without moving anything."""
    samples: str = ""
    """Folder for items that champion and challenger judge differently; empty = they are only counted."""
    swap_within_s: Annotated[float, msgspec.Meta(ge=0.0, le=60.0)] = 2.0
    """A new bundle waits so long for a gap on the belt before it is switched in between two frames anyway."""
    boot_id: str = "0000000000000000"
    """Of the supervisor; live figures carry it."""
    owner: str = ""
    """File that a supervisor touches when it begins: a line without supervisor makes room for its successor."""
    orphan_s: Annotated[float, msgspec.Meta(ge=0.0)] = 20.0
    """A line whose supervisor is gone sorts on for so long (a restarted supervisor starts its own), then ends."""
