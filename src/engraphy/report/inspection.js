"use strict";
// Chooses what is visible. All values are in the page already.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const parts = (element, name) => element.dataset[name].split("|");

  const chips = all("#tokens .chip");
  const articles = all("#details article");
  const measures = all("#measures button");
  const views = all("#views button");
  const lines = all(".lens tbody tr").map((row) => all("td.cell", row));
  const heads = all(".lens thead th").slice(3);
  const state = { token: 0, measure: 0, view: 0, layer: lines.length - 1 };

  // A share from -100 to 100 as a colour: --g is its size, the class its sign.
  function colour(element, share) {
    element.style.setProperty("--g", Math.abs(share) + "%");
    element.classList.toggle("below", share < 0);
  }

  function check(buttons, chosen) {
    buttons.forEach((button, place) => {
      button.setAttribute("aria-checked", String(place === chosen));
      button.tabIndex = place === chosen ? 0 : -1;
    });
  }

  function showMeasure(measure) {
    state.measure = measure;
    check(measures, measure);
    const { note, low, high, signed } = measures[measure].dataset;
    byId("note").textContent = note;
    byId("scale").querySelector(".low").textContent = low;
    byId("scale").querySelector(".high").textContent = high;
    byId("text").classList.toggle("signed", signed === "yes");
    for (const chip of chips) {
      colour(chip, Number(parts(chip, "shares")[measure]));
      chip.querySelector("small").textContent = parts(chip, "values")[measure];
    }
  }

  function showView(view) {
    state.view = view;
    check(views, view);
    const high = byId("lens-scale").querySelector(".high");
    const most = parts(high, "highs")[view];
    high.textContent = view === 2 ? "closer by " + most : most;
    byId("lens-scale").querySelector(".low").textContent = view === 2 ? "further by " + most : "0";
    byId("lens").classList.toggle("signed", view === 2);
    byId("lens").classList.toggle("without", view === 1);
    for (const cell of lines.flat()) colour(cell, Number(parts(cell, "shares")[view]));
    read(lines[state.layer][state.token]);
  }

  // The line above the table: what a cell says.
  function read(cell) {
    byId("readout").textContent = cell.dataset.titles.split("\n")[state.view];
  }

  function select(token, focus) {
    state.token = Math.max(0, Math.min(chips.length - 1, token));
    chips.forEach((chip, place) => {
      const chosen = place === state.token;
      chip.setAttribute("aria-selected", String(chosen));
      chip.tabIndex = chosen ? 0 : -1;
      articles[place].hidden = !chosen;
      heads[place].classList.toggle("chosen", chosen);
    });
    if (focus) chips[state.token].focus({ preventScroll: true });
    chips[state.token].scrollIntoView({ block: "nearest", inline: "nearest" });
    history.replaceState(null, "", "#token-" + state.token);
    mark();
  }

  // The cursor of LogitLens: the chosen token's column, and one layer of it.
  function mark() {
    lines.forEach((row, layer) =>
      row.forEach((cell, place) => {
        cell.classList.toggle("column", place === state.token);
        cell.classList.toggle("cursor", place === state.token && layer === state.layer);
      }),
    );
    read(lines[state.layer][state.token]);
  }

  function moveLayer(step) {
    state.layer = Math.max(0, Math.min(lines.length - 1, state.layer + step));
    mark();
    lines[state.layer][state.token].scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  const keys = {
    ArrowLeft: () => select(state.token - 1, true),
    ArrowRight: () => select(state.token + 1, true),
    Home: () => select(0, true),
    End: () => select(chips.length - 1, true),
    ArrowUp: () => moveLayer(-1),
    ArrowDown: () => moveLayer(1),
    m: () => showMeasure((state.measure + 1) % measures.length),
    w: () => showView((state.view + 1) % views.length),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const radios = event.target.closest("[role=radiogroup]");
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (radios && step) {
      const buttons = all("button", radios);
      const next = (buttons.indexOf(event.target) + step + buttons.length) % buttons.length;
      buttons[next].click();
      buttons[next].focus();
      event.preventDefault();
      return;
    }
    const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    action();
    event.preventDefault();
  });

  chips.forEach((chip, place) => chip.addEventListener("click", () => select(place, true)));
  measures.forEach((button, place) => button.addEventListener("click", () => showMeasure(place)));
  views.forEach((button, place) => button.addEventListener("click", () => showView(place)));
  lines.forEach((row, layer) =>
    row.forEach((cell, place) => {
      cell.addEventListener("mouseenter", () => read(cell));
      cell.addEventListener("mouseleave", () => read(lines[state.layer][state.token]));
      cell.addEventListener("click", () => {
        state.layer = layer;
        select(place, false);
      });
    }),
  );

  document.body.classList.add("scripted");
  showMeasure(0);
  const asked = /^#token-(\d+)$/.exec(location.hash);
  select(Number(asked ? asked[1] : byId("tokens").dataset.start), false);
  showView(0);
})();
