// The theme of the page: that of the system, until a click on the button chooses the other one.
"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem("lightkit-theme");
  } catch {
    // A browser may forbid storage to files; the choice then lasts as long as the page.
  }
  const apply = () => {
    root.dataset.theme = chosen ?? (system.matches ? "dark" : "light");
  };
  apply();
  system.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    button.hidden = false;
    button.addEventListener("click", () => {
      chosen = root.dataset.theme === "dark" ? "light" : "dark";
      apply();
      try {
        localStorage.setItem("lightkit-theme", chosen);
      } catch {
        // See above.
      }
    });
  });
})();
