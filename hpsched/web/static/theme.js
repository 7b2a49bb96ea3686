// The theme: the system's, unless the reader chose the other one; the choice is remembered.
"use strict";
(() => {
  const KEY = "hpsched-theme";
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");

  function remembered() {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage is switched off: the choice holds for this page
    }
  }

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  }

  function show() {
    const button = document.getElementById("theme-switch");
    if (!button) return;
    button.hidden = false;
    button.textContent = isDark() ? "Light" : "Dark"; // what it does, not what is
    button.ariaLabel = `${button.textContent} theme`;
  }

  function changed() {
    show();
    document.dispatchEvent(new Event("hpsched:theme"));
  }

  function flip() {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem(KEY, root.dataset.theme);
    } catch {
      // as above
    }
    changed();
  }

  window.isDark = isDark; // for the figures
  const chosen = remembered();
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  system.addEventListener("change", changed);
  document.addEventListener("DOMContentLoaded", () => {
    show();
    document.getElementById("theme-switch")?.addEventListener("click", flip);
  });
})();
