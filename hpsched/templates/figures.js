// Draws every figure of the page in the reader's colours, and again when these change or it prints.
// The page holds plotly.js (gzip, base64), the colours of dark pages, and each figure as JSON.
(async () => {
  const text = id => document.getElementById(id).textContent;
  const plots = [...document.querySelectorAll(".plotly-graph-div")];
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const colours = new Map(Object.entries(JSON.parse(text("dark-colours"))));

  async function load() {
    if (window.Plotly) return;
    const packed = Uint8Array.from(atob(text("plotly-gz")), letter => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    script.remove(); // it has run: a saved page stays small
  }

  function draw(plot, dark, width) {
    const figure = JSON.parse(text(plot.id + "-data"));
    const { data, layout, config } = dressed(figure, dark ? colours : new Map());
    if (width) Object.assign(layout, { width, autosize: false });
    return Plotly.react(plot, data, layout, { ...config, responsive: !width });
  }

  const all = (dark, width) => plots.forEach(plot => draw(plot, dark, width));
  try {
    await load();
  } catch (error) {
    document.getElementById("no-figures").hidden = false;
    document.documentElement.dataset.figures = "none";
    console.warn("no figures: " + error);
    return;
  }
  for (const plot of plots) {
    await draw(plot, scheme.matches);
    await new Promise(done => setTimeout(done)); // lets the reader scroll meanwhile
  }
  scheme.addEventListener("change", () => all(scheme.matches));
  window.addEventListener("beforeprint", () => all(false, 660));
  window.addEventListener("afterprint", () => all(scheme.matches));
  document.documentElement.dataset.figures = "drawn";
})();
