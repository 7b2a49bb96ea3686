// Keeps a page up to date: asks for its state, puts changed sections in place, draws changed
// figures. Sections come as HTML that the server has escaped; all other text is set as text.
const PACE = 2500; // milliseconds between two questions
const PATIENCE = 15000; // after which an unanswered one counts as lost
const SPOKEN = 3000; // how long "Copied" stays
const page = document.getElementById("live");
const byId = (id) => document.getElementById(id);
const dark = new Map(Object.entries(JSON.parse(page.dataset.dark ?? "{}"))); // colour → on a dark page
const reduced = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

let etag = "";
let heard = null; // when the last answer came, in this page's milliseconds
let age = null; // seconds that its snapshot was old then
let taken = null; // seconds of the database's clock when the snapshot was taken
let timer = 0;
let gone = false;
let asking = false;

// -- asking ----------------------------------------------------------------------------------

async function ask() {
  clearTimeout(timer);
  if (gone || asking) return;
  if (document.hidden) return connection("wait", "Paused while this tab is hidden");
  asking = true;
  try {
    const answer = await fetch(page.dataset.state, {
      headers: etag ? { "If-None-Match": etag } : {},
      cache: "no-store",
      credentials: "same-origin",
      redirect: "manual", // to the log-in page, when nobody is logged in any more
      signal: AbortSignal.timeout(PATIENCE),
    });
    await take(answer);
  } catch (error) {
    console.debug("no answer:", error);
    connection("bad", navigator.onLine ? "Lost connection; trying again" : "Offline; trying again");
  }
  asking = false;
  timer = setTimeout(ask, PACE);
}

async function take(answer) {
  const refused = answer.type === "opaqueredirect" || [401, 403].includes(answer.status);
  if (refused) return end("Logged out: reload this page to log in");
  if (answer.status === 404) return end("This study has been deleted");
  if (answer.status !== 304 && !answer.ok) throw new Error(`status ${answer.status}`);
  const state = answer.status === 304 ? null : await answer.json();
  heard = performance.now();
  age = read(answer, "Hpsched-Age");
  taken = read(answer, "Hpsched-Taken");
  if (state) {
    etag = answer.headers.get("ETag") ?? "";
    show(state);
    if (state.figures) await draw(state.figures);
  }
  const problem = !byId("problem").hidden;
  const reading = !byId("reading").hidden;
  connection(problem ? "bad" : reading ? "wait" : "live", problem ? "Not up to date" : reading ? "Reading" : "Live");
}

function read(answer, header) {
  const value = answer.headers.get(header);
  return value === null ? null : Number(value);
}

function end(text) {
  gone = true;
  connection("bad", text);
  byId("problem").hidden = false;
  byId("problem").textContent = `${text}. What is shown here is the last that was known.`;
}

// -- text ------------------------------------------------------------------------------------

function connection(tone, text) {
  byId("connection").dataset.tone = tone;
  const shown = byId("connection-text");
  if (shown.textContent !== text) shown.textContent = text;
  tick();
}

function show(state) {
  byId("problem").hidden = !state.problem;
  if (byId("problem").textContent !== state.problem) byId("problem").textContent = state.problem;
  byId("reading").hidden = !state.reading;
  if (state.cards) return showCards(state);
  if (state.name) byId("name").textContent = state.name;
  for (const [name, html] of Object.entries(state.sections)) showSection(name, html);
}

function showCards(state) {
  replace(byId("cards"), state.cards.join(""));
  byId("empty").hidden = state.cards.length > 0 || state.reading;
  byId("more").hidden = !state.more;
  byId("more-count").textContent = state.more;
}

function showSection(name, html) {
  const section = document.querySelector(`[data-section="${CSS.escape(name)}"]`);
  if (!section) return;
  const said = byId("headline")?.textContent;
  replace(section, html);
  section.hidden = html === "";
  const says = byId("headline")?.textContent;
  if (name === "answer" && said && says !== said) byId("spoken").textContent = says;
}

// Put new HTML in place, and leave the keyboard's focus and how far things were scrolled.
const shownHtml = new WeakMap();

function replace(element, html) {
  if (shownHtml.get(element) === html) return;
  const focused = element.contains(document.activeElement) ? focusKey(document.activeElement) : null;
  const scrolled = [...element.querySelectorAll(".scroll, pre")].map((one) => one.scrollLeft);
  element.innerHTML = html;
  shownHtml.set(element, html);
  [...element.querySelectorAll(".scroll, pre")].forEach((one, i) => (one.scrollLeft = scrolled[i] ?? 0));
  if (focused) element.querySelector(focused)?.focus({ preventScroll: true });
}

function focusKey(element) {
  if (element.id) return `#${CSS.escape(element.id)}`;
  if (element.dataset.copy) return `[data-copy="${CSS.escape(element.dataset.copy)}"]`;
  const href = element.getAttribute("href");
  if (href) return `[href="${CSS.escape(href)}"]`;
  const label = element.getAttribute("aria-label");
  return label ? `[aria-label="${CSS.escape(label)}"]` : null;
}

// -- ages ------------------------------------------------------------------------------------

function tick() {
  if (heard === null) return;
  const since = (performance.now() - heard) / 1000;
  byId("connection-age").textContent = age === null ? "" : `· read ${ago(age + since)}`;
  if (taken === null) return;
  const now = taken + age + since;
  for (const one of document.querySelectorAll("[data-seen]")) {
    const text = ago(now - Number(one.dataset.seen));
    if (one.textContent !== text) one.textContent = text;
  }
}

function ago(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 2) return "just now";
  if (whole < 120) return `${whole} s ago`;
  if (whole < 7200) return `${Math.floor(whole / 60)} min ago`;
  if (whole < 172800) return `${Math.floor(whole / 3600)} h ago`;
  return `${Math.floor(whole / 86400)} days ago`;
}

// -- figures ---------------------------------------------------------------------------------

const drawn = new Map(); // id → { digest, figure }

async function draw(figures) {
  byId("no-figures").hidden = figures.length > 0 || !byId("reading").hidden;
  const wanted = new Set(figures.map((one) => one.id));
  for (const id of drawn.keys()) if (!wanted.has(id)) remove(id);
  for (const one of figures) {
    const place = placeOf(one);
    if (drawn.get(one.id)?.digest === one.digest) continue;
    const answer = await fetch(`${page.dataset.figures}${encodeURIComponent(one.id)}.json`, {
      credentials: "same-origin",
      redirect: "manual",
      signal: AbortSignal.timeout(PATIENCE),
    });
    if (!answer.ok) continue; // it is gone: the next state says so
    drawn.set(one.id, { digest: one.digest, figure: await answer.json() });
    await plot(place, one.id);
  }
  for (const group of document.querySelectorAll("[data-group]")) {
    group.hidden = group.querySelector("figure") === null;
  }
}

function remove(id) {
  const figure = byId(`figure-${id}`);
  if (figure) {
    window.Plotly.purge(figure.querySelector(".plot"));
    figure.remove();
  }
  drawn.delete(id);
}

// The figure's element, made when it is new; its words are brought up to date.
function placeOf(one) {
  let figure = byId(`figure-${one.id}`);
  if (!figure) {
    figure = document.createElement("figure");
    figure.id = `figure-${one.id}`;
    figure.append(part("figcaption"), part("div", "scroll-plot"));
    figure.firstChild.append(part("h3"), part("b"), " ", part("small"));
    figure.lastChild.append(part("div", "plot"));
    const group = document.querySelector(`[data-group="${CSS.escape(one.group)}"]`);
    group.append(figure);
    group.hidden = false;
    if (one.wide) scrollable(figure.lastChild, one.caption);
  }
  byId(`h-${one.group}`).textContent = one.heading;
  const [context, caption, note] = figure.firstChild.querySelectorAll("h3, b, small");
  context.textContent = one.context;
  context.hidden = one.context === "";
  caption.textContent = one.caption;
  note.textContent = one.note;
  const place = figure.querySelector(".plot");
  place.style.height = `${one.height}px`;
  place.setAttribute("role", "group"); // not img: plotly's buttons are in it
  place.setAttribute("aria-label", [one.context, one.caption, one.note].filter(Boolean).join(". "));
  return place;
}

// Wider than a telephone: the keyboard must reach it to scroll it.
function scrollable(element, label) {
  element.tabIndex = 0;
  element.setAttribute("role", "region");
  element.setAttribute("aria-label", label);
}

function part(tag, name = "") {
  const made = document.createElement(tag);
  made.className = name;
  return made;
}

async function plot(place, id) {
  const colours = window.isDark() ? dark : new Map();
  const { data, layout, config } = dressed(drawn.get(id).figure, colours);
  layout.uirevision = id; // zoom stays when the data change
  layout.autosize = true;
  if (reduced) layout.transition = { duration: 0 };
  await window.Plotly.react(place, data, layout, config);
}

async function redrawAll() {
  for (const id of drawn.keys()) await plot(byId(`figure-${id}`).querySelector(".plot"), id);
}

// -- copying ---------------------------------------------------------------------------------

async function copy(button) {
  const source = byId(button.dataset.copy);
  const done = await copied(source.textContent, source);
  byId("spoken").textContent = done ? "Copied" : "Selected: copy it with the keyboard";
  button.textContent = done ? "Copied" : "Selected";
  setTimeout(() => {
    button.textContent = "Copy";
    byId("spoken").textContent = "";
  }, SPOKEN);
}

async function copied(text, source) {
  try {
    await navigator.clipboard.writeText(text); // https and localhost only
    return true;
  } catch {
    window.getSelection().selectAllChildren(source);
    return document.execCommand("copy");
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-copy]");
  if (button) copy(button);
});
document.addEventListener("visibilitychange", ask);
document.addEventListener("hpsched:theme", redrawAll);
window.addEventListener("online", ask);
setInterval(tick, 1000);
ask();
