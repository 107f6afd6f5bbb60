"""Checks the options of a job before anything long begins; command line, API and worker use the same checks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from models.errors import InputError
from models.view_spec import ScalarName

NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
MAX_NAME: Final = 64
MAX_SEED: Final = 2**32 - 1
"""Largest seed that NumPy's and scikit-learn's generators take."""
Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN, max_length=MAX_NAME)]
ClassName = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=MAX_NAME)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
MAX_SCALARS: Final = 16
Scalars = Annotated[list[ScalarName], msgspec.Meta(max_length=MAX_SCALARS)]


class TrainRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of a training run, within their bounds."""

    name: Name
    seed: Annotated[int, msgspec.Meta(ge=0, le=MAX_SEED)] = 1
    effort: Literal["quick", "standard"] = "standard"
    folds: Annotated[int, msgspec.Meta(ge=2, le=50)] = 5
    good_class: ClassName = ""
    abstain_budget: Share = 0.0
    scalars: Scalars | None = None
    precision: Literal["float32", "int8"] = "float32"


class ImportRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of an import, within their bounds; a test compares the names with those of the import itself."""

    name: Name
    classes: Annotated[list[ClassName], msgspec.Meta(max_length=1000)] = []
    data: Annotated[str, msgspec.Meta(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
    good_class: ClassName = ""
    view_px: Annotated[int, msgspec.Meta(ge=16, le=512)] = 64
    layout: Literal["nchw", "nhwc"] = "nchw"
    channels: Literal["rgb", "bgr"] = "rgb"
    scale: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0 / 255.0
    mean: Annotated[list[float], msgspec.Meta(min_length=3, max_length=3)] = msgspec.field(
        default_factory=lambda: [0.0] * 3
    )
    std: Annotated[list[Annotated[float, msgspec.Meta(gt=0.0)]], msgspec.Meta(min_length=3, max_length=3)] = (
        msgspec.field(default_factory=lambda: [1.0] * 3)
    )
    logits: bool = True
    scalars: Scalars = []
    unseen: bool = False


def check_training(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a training run, complete and within their bounds.

    Raises:
        InputError: `training.bad_option`, with the option, its allowed values and the given one.
    """
    request = _checked(values, TrainRequest, "training.bad_option")
    _check_scalars(values.get("scalars"), "training.bad_option")
    return dict(msgspec.to_builtins(request))


def check_import(path: str | Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of an import, after the checks that need no model.

    Args:
        path: The model's file, on this machine.
        values: The settings.

    Raises:
        InputError: `import.bad_settings`, `import.unreadable`.
    """
    _checked(values, ImportRequest, "import.bad_settings")
    _check_scalars(values.get("scalars"), "import.bad_settings")
    if len(values.get("classes", ())) == 1:
        raise InputError(
            "import.bad_settings",
            "The option `classes` is not usable.",
            expected=_EXPECTED["classes"],
            got=repr(values["classes"])[:120],
        )
    if not _is_file(path):
        raise InputError("import.unreadable", "There is no such file.", expected="an .onnx file", got=str(path)[:200])
    return dict(values)


_EXPECTED: Final = {
    "name": f"letters, digits, `.`, `_`, `-`, at most {MAX_NAME}",
    "seed": f"a whole number, 0 to {MAX_SEED}",
    "effort": "quick or standard",
    "folds": "a whole number, 2 to 50",
    "good_class": f"a class name of at most {MAX_NAME} characters",
    "abstain_budget": "a share, 0 to 1",
    "precision": "float32 or int8",
    "classes": "two or more class names, or none where the model's file names them",
    "scalars": f"at most {MAX_SCALARS} different names of columns in small letters, digits and `_`, such as weight_g",
    "data": "a folder",
    "view_px": "a whole number, 16 to 512",
    "layout": "nchw or nhwc",
    "channels": "rgb or bgr",
    "scale": "a number above 0",
    "mean": "three numbers",
    "std": "three numbers above 0",
    "logits": "true or false",
    "unseen": "true or false",
}


def _checked(values: Mapping[str, Any], kind: type[msgspec.Struct], code: str) -> msgspec.Struct:
    try:
        return msgspec.convert(dict(values), kind)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        option = where.rstrip("`").partition("[")[0]
        if option not in _EXPECTED:
            raise InputError(code, f"The options are not usable: {message}.", expected=", ".join(_EXPECTED)) from error
        got = repr(values.get(option))[:120]
        raise InputError(code, f"The option `{option}` is not usable.", expected=_EXPECTED[option], got=got) from error


def _check_scalars(names: list[str] | None, code: str) -> None:
    if names and len(set(names)) < len(names):
        raise InputError(code, "The option `scalars` is not usable.", expected=_EXPECTED["scalars"], got=names)


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except ValueError:  # a NUL in the name
        return False
