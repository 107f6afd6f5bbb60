"""Which HTTP status an error of ours becomes: one table for every listener."""

from typing import Final

from models.errors import (
    BundleError,
    CapacityError,
    ConfigError,
    ConflictError,
    InputError,
    MessageError,
    SortlineError,
    TrustError,
    UnavailableError,
)

STATUS: Final[dict[type[SortlineError], int]] = {
    InputError: 422,
    BundleError: 422,
    MessageError: 422,
    TrustError: 422,
    ConfigError: 500,
    ConflictError: 409,
    UnavailableError: 503,
    CapacityError: 507,
}


def status_of(error: SortlineError) -> int:
    """Returns the status; what is unknown is 404."""
    if error.code.endswith((".unknown", ".unknown_version")):
        return 404
    if error.code == "api.oversize":
        return 413
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
