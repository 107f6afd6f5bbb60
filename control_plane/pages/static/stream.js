// One stream of events for all tabs of this browser, open only while one of them is looked at.
// A shared worker holds the stream, because a browser opens few connections to one server and a stream keeps one.
// Where there is no shared worker, the tab opens its own. Loaded before the module of the page, which finds `follow`.
const prefix = document.body.dataset.root;
const version = new URL(import.meta.url).search;
const ALIVE_MS = 15000;

const own = (path, names, hear, known) => {
  let source = null;
  const open = () => {
    if (source || document.hidden) return;
    source = new EventSource(`${path}?since=${encodeURIComponent(known())}`);
    for (const name of names) source.addEventListener(name, (event) => hear(name, event.data, event.lastEventId));
  };
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) { source?.close(); source = null; } else open();
  });
  open();
};

const shared = (path, names, hear, known) => {
  const { port } = new SharedWorker(`${prefix}/static/stream-worker.js${version}`, { name: "sortline" });
  const say = (what) => port.postMessage({ what, path, names, since: known() });
  port.addEventListener("message", ({ data }) => hear(data.name, data.data, data.id));
  port.start();
  document.addEventListener("visibilitychange", () => say(document.hidden ? "leave" : "watch"));
  window.addEventListener("pagehide", () => say("leave"));
  window.addEventListener("pageshow", (event) => { if (event.persisted && !document.hidden) say("watch"); });
  setInterval(() => { if (!document.hidden) say("alive"); }, ALIVE_MS);
  if (!document.hidden) say("watch");
};

// path: of the stream; names: of its events; hear(name, data, id); known(): the version this page has.
const follow = (path, names, hear, known = () => "") => {
  const start = typeof SharedWorker === "undefined" ? own : shared;
  start(`${prefix}${path}`, names, hear, known);
};

window.sortlineStream = { follow };
