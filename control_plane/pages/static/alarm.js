// One alarm: buttons and the comment are calls of the API; then the page is shown as it is now.
const { send, attempt } = window.sortline;
const path = `/alarms/${document.getElementById("comment").dataset.alarm}`;

const act = async (button, rest, body) => {
  button.disabled = true;
  const done = await attempt(() => send(`${path}${rest}`, body));
  button.disabled = false;
  if (done) window.location.reload();
};

document.getElementById("acts")?.addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (!button) return;
  const minutes = button.dataset.act === "silence" ? { minutes: Number(document.getElementById("minutes").value) } : {};
  act(button, `/${button.dataset.act}`, { reason: document.getElementById("reason").value.trim(), ...minutes });
});

for (const button of document.querySelectorAll("[data-request]")) {
  button.addEventListener("click", () => act(button, `/requests/${button.dataset.request}/${button.dataset.verdict}`, { reason: "" }));
}

document.getElementById("comment").addEventListener("submit", (event) => {
  event.preventDefault();
  act(event.target.querySelector("button"), "/comments", { text: new FormData(event.target).get("text").trim() });
});
