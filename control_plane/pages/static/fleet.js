// Live fleet table: the server renders every row; this module replaces the rows that changed.
// One EventSource, no polling. When the stream is silent the page says so and ages keep growing: nothing stays green.
const body = document.getElementById("rows");
const search = document.getElementById("find");
const banner = document.getElementById("stale");
const prefix = document.body.dataset.root;
const tiles = [...document.querySelectorAll(".tile")];
let lastEvent = Date.now();
let offset = 0; // server clock minus this browser's, so that ages are the server's
let wanted = new URLSearchParams(location.search).get("state") || "";

const age = (seconds) => {
  if (seconds < 2) return "now";
  if (seconds < 100) return `${Math.floor(seconds)} s`;
  if (seconds < 6000) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} d`;
};

const filter = () => {
  const text = search.value.trim().toLowerCase();
  for (const row of body.rows) {
    if (!row.dataset.agent) continue;
    const matches = !text || row.textContent.toLowerCase().includes(text);
    row.hidden = !(matches && (!wanted || row.dataset.state === wanted));
  }
  for (const tile of tiles) tile.setAttribute("aria-pressed", String(tile.dataset.state === wanted));
};

const count = () => {
  for (const tile of tiles) {
    const n = body.querySelectorAll(`tr[data-state="${tile.dataset.state}"]`).length;
    tile.dataset.count = n;
    tile.querySelector("b").textContent = n;
  }
};

const replace = (rows) => {
  for (const { id, html } of rows) {
    const holder = document.createElement("tbody");
    holder.innerHTML = html; // rendered and escaped by the server's own template
    const fresh = holder.firstElementChild;
    const old = body.querySelector(`tr[data-agent="${CSS.escape(id)}"]`);
    const focused = old && old.contains(document.activeElement);
    if (old) old.replaceWith(fresh); else body.append(fresh);
    if (focused) fresh.querySelector("a")?.focus();
  }
  document.getElementById("none")?.remove();
  const sorted = [...body.rows].sort((a, b) => (a.dataset.order < b.dataset.order ? -1 : a.dataset.order > b.dataset.order ? 1 : 0));
  if (sorted.some((row, i) => row !== body.rows[i])) body.append(...sorted);
  count();
  filter();
};

const tick = () => {
  const now = Date.now();
  for (const cell of body.querySelectorAll("[data-at]")) {
    cell.textContent = cell.dataset.at === "0" ? "never" : age((now + offset - Number(cell.dataset.at)) / 1000);
  }
  banner.hidden = now - lastEvent < 10000;
  document.getElementById("stale-age").textContent = age((now - lastEvent) / 1000);
};

const source = new EventSource(`${prefix}/events`);
source.addEventListener("rows", (event) => { lastEvent = Date.now(); replace(JSON.parse(event.data)); tick(); });
source.addEventListener("tick", (event) => { lastEvent = Date.now(); offset = Number(event.data) - lastEvent; });

search.addEventListener("input", filter);
for (const tile of tiles) tile.addEventListener("click", () => {
  wanted = wanted === tile.dataset.state ? "" : tile.dataset.state;
  history.replaceState(null, "", wanted ? `?state=${wanted}` : location.pathname);
  filter();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== search) { event.preventDefault(); search.focus(); }
});
filter();
tick();
setInterval(tick, 1000);
