# The agent of one line. The context is the repository, or a folder made by deploy/kit.sh: then the build needs no network.
#   docker build -f deploy/docker/agent.Dockerfile -t sortline-agent .
# buildah and podman keep the health check only with --format docker.
# Any Debian or Ubuntu with Python 3.11 or newer and its venv package will do as BASE.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
RUN groupadd --gid 10001 sortline-agent \
 && useradd --uid 10001 --gid 10001 --home-dir /var/lib/sortline-agent --no-create-home --shell /usr/sbin/nologin sortline-agent
RUN --mount=type=bind,target=/src bash /src/deploy/install.sh agent --with-devices \
 && rm -rf /etc/systemd/system/sortline-*
ENV ORT_DISABLE_TELEMETRY=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/sortline-agent \
    SORTLINE_HEARTBEAT_FILE=/tmp/heartbeat
USER 10001:10001
WORKDIR /var/lib/sortline-agent
VOLUME ["/var/lib/sortline-agent"]
# The supervisor's loop touches the file every two seconds.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=2 \
  CMD test -n "$(find /tmp/heartbeat -newermt '30 seconds ago')"
ENTRYPOINT ["/usr/local/bin/sortline-agent"]
CMD ["run", "--config", "/etc/sortline/agent.toml"]
