// Live fleet table: the server renders every cell; this module replaces the parts of rows that changed.
// When the stream is silent the page says so and ages keep growing: nothing stays green.
const body = document.getElementById("rows");
const search = document.getElementById("find");
const banner = document.getElementById("stale");
const behind = document.getElementById("behind");
const { follow } = window.sortlineStream;
const tiles = [...document.querySelectorAll(".tile")];
let lastEvent = Date.now();
let version = body.dataset.version;
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

const cellsOf = (html) => {
  const holder = document.createElement("tbody");
  holder.innerHTML = `<tr>${html}</tr>`; // rendered and escaped by the server's own template
  return [...holder.firstElementChild.cells];
};
const WHO = 6; // cells from the state to the model; then items per second, five of figures, window, seen
const RATE = 6;
const FIGURES = 7;
const TIMES = 12;

const make = (id) => {
  const row = body.insertRow();
  row.dataset.agent = id;
  for (let k = 0; k < TIMES + 2; k += 1) row.insertCell();
  for (const k of [RATE, TIMES, TIMES + 1]) row.cells[k].className = "n";
  return row;
};

const rowOf = new Map([...body.rows].filter((row) => row.dataset.agent).map((row) => [row.dataset.agent, row]));
const put = (row, first, html) => cellsOf(html).forEach((cell, k) => {
  const old = row.cells[first + k];
  if (old.innerHTML === cell.innerHTML && old.title === cell.title) return;
  const focused = old.contains(document.activeElement);
  old.replaceWith(cell);
  if (focused) cell.querySelector("a")?.focus();
});

const apply = ({ rows, gone, all }) => {
  document.getElementById("none")?.remove();
  document.getElementById("more")?.remove();
  const present = new Set(rows.map((part) => part.id));
  const leaving = all ? [...rowOf.keys()].filter((id) => !present.has(id)) : gone;
  for (const id of leaving) { rowOf.get(id)?.remove(); rowOf.delete(id); }
  let moved = leaving.length > 0;
  for (const part of rows) {
    const row = rowOf.get(part.id) || make(part.id);
    rowOf.set(part.id, row);
    if (part.who !== undefined) {
      moved = moved || row.dataset.order !== part.order || row.dataset.state !== part.state;
      row.dataset.order = part.order;
      row.dataset.state = part.state;
      put(row, 0, part.who);
    }
    if (part.rate !== undefined) row.cells[RATE].textContent = part.rate;
    if (part.figures !== undefined) put(row, FIGURES, part.figures);
    if (part.times !== undefined) part.times.forEach((at, k) => { row.cells[TIMES + k].dataset.at = at; });
  }
  if (moved) {
    const sorted = [...rowOf.values()].sort((a, b) => (a.dataset.order < b.dataset.order ? -1 : a.dataset.order > b.dataset.order ? 1 : 0));
    if (sorted.some((row, k) => row !== body.rows[k])) body.append(...sorted);
    document.getElementById("total").textContent = rowOf.size;
    count();
    filter();
  }
};

const say = ({ waiting, delay_s: delay, shed }) => {
  behind.hidden = waiting === undefined;
  if (behind.hidden) return;
  const late = waiting && delay >= 5 ? `${waiting} messages wait to be stored, the oldest for ${age(delay)}. ` : "";
  const left = shed ? `${shed} batches of the last minute were left to their agents, which keep them and send them again.` : "";
  behind.textContent = `The control plane is behind: ${late}${left}`;
};

const tick = () => {
  const now = Date.now();
  for (const cell of body.querySelectorAll("[data-at]")) {
    cell.textContent = cell.dataset.at === "0" ? "never" : age((now + offset - Number(cell.dataset.at)) / 1000);
  }
  banner.hidden = now - lastEvent < 10000;
  document.getElementById("stale-age").textContent = age((now - lastEvent) / 1000);
};

follow("/events", ["rows", "tick"], (name, data, id) => {
  lastEvent = Date.now();
  const found = JSON.parse(data);
  if (name === "rows") { apply(found); version = id; } else { offset = found.now - lastEvent; say(found); }
  if (name === "rows") tick();
}, () => version);
// A tab that was hidden heard nothing on purpose.
document.addEventListener("visibilitychange", () => { if (!document.hidden) lastEvent = Date.now(); });

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
