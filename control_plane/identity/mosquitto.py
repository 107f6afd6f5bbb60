"""The profile of mosquitto: the rules of the embedded broker in mosquitto's configuration.

`mosquitto.conf` is written once and is the operator's to extend; `acl`, `crl.pem` and the certificates follow every
enrolment and revocation, and mosquitto reads them on SIGHUP. Each agent has a block of its own in `acl`; a client
without one has no rights. The rules are those of `control_plane.broker.access`; one test runs against both brokers.
"""

import logging
import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from control_plane.broker.access import AGENT_PUBLISHES, AGENT_RECEIVES
from control_plane.identity.authority import SITE, Authority
from control_plane.identity.publication import Admission
from models.errors import ConfigError
from models.files import write_atomically
from models.topics import ROOT, TRUST_TOPIC, bin_of, bin_topic

log = logging.getLogger("sortline.identity")
CONF: Final = "mosquitto.conf"
ACL: Final = "acl"
_COPIED: Final = {"ca.pem": 0o644, "server.pem": 0o600, "crl.pem": 0o644}
_MEBIBYTE: Final = 1024 * 1024

_CONF = """\
# Written by `sortline broker mosquitto-profile`, not overwritten. Mutual TLS only: a certificate's common name is
# the user and the client id, so that no agent can take over the session of another.
per_listener_settings false
listener {port}{host}
cafile {folder}/ca.pem
certfile {folder}/server.pem
keyfile {folder}/server.pem
crlfile {folder}/crl.pem
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
acl_file {folder}/acl

# A packet before authentication may not be larger either: without this, four clients without any right take 200 MB.
max_packet_size {packet}
max_queued_bytes {queued}
max_queued_messages 10000
max_inflight_messages 32
max_connections 2000
max_keepalive 60
set_tcp_nodelay true

# The broker is a cache: the control plane's sentinel notices an empty store and publishes everything again.
persistence false
pid_file {folder}/mosquitto.pid
log_type error
log_type warning
log_type notice
"""


def access_list(agents: Iterable[str], planes: Iterable[str]) -> str:
    """Returns the text of `acl`: the control plane's connections, then a block for each agent."""
    blocks = ["# Follows every enrolment and revocation; do not edit."]
    blocks += [f"user {name}\ntopic readwrite sortline/#\ntopic read $SYS/#" for name in planes]
    shared = (TRUST_TOPIC, f"{ROOT}/sentinel", f"{ROOT}/blobs/+")
    for agent in agents:
        own = f"{ROOT}/agents/{agent}"
        lines = [f"user {agent}"]
        lines += [f"topic write {own}/{channel}" for channel in sorted(AGENT_PUBLISHES)]
        lines += [f"topic read {own}/{channel}" for channel in sorted(AGENT_RECEIVES)]
        lines += [f"topic read {topic}" for topic in (*shared, bin_topic(bin_of(agent)))]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def write_profile(authority: Authority, folder: Path, *, host: str = "", port: int = 8883) -> None:
    """Writes the profile: the configuration where there is none, everything else again.

    A configuration that names another folder (the control plane was moved) gets this one; the rest of it stays.

    Args:
        authority: The authority, with its site files.
        folder: Folder of the profile; made when it does not exist.
        host: Address to listen on; empty = all.
        port: Port for mutual TLS.

    Raises:
        ConfigError: `ca.unreadable`.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    conf = folder / CONF
    if conf.exists():
        _follow_move(conf, folder)
    else:
        text = _CONF.format(
            port=port,
            host=f" {host}" if host else "",
            folder=folder,
            packet=_MEBIBYTE,
            queued=64 * _MEBIBYTE,
        )
        write_atomically(conf, text.encode())
    update_profile(authority.folder / SITE, folder)


def _follow_move(conf: Path, folder: Path) -> None:
    """Replaces the paths of a configuration that was written for another folder by those of this one."""
    text = conf.read_text(encoding="utf-8")
    named = re.search(r"^cafile (.+)/ca\.pem$", text, re.MULTILINE)
    if named is not None and named[1] != str(folder):
        write_atomically(conf, text.replace(f" {named[1]}/", f" {folder}/").encode())
        log.info("%s named files in %s; it names those in %s now: restart mosquitto", conf, named[1], folder)


def update_profile(site: Path, folder: Path) -> bool:
    """Brings access list, revocations and certificates up to date and signals a running mosquitto.

    Returns:
        Whether anything changed.

    Raises:
        ConfigError: `ca.unreadable`.
    """
    try:
        admission = msgspec.json.decode((site / "admission.json").read_bytes(), type=Admission)
        wanted = {name: (site / name).read_bytes() for name in _COPIED}
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError("ca.unreadable", f"{site} cannot be read.", expected="site files", got=error) from error
    wanted[ACL] = access_list(admission.agents, admission.control_planes).encode()
    changed = False
    for name, data in wanted.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != data:
            write_atomically(path, data, mode=_COPIED.get(name, 0o600))
            changed = True
    if changed:
        _tell(folder / "mosquitto.pid")
    return changed


def _tell(pid_file: Path) -> None:
    """Sends SIGHUP: mosquitto reads access list, revocations and its own certificate again; connections stay."""
    try:
        pid = int(pid_file.read_text(encoding="ascii"))
        if "mosquitto" not in Path(f"/proc/{pid}/comm").read_text(encoding="utf-8"):
            return  # the file was left by an earlier process
        os.kill(pid, signal.SIGHUP)
    except (OSError, ValueError) as error:
        log.info("mosquitto was not signalled (it does not run here): %s", error)
