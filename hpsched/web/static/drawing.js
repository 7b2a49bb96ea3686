"use strict";
// How the report and the live page draw a figure: in the reader's colours, for the screen's width.

// What a reader reads is no colour, whatever it is called.
const WORDS = new Set(["x", "y", "text", "name", "ticktext", "tickvals", "categoryarray"]);

// A copy of it in which every colour of the map `colours` is what it becomes there.
function recoloured(value, colours) {
  if (typeof value === "string") return colours.get(value) ?? value;
  if (Array.isArray(value)) return value.map((one) => recoloured(one, colours));
  if (value === null || typeof value !== "object") return value;
  const parts = Object.entries(value);
  return Object.fromEntries(
    parts.map(([key, one]) => [key, WORDS.has(key) ? one : recoloured(one, colours)]),
  );
}

const BESIDE = 165; // pixels of a telephone's width that are not an axis of the whole figure
const LETTER = 7; // pixels of a tick label's letter there

// The log axis with every second, third … label only, so that they do not touch; the lines stay.
function thinned(axis, width) {
  const { tickvals, ticktext, range } = axis;
  if (!tickvals || !ticktext || !range) return axis;
  const pixels = (value) => ((Math.log10(value) - range[0]) / (range[1] - range[0])) * width;
  const half = (i) => ((ticktext[i].length + 1) * LETTER) / 2;
  const first = tickvals.findIndex((value) => Math.abs(Math.log10(value) % 1) < 1e-6);
  const kept = (i, step) => (i - Math.max(first, 0)) % step === 0;
  const touch = (step) => {
    const shown = tickvals.map((_, i) => i).filter((i) => kept(i, step));
    return shown.some((i, k) => {
      const next = shown[k + 1];
      return next && pixels(tickvals[next]) - pixels(tickvals[i]) < half(i) + half(next);
    });
  };
  let step = 1;
  while (step < tickvals.length && touch(step)) step += 1;
  return { ...axis, ticktext: ticktext.map((text, i) => (kept(i, step) ? text : "")) };
}

// What plotly is given; `colours` is empty on a light page.
function dressed(figure, colours) {
  const { data, layout } = recoloured(figure, colours);
  const narrow = window.innerWidth < 560;
  if (narrow) {
    layout.font = { ...layout.font, size: 11 };
    layout.margin = { ...layout.margin, l: 44, r: 12 };
    if (layout.xaxis?.type === "log" && layout.xaxis.domain === undefined) {
      layout.xaxis = thinned(layout.xaxis, window.innerWidth - BESIDE);
    }
  }
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: narrow || data.length === 0 ? false : "hover",
    // One by one: plotly's own choice has one that sends the chart to its cloud.
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    plotlyServerURL: "",
  };
  return { data, layout, config };
}
