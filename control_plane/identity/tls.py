"""TLS contexts of the control plane's own programs, made from the site's files and renewed when they change."""

import ssl
from pathlib import Path

from models.errors import ConfigError


def server_context(server_pem: Path) -> ssl.SSLContext:
    """Returns a server context for TLS 1.2 or newer, with this key and chain.

    Raises:
        ConfigError: `site.bad_certificate`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_pair(context, server_pem)
    return context


def load_pair(context: ssl.SSLContext, pem: Path) -> None:
    """Loads key and chain into a context; later connections use them.

    Raises:
        ConfigError: `site.bad_certificate`.
    """
    try:
        context.load_cert_chain(pem)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            "site.bad_certificate", f"{pem} cannot be used.", expected="a key and its chain, PEM", got=error
        ) from error


def client_context(folder: Path, stem: str) -> ssl.SSLContext:
    """Returns a context for the broker that trusts `ca.pem` and presents `<stem>.pem`.

    Raises:
        ConfigError: `site.bad_certificate`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_client(context, folder / f"{stem}.pem")
    return context


def load_client(context: ssl.SSLContext, pair: Path) -> None:
    """Reads trust (beside the pair) and pair again.

    Raises:
        ConfigError: `site.bad_certificate`.
    """
    load_pair(context, pair)
    anchors = pair.with_name("ca.pem")
    try:
        context.load_verify_locations(cafile=anchors)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            "site.bad_certificate", f"{anchors} cannot be used.", expected="root certificates, PEM", got=error
        ) from error
