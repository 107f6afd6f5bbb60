// What every page that acts shares: who acts, the token of this control plane, a call of the API, its refusal in words.
// Loaded before the module of the page, which finds it as `sortline`.
const prefix = document.body.dataset.root;
const banner = document.getElementById("refused");
const actor = document.getElementById("actor");

const remembered = (key, store) => { try { return store.getItem(key) || ""; } catch { return ""; } };
const remember = (key, value, store) => { try { store.setItem(key, value); } catch { /* storage may be forbidden */ } };
actor.value = remembered("sortline-actor", localStorage);
actor.addEventListener("change", () => remember("sortline-actor", actor.value.trim(), localStorage));

const read = async (answer) => {
  const found = await answer.json();
  if (!answer.ok) throw new Error(`${found.message}${found.expected ? ` Expected ${found.expected}.` : ""}${found.got ? ` Got ${found.got}.` : ""}`);
  return found;
};

const get = async (path) => read(await fetch(`${prefix}/api/v1${path}`));

const newKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

// A request whose answer was lost is sent once more under the same key: the server carries it out once.
const send = async (path, body, key = newKey(), again = /^\/(rollouts|alarms)/.test(path)) => {
  const token = remembered("sortline-token", sessionStorage);
  const headers = { "content-type": "application/json", "idempotency-key": key, ...(token ? { authorization: `Bearer ${token}` } : {}) };
  const options = { method: "POST", headers, body: JSON.stringify({ actor: actor.value.trim() || "page", ...body }) };
  const answer = await fetch(`${prefix}/api/v1${path}`, options).catch((error) => { if (!again) throw error; return null; });
  if (answer === null) return send(path, body, key, false);
  if (answer.status === 401) {
    const given = window.prompt("Changes need the token of this control plane:");
    if (given) { remember("sortline-token", given.trim(), sessionStorage); return send(path, body, key, again); }
  }
  return read(answer);
};

const complain = (text) => { banner.textContent = text; banner.hidden = !text; };
const attempt = async (action) => {
  complain("");
  try { return await action(); } catch (error) { complain(error.message); return null; }
};

window.sortline = { prefix, get, send, attempt, complain };
