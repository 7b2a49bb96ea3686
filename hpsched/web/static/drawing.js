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

// What plotly is given; `colours` is empty on a light page.
function dressed(figure, colours) {
  const { data, layout } = recoloured(figure, colours);
  const narrow = window.innerWidth < 560;
  if (narrow) {
    layout.font = { ...layout.font, size: 11 };
    layout.margin = { ...layout.margin, l: 44, r: 12 };
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
