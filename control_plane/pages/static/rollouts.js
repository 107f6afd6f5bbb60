// Live cards of rollouts: the server renders every card; this module replaces those that changed, and calls the API.
// Opened details and a reason that is being typed survive a replacement. A silent stream is said, never hidden.
const { get, send, attempt } = window.sortline;
const cards = document.getElementById("cards");
const banner = document.getElementById("stale");
let lastEvent = Date.now();
let offset = 0; // server clock minus this browser's, so that ages are the server's

const age = (seconds) => {
  if (seconds < 2) return "1 s";
  if (seconds < 100) return `${Math.floor(seconds)} s`;
  if (seconds < 6000) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} d`;
};

const replace = (changed) => {
  for (const { id, html } of [...changed].reverse()) {
    const holder = document.createElement("div");
    holder.innerHTML = html; // rendered and escaped by the server's own template
    const fresh = holder.firstElementChild;
    const old = cards.querySelector(`[data-rollout="${id}"]`);
    if (!old) { cards.prepend(fresh); continue; }
    fresh.querySelector("details").open = old.querySelector("details").open;
    const [before, after] = [old.querySelector(".reason"), fresh.querySelector(".reason")];
    if (before && after) after.value = before.value;
    const [chosen, choice] = [old.querySelector(".safe"), fresh.querySelector(".safe")];
    if (chosen && choice) choice.value = chosen.value;
    const focused = before && before === document.activeElement;
    old.replaceWith(fresh);
    if (focused) after?.focus();
  }
  document.getElementById("none")?.remove();
};

const tick = () => {
  const now = Date.now();
  for (const cell of document.querySelectorAll("[data-at]")) {
    cell.textContent = cell.dataset.at === "0" ? "never" : age((now + offset - Number(cell.dataset.at)) / 1000);
  }
  banner.hidden = now - lastEvent < 10000;
  document.getElementById("stale-age").textContent = age((now - lastEvent) / 1000);
};

cards.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-act]");
  if (!button) return;
  const card = button.closest("[data-rollout]");
  const ends = ["abort", "rollback"].includes(button.dataset.act);
  const safe = ends ? card.querySelector(".safe")?.value ?? "" : "";
  const path = `/rollouts/${card.dataset.rollout}`;
  const facts = ends ? await attempt(() => get(path)) : null;
  const stuck = facts?.without_way_back.slice(0, 3).map((agent) => `${agent.agent} (${agent.reason})`).join("; ");
  if (stuck && !window.confirm(`No way back for ${facts.without_way_back.length}: ${stuck}. ${safe ? `These agents will ${safe.replace("-", " ")}.` : "These agents go on with what they have committed."} Go on?`)) return;
  button.disabled = true;
  const reason = card.querySelector(".reason").value.trim();
  const body = { reason, ...(safe ? { safe_state: safe } : {}) };
  const done = await attempt(() => send(`${path}/${button.dataset.act}`, body));
  button.disabled = false;
  if (done) card.querySelector(".reason").value = "";
});

const form = document.getElementById("form");
const radius = document.getElementById("radius");
const start = document.getElementById("start");
const order = () => {
  const given = Object.fromEntries(new FormData(form));
  const criteria = { failureType: "ALL", action: "CANCEL", thresholdPercentage: Number(given.abort), minNumberOfExecutedThings: Number(given.after) };
  return {
    model: given.model, mode: given.mode, selector: given.selector.trim(), swap: given.swap,
    waves: given.waves.split(",").map((size) => size.trim()).filter(Boolean),
    trial_items: Number(given.items), needs_approval: given.approval === "on",
    abortConfig: { criteriaList: [criteria] },
    jobExecutionsRolloutConfig: { maximumPerMinute: Number(given.rate) },
    waveConfig: { successAction: given.ask === "on" ? "PAUSE" : "NEXTGROUP" },
    ...(given.start.trim() ? { schedulingConfig: { startTime: given.start.trim() } } : {}),
  };
};

const showRadius = (found) => {
  const table = document.createElement("table");
  const line = (tag, cells) => {
    const row = table.insertRow();
    for (const text of cells) { const cell = document.createElement(tag); cell.textContent = text; row.append(cell); }
  };
  line("th", ["Wave", "Agents", "Lanes", "Items per hour", "Who"]);
  found.waves.forEach((wave, k) => {
    const items = wave.items_per_h.toLocaleString("en") + (wave.unknown ? ` + ${wave.unknown} agents without figures` : "");
    line("td", [k + 1, wave.agents, wave.lanes, items, wave.names.slice(0, 6).join(", ") + (wave.names.length > 6 ? " …" : "")]);
  });
  const worst = document.createElement("p");
  worst.className = found.worst_case.stops_itself ? "worst" : "worst warn";
  worst.textContent = `Worst case: ${found.worst_case.items.toLocaleString("en")} items judged on trial by ${found.worst_case.agents} agents; ${found.worst_case.reason}.`;
  const stuck = document.createElement("p");
  stuck.className = "worst warn";
  stuck.hidden = !found.without_way_back.length;
  stuck.textContent = `No way back: ${found.without_way_back.slice(0, 4).map((a) => `${a.agent} (${a.reason})`).join("; ")}${found.without_way_back.length > 4 ? `; and ${found.without_way_back.length - 4} more` : ""}.`;
  radius.replaceChildren(table, worst, stuck);
  radius.hidden = start.hidden = false;
};

document.getElementById("look").addEventListener("click", async () => {
  const found = await attempt(() => send("/rollouts/preview", order()));
  if (found) showRadius(found);
});
form.addEventListener("input", () => { radius.hidden = start.hidden = true; });
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (start.hidden) return;
  start.disabled = true;
  const made = await attempt(() => send("/rollouts", order()));
  start.disabled = false;
  if (made) { radius.hidden = start.hidden = true; document.getElementById("new").open = false; }
});

window.sortlineStream.follow("/rollouts/events", ["cards", "tick"], (name, data) => {
  lastEvent = Date.now();
  if (name === "cards") { replace(JSON.parse(data)); tick(); } else { offset = Number(data) - lastEvent; }
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) lastEvent = Date.now(); });
tick();
setInterval(tick, 1000);
