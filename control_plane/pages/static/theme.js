// Light or dark: what the person chose, else what the system says. Runs before the page is painted.
const key = "sortline-theme";
const system = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
const apply = (theme) => { document.documentElement.dataset.theme = theme; };
let stored = null;
try { stored = localStorage.getItem(key); } catch { /* storage may be forbidden; the system's choice stands */ }
apply(stored || system());
document.addEventListener("DOMContentLoaded", () => {
  const button = document.getElementById("theme");
  button?.addEventListener("click", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    apply(next);
    try { localStorage.setItem(key, next); } catch { /* as above */ }
  });
});
