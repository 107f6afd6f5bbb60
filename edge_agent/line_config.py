"""Configuration of the line process: the camera, the places of lanes and outlets, and the way it runs."""

from typing import Annotated, Literal

import msgspec

from models.messages import LotText, SafeState

Positive = Annotated[float, msgspec.Meta(gt=0.0)]


Action = Literal["pass", "eject-all", "stop-line"]
Orientation = Literal[
    "none",
    "rotate-90",
    "rotate-180",
    "rotate-270",
    "mirror",
    "mirror-rotate-90",
    "mirror-rotate-180",
    "mirror-rotate-270",
]
"""How a picture is changed: mirrored left to right first, then turned clockwise by so many degrees."""


class FailSafeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The action while the camera has a fault; a fault without an action of its own follows `default`."""

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
    """The frames of a slow camera are still judged; this action is taken in addition."""
    outlet: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] = "reject"
    """Outlet to which `eject-all` sends everything; one of the line's outlets."""
    pitch_mm: Annotated[float, msgspec.Meta(ge=5.0, le=500.0)] = 30.0
    """Distance between the shots of `eject-all`; shorter than the smallest item, so that each item is hit."""

    def action(self, fault: str) -> Action:
        """Returns the action for a code such as `camera.frozen`."""
        chosen: Action | None = getattr(self, fault.removeprefix("camera."), None)
        return chosen or self.default

    @property
    def actions(self) -> set[Action]:
        """The set of all actions that this configuration can ask for."""
        others = {"default", "outlet", "pitch_mm"}
        return {self.action(name) for name in self.__struct_fields__ if name not in others}


class LineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Configuration of one camera over one belt."""

    camera: str = "simulated"
    """`simulated`, a video file, a folder of frames, a device (`/dev/video0`) or a URL (`rtsp://...`)."""
    paced: bool = True
    """Whether recordings play at camera speed; false = as fast as possible, with every frame judged."""
    loop: bool = False
    """Whether recordings start again at their end."""
    frames_per_s: Positive = 30.0
    """Rate of a live camera (far below it, it is slow), of a folder, and of a video that does not state its rate."""
    stall_s: Annotated[float, msgspec.Meta(ge=0.2, le=10.0)] = 1.0
    """A live camera without a frame for so long is stalled: its reader is abandoned and replaced."""
    slow_share: Annotated[float, msgspec.Meta(ge=0.0, le=0.95)] = 0.6
    """Below this share of its rate a live camera is slow; 0 = never."""
    fail_safe: FailSafeConfig = FailSafeConfig()
    """Action on the items while the camera has a fault."""
    belt_mm_s: Positive = 1000.0
    """Nominal belt speed where there is no encoder."""
    encoder: str = ""
    """Source of the belt position: belt pulses (`modbus://...`, `mqtt://...`, see `devices.drivers.encoder`), `image` =
    measured from the pictures, `nominal` = belt_mm_s at all times. Empty = `image` for a real camera, and the simulated
    line's own encoder for a simulated one."""
    ejector: str = ""
    """Ejector (`modbus://...`, `mqtt://...`, `gpio://...`); see `devices.drivers.ejectors`; needs an encoder."""
    belt: str = ""
    """Device that stops the belt for a fail-safe (`modbus://...`, `mqtt://...`, see `devices.drivers.belt`)."""
    weights: Annotated[tuple[str, ...], msgspec.Meta(max_length=8)] = ()
    """Source of the weight of an item, for each lane (`modbus://...`, `mqtt://...`); empty = weights are not known."""
    weight_mm: float = -200.0
    """Distance of the load cells behind column 0 of the image; negative = in front of the camera."""
    confirmation: Annotated[tuple[str, ...], msgspec.Meta(max_length=16)] = ()
    """Photo-eyes behind the ejectors (`gpio://...`, `modbus://...`, `mqtt://...`, see `devices.drivers.photo_eyes`):
    they confirm ejections, teach each ejector's lead and show a weak valve; they need an ejector."""
    confirmation_mm: Annotated[float, msgspec.Meta(ge=-500.0, le=5000.0)] = 0.0
    """Distance of the photo-eyes behind their outlets, along the belt."""
    heartbeat: str = ""
    """Output that changes while the line is healthy (`gpio://...`, `modbus://...`, `mqtt://...`, see
    `devices.drivers.heartbeat`), so that a PLC notices a dead line; empty = none."""
    lanes: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    """Number of lanes; equal strips of the image from top to bottom, unless `lane_rows` gives their rows."""
    lane_rows: tuple[tuple[int, int], ...] = ()
    """Rows (top, bottom) of each lane in the oriented picture, pixels, from top to bottom; empty = equal strips."""
    width_px: Annotated[int, msgspec.Meta(ge=0, le=16_384)] = 0
    """Width of the oriented picture. A frame of another size is refused. 0 = the width of the first frame."""
    height_px: Annotated[int, msgspec.Meta(ge=0, le=16_384)] = 0
    """Height of the oriented picture; given together with `width_px`."""
    orientation: Orientation = "none"
    """How the pictures of a real camera are changed so that items travel from left to right; `calibrate` finds it."""
    depth_bits: Annotated[int, msgspec.Meta(ge=0, le=16)] = 0
    """Bits that carry the pictures of a folder of 16-bit files (9 to 16); 0 = read from the pictures."""
    mm_per_px: Positive = 0.625
    outlets_mm: dict[str, Positive] = msgspec.field(default_factory=lambda: {"reject": 700.0})
    """Distance of each outlet from column 0 of the image; an outlet that is not listed needs no ejection."""
    belt_outlets: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=16)] = ("pass",)
    """Outlets that need no ejection, because their items stay on the belt; a recipe may name these and `outlets_mm`."""
    lead_ms: Annotated[float, msgspec.Meta(ge=0.0, le=1000.0)] = 0.0
    """Time from command to effect of the valves, until the lead of each ejector is learnt from its photo-eye."""
    fire_window_mm: Positive = 20.0
    """A shot that could only be fired this far behind its place is dropped, because it would hit the next item."""
    ejector_pitch_mm: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    """Smallest distance between two shots of one ejector; 0 = no limit."""
    close_items: Literal["hold", "skip"] = "hold"
    """For two items closer than that: `hold` the valve open over both, or `skip` the second one (late outlet)."""
    valve_delay_ms: Annotated[float, msgspec.Meta(ge=0.0, le=200.0)] = 0.0
    """Delay of the simulated valves, which the line learns from their photo-eyes."""
    window_s: Annotated[float, msgspec.Meta(gt=0.05, le=600.0)] = 10.0
    """Length of a statistics window."""
    threads: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """Threads of ONNX Runtime, and of OpenCV in the line process; 0 = measured at the start of the line, else 1."""
    opencv_threads: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """Threads of OpenCV in the line process; 0 = as `threads`."""
    lot: LotText = ""
    """Lot at the first start; from then on operator or control plane set it (`sortline-agent lot`)."""
    variety: LotText = ""
    trouble: str = ""
    """Schedule for the simulated line, such as `30s brightness=0.7; 60s clear`."""
    trouble_file: str = ""
    """File that names what is wrong with the simulated line now, such as `dirt=0.6 dirt_x=0.8`, or `clear`; it is read
    when it changes. Empty = the agent's own (`sortline-agent trouble` writes it)."""
    camera_levels: str = ""
    """File for what the camera's belt looks like when all is well; set by the supervisor; empty = in memory only."""
    seed: int = 1
    items_per_s: Annotated[float, msgspec.Meta(gt=0.0, le=12.5)] = 9.0
    """Simulated items per second and lane."""
    photos: str = ""
    """Folder of real photographs that the simulated line rolls."""
    defect_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.25
    """Share of defective items among the simulated ones."""
    hollow_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    """Share of the simulated items without a visible defect that are hollow: light for their size, for the scale."""
    lifetime_items: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Number of items judged before this start; set by the supervisor."""
    bundle: str = ""
    """Directory of the bundle to start with: the last good one."""
    digest: str = ""
    """Digest that this bundle must have."""
    shadow: str = ""
    """Directory of a challenger's bundle that judges the same items without moving anything."""
    samples: str = ""
    """Folder for items that champion and challenger judge differently; empty = they are only counted."""
    swap_within_s: Annotated[float, msgspec.Meta(ge=0.0, le=60.0)] = 2.0
    """Longest time a new bundle waits for a gap on the belt; then it is switched in between two frames anyway."""
    safe_state: SafeState = SafeState.NONE
    """What the line does instead of judging; set by the supervisor, as the control plane has asked for it."""
    boot_id: str = "0000000000000000"
    """Boot id of the supervisor, which live figures carry."""
    owner: str = ""
    """File that a supervisor touches when it starts; a line without supervisor then ends for its successor."""
    orphan_s: Annotated[float, msgspec.Meta(ge=0.0)] = 20.0
    """Time for which a line without supervisor sorts on before it ends (a restarted supervisor starts its own line)."""

    @property
    def outlets(self) -> frozenset[str]:
        """All outlets that a recipe of this line may name."""
        return frozenset({*self.outlets_mm, *self.belt_outlets})
