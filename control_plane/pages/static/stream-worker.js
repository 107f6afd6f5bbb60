// Holds one EventSource per path for all tabs of this browser and hands its events to those that are looked at.
// A tab says "watch" when it comes into view, "alive" while it is there, "leave" when it goes; a silent one is gone.
const SILENT_MS = 45000;
const streams = new Map();

const close = (stream) => { stream.source?.close(); stream.source = null; };

const open = (path, stream, since) => {
  close(stream);
  stream.source = new EventSource(`${path}?since=${encodeURIComponent(since)}`);
  for (const name of stream.names) {
    stream.source.addEventListener(name, (event) => {
      stream.version = event.lastEventId || stream.version;
      for (const port of stream.ports.keys()) port.postMessage({ name, data: event.data, id: event.lastEventId });
    });
  }
};

self.addEventListener("connect", ({ ports: [port] }) => {
  port.addEventListener("message", ({ data: { what, path, names, since } }) => {
    if (!streams.has(path)) streams.set(path, { source: null, names, version: "", ports: new Map() });
    const stream = streams.get(path);
    if (what === "leave") {
      stream.ports.delete(port);
      if (!stream.ports.size) close(stream);
      return;
    }
    const known = stream.ports.has(port);
    stream.ports.set(port, Date.now());
    // A tab that may have missed something: the stream begins again where that tab stopped; the others get that twice.
    // A stream without versions begins again from the start.
    if (!stream.source || (!known && (since === "" || since !== stream.version))) open(path, stream, since);
  });
  port.start();
});

setInterval(() => {
  const oldest = Date.now() - SILENT_MS;
  for (const stream of streams.values()) {
    for (const [port, at] of stream.ports) if (at < oldest) stream.ports.delete(port);
    if (!stream.ports.size) close(stream);
  }
}, SILENT_MS / 3);
