// The form that names a lot: asks, waits for the agent's answer, then shows the page as it is now.
const { get, send, attempt, complain } = window.sortline;
const form = document.getElementById("lot");
const said = document.getElementById("lot-said");
const path = `/agents/${encodeURIComponent(form.dataset.agent)}`;
const pause = (ms) => new Promise((done) => { setTimeout(done, ms); });

const answer = async (asked) => {
  for (let turn = 0; turn < 40; turn += 1) {
    await pause(500);
    const found = (await get(path)).lot_asked;
    if (found.request_id !== asked.request_id) throw new Error("Somebody named another lot meanwhile.");
    if (found.state === "refused") throw new Error(`The agent refused: ${found.fault.message} (${found.fault.code})`);
    if (found.state === "accepted") return found;
  }
  throw new Error("The agent has not answered. Look at what it reports, or name the lot at the line.");
};

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("button");
  button.disabled = true;
  said.textContent = "Waiting for the agent …";
  const { lot, variety, reason } = Object.fromEntries(new FormData(form));
  const body = { lot: lot.trim(), variety: variety.trim(), reason: reason.trim() };
  const done = await attempt(async () => answer(await send(`${path}/lot`, body)));
  button.disabled = false;
  said.textContent = done ? "Accepted: it begins at the next gap on the belt." : "";
  if (done) { complain(""); setTimeout(() => window.location.reload(), 2500); }
});
