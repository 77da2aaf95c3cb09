// Draws the charts that the page holds as data, and lets the buttons of the timeline choose what part of it is shown.
"use strict";

(async () => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const options = {
    renderer: "svg", // its colours are CSS variables, so they follow the page's colour scheme
    actions: false,
    ast: true, // expressions are interpreted: the page's policy allows no eval
    defaultStyle: false,
    tooltip: { disableDefaultStyle: true },
  };
  const views = {};
  for (const [id, chart] of Object.entries(charts)) {
    views[id] = (await vegaEmbed(`#${id}`, chart, options)).view;
  }

  const timed = ["chart-timeline", "chart-memory"].map((id) => views[id]).filter(Boolean);
  if (timed.length) {
    const end = timed[0].signal("shown_to");
    const shown = document.getElementById("shown");
    let from = 0;
    let to = end;
    const show = async (middle, width) => {
      const wide = Math.min(end, Math.max(end / 2000, width));
      from = Math.min(Math.max(0, middle - wide / 2), end - wide);
      to = from + wide;
      shown.textContent = `${from.toFixed(3)} s to ${to.toFixed(3)} s`;
      await Promise.all(timed.map((v) => v.signal("shown_from", from).signal("shown_to", to).runAsync()));
    };
    const moves = {
      in: () => show((from + to) / 2, (to - from) / 2),
      out: () => show((from + to) / 2, (to - from) * 2),
      earlier: () => show((from + to) / 2 - (to - from) / 2, to - from),
      later: () => show((from + to) / 2 + (to - from) / 2, to - from),
      whole: () => show(end / 2, end),
    };
    for (const button of document.querySelectorAll("button[data-move]")) {
      button.addEventListener("click", moves[button.dataset.move]);
    }
    for (const button of document.querySelectorAll("button[data-from]")) {
      const start = Number(button.dataset.from);
      const width = Number(button.dataset.to) - start;
      button.addEventListener("click", () => show(start + width / 2, width));
    }
    await moves.whole();
    document.getElementById("moves").hidden = false;
  }
  document.documentElement.dataset.charts = "drawn";
})();
