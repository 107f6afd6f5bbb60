#!/usr/bin/env bash
# Installs, upgrades, rolls back or removes Sortline's services on a machine with systemd; see docs/install.md.
# Run again with the same files it changes nothing. A release is a folder of its own below /opt/sortline/releases; what
# runs is decided by one symbolic link, replaced atomically, so that an interrupted run leaves what was there before.
set -euo pipefail
umask 022

usage() {
  cat <<'TEXT'
usage: deploy/install.sh agent|control-plane [OPTIONS]            install or upgrade
       deploy/install.sh rollback agent|control-plane [OPTIONS]   back to the release before
       deploy/install.sh uninstall agent|control-plane [OPTIONS]  remove; configuration and data stay (but --purge)

  --wheelhouse DIR  install from the wheels in this folder, without network (default: the kit's own folder, if any)
  --with-devices    agent: drivers for PLCs (Modbus/TCP) and for valves on the box's own pins
  --python PROGRAM  Python 3.11 or newer that the release runs on (default: python3)
  --root DIR        install below DIR instead of /, to be run from there; no user is made, no service is started
  --user NAME       account the services run as (default: sortline-agent, sortline)
  --purge           uninstall: configuration, state, keys and the account go too
  --dry-run         print what would be done and change nothing
TEXT
}

fail() { echo "install.sh: $*" >&2; exit 1; }
say() { echo "$*" >&2; }
run() {
  if [ "$dry_run" = 1 ]; then echo "would run: $*"; else "$@"; fi
}

action=install
case "${1:-}" in
  rollback | uninstall) action=$1; shift ;;
  -h | --help) usage; exit 0 ;;
esac
role=${1:-}
case "$role" in
  agent) user=sortline-agent lock=agent entry=sortline-agent state=sortline-agent ;;
  control-plane) user=sortline lock=runtime entry=sortline state=sortline ;;
  *) usage >&2; exit 2 ;;
esac
shift

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheelhouse='' python=python3 root='' dry_run=0 purge=0 devices=0
[ -d "$here/wheelhouse" ] && wheelhouse=$here/wheelhouse
while [ $# -gt 0 ]; do
  case "$1" in
    --wheelhouse | --python | --root | --user) [ $# -ge 2 ] || fail "$1 needs a value" ;;
  esac
  case "$1" in
    --wheelhouse) wheelhouse=$(cd "$2" && pwd) || fail "there is no folder $2"; shift ;;
    --python) python=$2; shift ;;
    --root) root=$2; shift ;;
    --user) user=$2; shift ;;
    --with-devices) devices=1 ;;
    --purge) purge=1 ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option $1 (--help lists them)" ;;
  esac
  shift
done
if [ -n "$root" ]; then
  [ "$dry_run" = 1 ] || mkdir -p "$root"
  root=$(realpath -m "$root")
fi

prefix=$root/opt/sortline
active=$prefix/$role
previous=$prefix/$role.previous
config=$root/etc/sortline/$role.toml
data=$root/var/lib/$state
units=$root/etc/systemd/system
command=$root/usr/local/bin/$entry
if [ "$role" = agent ]; then
  services=(sortline-agent.service)
else
  services=(sortline-control-plane.service sortline-broker.service sortline-mosquitto.service sortline-worker@.service)
fi

live() { [ -z "$root" ] && [ -d /run/systemd/system ]; }
account_exists() { getent passwd "$user" >/dev/null; }

# The link is replaced by a rename: at no moment is there none.
point() {
  run ln -sfn "$2" "$1.new"
  run mv -Tf "$1.new" "$1"
}

restart_what_ran() {
  live || return 0
  run systemctl daemon-reload
  for unit in "${services[@]}"; do
    case "$unit" in *@.service) unit='sortline-worker@*.service' ;; esac
    run systemctl try-restart "$unit"
  done
}

uninstall() {
  if live; then
    for unit in "${services[@]}"; do
      case "$unit" in
        *@.service) run systemctl stop 'sortline-worker@*.service' ;;
        *) run systemctl disable --now "$unit" 2>/dev/null || true ;;
      esac
    done
    # A line whose supervisor was killed earlier may still run.
    [ "$role" != agent ] || run systemctl kill sortline-agent.service 2>/dev/null || true
  fi
  for unit in "${services[@]}"; do run rm -f "$units/$unit"; done
  run rm -f "$command" "$active" "$previous"
  for folder in "$prefix/releases/$role"-*; do
    [ ! -e "$folder" ] || run rm -rf "$folder"
  done
  run rmdir --ignore-fail-on-non-empty "$prefix/releases" "$prefix" 2>/dev/null || true
  if [ "$purge" = 1 ]; then
    run rm -rf "$config" "$data"
    run rmdir --ignore-fail-on-non-empty "$root/etc/sortline" 2>/dev/null || true
    if [ -z "$root" ] && account_exists; then run userdel "$user"; fi
    say "$role: removed, with its configuration and its data"
  else
    say "$role: removed; $config and $data are left (--purge removes them too)"
  fi
  ! live || run systemctl daemon-reload
}

rollback() {
  [ -L "$previous" ] || fail "there is no release before this one"
  local target now
  target=$(readlink "$previous") now=$(readlink "$active")
  [ -x "$target/bin/$entry" ] || fail "$target is not complete"
  point "$active" "$target"
  point "$previous" "$now"
  restart_what_ran
  say "$role: runs $(basename "$target") again"
}

check_machine() {
  [ -n "$root" ] || [ "$(id -u)" = 0 ] || [ "$dry_run" = 1 ] || fail "root is needed (or --root DIR)"
  [ "$(uname -s)" = Linux ] || fail "this is no Linux"
  command -v "$python" >/dev/null || fail "there is no $python; --python names another"
  python=$(command -v "$python")
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || fail "Python 3.11 or newer is needed, $python is $("$python" -V 2>&1)"
  "$python" -c 'import venv, ensurepip' 2>/dev/null \
    || fail "$python cannot make environments: install its venv package (Debian, Ubuntu: apt install python3-venv)"
  [ -f "$here/requirements/$lock.lock" ] || fail "$here/requirements/$lock.lock is missing: the files are not complete"
  local place=$root/opt free_kb
  while [ ! -d "$place" ]; do place=$(dirname "$place"); done
  free_kb=$(df -Pk "$place" | awk 'NR == 2 { print $4 }')
  [ "$free_kb" -gt 1500000 ] || fail "$place has $((free_kb / 1024)) MB free, 1500 are needed"
}

find_wheel() {
  [ -z "$wheelhouse" ] || find "$wheelhouse" -maxdepth 1 -name 'sortline-*.whl' | sort | tail -1
}

# What a release is made of: the locks, and the project's wheel or sources. Equal content has an equal name.
release_name() {
  local version digest
  if [ -n "$wheel" ]; then
    version=$(basename "$wheel" | cut -d- -f2)
  else
    [ -f "$here/pyproject.toml" ] || fail "there is neither a wheel of Sortline in the wheelhouse nor its sources"
    version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$here/pyproject.toml")
  fi
  digest=$({
    "$python" -V
    echo "devices=$devices"
    cat "$here/requirements/$lock.lock" "$here/requirements/devices.lock"
    if [ -n "$wheel" ]; then cat "$wheel"; else
      cd "$here" && find pyproject.toml models edge_agent control_plane -type f ! -name '*.pyc' -print0 \
        | sort -z | xargs -0 sha256sum
    fi
  } | sha256sum | cut -c1-8)
  echo "$role-$version-$digest"
}

build_release() {
  local release=$1 pip
  local options=(--quiet --disable-pip-version-check --no-input --no-cache-dir)
  [ -z "$wheelhouse" ] || options+=(--no-index --find-links "$wheelhouse")
  pip=$release/bin/pip
  run rm -rf "$release"
  run mkdir -p "$prefix/releases"
  # A release that is not complete must not be taken for one after an interruption.
  unfinished=$release
  [ "$dry_run" = 1 ] || trap 'rm -rf "$unfinished"' EXIT
  run "$python" -m venv "$release"
  run "$pip" install "${options[@]}" --require-hashes -r "$here/requirements/$lock.lock"
  [ "$devices" = 0 ] || run "$pip" install "${options[@]}" --require-hashes -r "$here/requirements/devices.lock"
  # The build tool comes from the lock as well: nothing is downloaded here.
  run "$pip" install "${options[@]}" --no-deps --no-build-isolation "${wheel:-$here}"
  run "$release/bin/python" -m compileall -q "$release/lib"
  run "$release/bin/$entry" --help >/dev/null
  run touch "$release/.complete"
  trap - EXIT
}

install_account() {
  if [ -z "$root" ] && ! account_exists; then
    run useradd --system --user-group --home-dir "$data" --no-create-home --shell /usr/sbin/nologin "$user"
  fi
}

# A Python below somebody's home would install well and fail at the first start.
check_account_can_run_python() {
  if [ "$(id -u)" != 0 ] || [ "$dry_run" = 1 ] || ! account_exists; then return 0; fi
  setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups "$(realpath "$python")" -c '' 2>/dev/null \
    || fail "$user cannot run $(realpath "$python"): install Python for everyone, or name another (--python)"
}

# The files in the sources name the places of a normal installation; another root or account is written into the copies.
install_files() {
  local group=root owner=root
  account_exists && group=$(id -gn "$user") owner=$user
  [ "$(id -u)" = 0 ] || { group=$(id -gn); owner=$(id -un); }
  run install -d -m 0755 "$root/etc/sortline" "$units" "$root/usr/local/bin"
  run install -d -m 0700 -o "$owner" -g "$group" "$data"
  if [ ! -e "$config" ]; then
    write_with_places "$here/deploy/config/$role.toml" "$config"
    run chgrp "$group" "$config"
    run chmod 0640 "$config"
  fi
  for unit in "${services[@]}"; do
    write_with_places "$here/deploy/systemd/$unit" "$units/$unit"
  done
  run ln -sfn "$active/bin/$entry" "$command"
}

write_with_places() {
  if [ "$dry_run" = 1 ]; then echo "would write: $2"; return; fi
  sed -e "s|/opt/sortline|$prefix|g" -e "s|/etc/sortline|$root/etc/sortline|g" \
    -e "s|/var/lib/sortline|$root/var/lib/sortline|g" -e "s|^User=.*|User=$user|" "$1" >"$2.new"
  mv -f "$2.new" "$2"
}

remove_old_releases() {
  for folder in "$prefix/releases/$role"-*; do
    [ -d "$folder" ] || continue
    case "$folder" in
      "$(readlink "$active")" | "$(readlink "$previous" 2>/dev/null || true)") ;;
      *) run rm -rf "$folder" ;;
    esac
  done
}

install_release() {
  check_machine
  local name release now wheel
  wheel=$(find_wheel)
  name=$(release_name)
  release=$prefix/releases/$name
  now=$(readlink "$active" 2>/dev/null || true)
  install_account
  check_account_can_run_python
  if [ -e "$release/.complete" ]; then say "$role: $name is there already"; else build_release "$release"; fi
  install_files
  if [ "$now" != "$release" ]; then
    [ -z "$now" ] || point "$previous" "$now"
    point "$active" "$release"
  fi
  restart_what_ran
  [ "$dry_run" = 1 ] || remove_old_releases
  say "$role: $name is installed${now:+ (before: $(basename "$now"))}"
  next_steps
}

next_steps() {
  [ "$dry_run" = 0 ] || return 0
  say "  configuration  $config"
  say "  data           $data"
  live || return 0
  systemctl --quiet is-enabled "${services[0]}" 2>/dev/null && return
  if [ "$role" = agent ]; then
    say "Next: edit the configuration, enrol the box, start it:"
    say "  sudo -u $user $entry enrol --config $config --control-plane https://HOST:8443 --token -"
  else
    say "Next: make certificates and keys (docs/install.md), start it:"
  fi
  say "  systemctl enable --now ${services[0]}"
}

case "$action" in
  install) install_release ;;
  rollback) rollback ;;
  uninstall) uninstall ;;
esac
