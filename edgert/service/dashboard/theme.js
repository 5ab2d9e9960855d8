// Light, dark, or as the system has it. Runs before the page is painted, so it is no module.
"use strict";

(() => {
  const NAMES = { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" };
  const ORDER = Object.keys(NAMES);

  function stored() {
    try {
      const name = localStorage.getItem("edgert-theme");
      return ORDER.includes(name) ? name : "auto";
    } catch {
      return "auto"; // storage is turned off
    }
  }

  function apply(name) {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
  }

  let theme = stored();
  apply(theme);
  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    button.textContent = NAMES[theme];
    button.addEventListener("click", () => {
      theme = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length];
      apply(theme);
      button.textContent = NAMES[theme];
      try {
        localStorage.setItem("edgert-theme", theme);
      } catch {
        // it holds until the page is left
      }
    });
  });
})();
