// The page: what was loaded, what it says, and what is left of the model.

import { describe } from "./facts.js";

const $ = (id) => document.getElementById(id);
const state = (name) => { document.body.dataset.state = name; };
const query = new URLSearchParams(location.search);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e8 ? 2 : 0)} MB`;
const BEGINNINGS = ["The little dog was", "Es war einmal ein", "def read_file(path):", "12 + 30 ="];
const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function enable(running) {
  $("go").disabled = running;
  $("stop").disabled = !running;
}

function go() {
  const prompt = $("prompt").value;
  $("given").textContent = prompt;
  $("text").textContent = "";
  $("figures").textContent = "reading the beginning";
  $("problem").hidden = true;
  delete $("output").dataset.tokens;
  state("running");
  enable(true);
  worker.postMessage({ type: "write", prompt, limit: Math.max(1, Number($("limit").value) || 1), temperature: Number($("temperature").value) });
}

function ready({ files, seconds, defaults }) {
  $("loading").hidden = true;
  const facts = describe(files, seconds);
  document.title = `${facts.name} in the browser`;
  $("name").textContent = facts.name;
  for (const [name, value, note] of facts.tiles) {
    const tile = element("div", undefined, "tile"), figure = element("dd", value);
    figure.append(element("small", note));
    tile.append(element("dt", name), figure);
    $("tiles").append(tile);
  }
  if (facts.map) drawMap(facts.map);
  if (defaults.do_sample && !query.has("temperature")) $("temperature").value = defaults.temperature;
  $("heat").textContent = $("temperature").value;
  enable(false);
  state("ready");
  if (query.has("go")) go();
}

/** Layers down, experts across; a path for each width, so that ten thousand experts are a few elements. */
function drawMap({ layers, experts, cells, legend, caption }) {
  const gap = 0.14, step = Math.max(1, Math.ceil(layers.length / 16)), size = Math.min(0.42 * step, Math.max(experts / 36, 0.42));
  const left = 0.4 + 0.58 * size * `layer ${layers.at(-1)}`.length;
  const cell = (x, y) => `M${(left + x + gap / 2).toFixed(2)} ${(y + gap / 2).toFixed(2)}h${1 - gap}v${1 - gap}h${gap - 1}z`;
  const paths = new Map();
  cells.forEach((row, y) => row.forEach((bits, x) => paths.set(bits, (paths.get(bits) ?? "") + cell(x, y))));
  const svg = $("map"), make = (tag) => document.createElementNS("http://www.w3.org/2000/svg", tag);
  svg.setAttribute("viewBox", `0 0 ${left + experts} ${layers.length}`);
  svg.setAttribute("aria-label", caption);
  svg.style.minWidth = `${Math.min(experts, 128) * 5 + 60}px`;
  svg.style.maxWidth = `${(experts + left) * 40}px`;
  for (const [bits, shape] of paths) {
    const path = make("path");
    path.setAttribute("class", `b${bits}`);
    path.setAttribute("d", shape);
    svg.append(path);
  }
  layers.forEach((layer, y) => {
    if (y % step) return;
    const label = make("text");
    label.textContent = `layer ${layer}`;
    label.setAttribute("x", left - 0.3);
    label.setAttribute("y", y + 0.5 + size / 3);
    label.setAttribute("font-size", size);
    label.setAttribute("text-anchor", "end");
    svg.append(label);
  });
  for (const { bits, name, note } of legend) {
    const item = element("li");
    item.append(element("i", undefined, `b${bits}`), `${name} `, element("small", note));
    $("legend").append(item);
  }
  $("caption").textContent = caption;
  $("kept").hidden = false;
}

const hear = {
  progress({ bytes, all }) {
    $("progress").value = bytes / all;
    $("amount").textContent = `${megabytes(bytes)} of ${megabytes(all)}`;
    if (bytes === all) $("stage").textContent = "Preparing the weights";
  },
  ready,
  token({ text, made, promptTokens, promptSeconds, rate }) {
    $("text").textContent = text;
    $("output").dataset.tokens = made.join();
    const speed = rate ? `${rate.toFixed(1)} tokens/s` : "";
    $("figures").textContent = [`${made.length} token${made.length > 1 ? "s" : ""}`, speed, `${promptTokens} read in ${promptSeconds.toFixed(2)} s`].filter(Boolean).join(" \u00b7 ");
  },
  done({ made, reason }) {
    if (!made.length) $("figures").textContent = "0 tokens";
    $("figures").textContent += ` \u00b7 ${reason}`;
    enable(false);
    state("done");
  },
  error({ text, fatal }) {
    $("problem").textContent = text;
    $("problem").hidden = false;
    $("loading").hidden = true;
    if (!fatal) enable(false);
    state("error");
  },
};

worker.onmessage = ({ data }) => hear[data.type](data);
worker.onerror = (event) => hear.error({ text: event.message || "The worker could not start: run npm ci in this folder.", fatal: true });
for (const text of BEGINNINGS) {
  const chip = element("button", text);
  chip.type = "button";
  chip.onclick = () => { $("prompt").value = text; $("prompt").focus(); };
  $("chips").append(chip);
}
for (const [id, name] of [["prompt", "prompt"], ["limit", "tokens"], ["temperature", "temperature"]]) {
  if (query.has(name)) $(id).value = query.get(name);
}
$("temperature").oninput = () => { $("heat").textContent = $("temperature").value; };
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("go").disabled) go();
};
$("go").onclick = go;
$("stop").onclick = () => worker.postMessage({ type: "stop" });
worker.postMessage({ type: "load", base: new URL("./model/", location.href).href });
