# Control plane, worker and embedded broker: one image, three commands (serve, worker, broker run).
# The context is the repository, or a folder made by deploy/kit.sh: then the build needs no network.
#   docker build -f deploy/docker/control-plane.Dockerfile -t sortline-control-plane .
# buildah and podman keep the health check only with --format docker.
# Any Debian or Ubuntu with Python 3.11 or newer and its venv package will do as BASE.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
RUN groupadd --gid 10002 sortline \
 && useradd --uid 10002 --gid 10002 --home-dir /var/lib/sortline --no-create-home --shell /usr/sbin/nologin sortline \
 && install -d -m 0700 -o sortline -g sortline /var/lib/sortline /var/lib/sortline/mosquitto
RUN --mount=type=bind,target=/src bash /src/deploy/install.sh control-plane \
 && rm -rf /etc/systemd/system/sortline-*
ENV ORT_DISABLE_TELEMETRY=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/sortline \
    SORTLINE_HEARTBEAT_FILE=/tmp/heartbeat
USER 10002:10002
WORKDIR /var/lib/sortline
VOLUME ["/var/lib/sortline"]
EXPOSE 8080 8443 8883
# The loop that answers requests (or serves connections, or claims jobs) touches the file every two seconds.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=2 \
  CMD test -n "$(find /tmp/heartbeat -newermt '30 seconds ago')"
ENTRYPOINT ["/usr/local/bin/sortline"]
CMD ["serve", "--config", "/etc/sortline/control-plane.toml"]
