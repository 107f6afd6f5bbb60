// The live list of alarms: the server renders every row; this module puts them into the order it is told.
// A silent stream is said, never hidden.
const body = document.getElementById("alarms");
const none = document.getElementById("none");
const banner = document.getElementById("stale");
let lastEvent = Date.now();
let offset = 0; // server clock minus this browser's, so that ages are the server's

const age = (seconds) => {
  if (seconds < 2) return "1 s";
  if (seconds < 100) return `${Math.floor(seconds)} s`;
  if (seconds < 6000) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} d`;
};

const apply = ({ order, rows }) => {
  for (const { id, html } of rows) {
    const holder = document.createElement("tbody");
    holder.innerHTML = html; // rendered and escaped by the server's own template
    const old = body.querySelector(`[data-alarm="${id}"]`);
    if (old) old.replaceWith(holder.firstElementChild); else body.append(holder.firstElementChild);
  }
  const wanted = new Set(order.map(String));
  for (const row of [...body.rows]) if (!wanted.has(row.dataset.alarm)) row.remove();
  const sorted = order.map((id) => body.querySelector(`[data-alarm="${id}"]`)).filter(Boolean);
  if (sorted.some((row, k) => row !== body.rows[k])) body.append(...sorted);
  none.hidden = order.length > 0;
};

const tick = () => {
  const now = Date.now();
  for (const cell of body.querySelectorAll("[data-at]")) {
    cell.textContent = cell.dataset.at === "0" ? "never" : `${age((now + offset - Number(cell.dataset.at)) / 1000)} ago`;
  }
  banner.hidden = now - lastEvent < 10000;
  document.getElementById("stale-age").textContent = age((now - lastEvent) / 1000);
};

window.sortlineStream.follow("/alarms/events", ["alarms", "tick"], (name, data) => {
  lastEvent = Date.now();
  if (name === "alarms") { apply(JSON.parse(data)); tick(); } else { offset = Number(data) - lastEvent; }
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) lastEvent = Date.now(); });
tick();
setInterval(tick, 1000);
