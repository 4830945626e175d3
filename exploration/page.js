// The page around the generator: sliders, the address, the two pictures, and the queue of requests.
"use strict";

const settings = JSON.parse(document.getElementById("settings").textContent);
const { classes, resolution, positions, scales, deviations } = settings;
const element = (id) => document.getElementById(id);

// State: what the sliders say and the address holds. Position null is the one of the seed

const initial = {
  seed: 0, from: 0, to: Math.min(1, classes.length - 1), mix: 0, psi: 1, position: null,
  scale: settings.scale, versus: 1,
};
settings.directions.forEach((_, i) => (initial[`d${i + 1}`] = 0));
const limits = { // lowest, highest, step
  seed: [0, settings.numSeeds - 1, 0.01],
  from: [0, classes.length - 1, 1],
  to: [0, classes.length - 1, 1],
  mix: [0, 1, 0.01],
  psi: [0, 1, 0.01],
  position: [0, 1, 0.01],
  scale: [scales[0], scales.at(-1), 1],
  versus: [0, 1, 1],
};
settings.directions.forEach((_, i) => (limits[`d${i + 1}`] = [-deviations, deviations, 0.1]));
let state = { ...initial };

/** A number within its limits and on its steps; null if it is none. */
function allowed(name, text) {
  const [low, high, step] = limits[name], value = Number(text);
  if (String(text).trim() === "" || !Number.isFinite(value)) return null;
  return Number((Math.round(Math.min(high, Math.max(low, value)) / step) * step).toFixed(2));
}

/** Read the state from the address; what it lacks, or has wrong, stays as at the start. */
function readAddress() {
  state = { ...initial };
  for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
    if (Object.hasOwn(limits, name)) state[name] = allowed(name, text) ?? state[name];
  }
  if (!positions) state.position = null;
  if (!scales.includes(state.scale)) state.scale = initial.scale;
}

function writeAddress() {
  const names = Object.keys(initial).filter((name) => state[name] !== initial[name]);
  const parts = new Set(["seed", ...names]); // the seed is always there, and comes first
  const hash = `#${[...parts].map((name) => `${name}=${state[name]}`).join("&")}`;
  if (hash !== location.hash) history.replaceState(null, "", hash);
}

/** The seed's own position, between two seeds too, unless the slider has set another. */
function currentPosition() {
  const low = Math.floor(state.seed), next = Math.min(low + 1, settings.numSeeds - 1);
  return state.position ?? positions[low] + (state.seed - low) * (positions[next] - positions[low]);
}

// Controls

const refreshers = []; // each shows the state in one control

/** A slider for a part of the state, called `text`. `show` writes its value, `say` is for readers
 *  aloud, `ends` are the words at its ends; value() is what it shows. */
function addSlider(place, name, text, options) {
  const { step = 0.01, show, ends, say = show, value = () => state[name] } = options;
  const row = document.createElement("div"), label = document.createElement("label");
  const written = document.createElement("output"), input = document.createElement("input");
  const [min, max] = limits[name];
  row.className = "row";
  written.setAttribute("aria-live", "off"); // the slider says its value itself
  Object.assign(input, { type: "range", id: name, min, max, step });
  Object.assign(label, { htmlFor: name, textContent: text });
  written.htmlFor = name;
  row.append(label, written, input);
  if (ends) {
    const words = document.createElement("div");
    words.className = "ends";
    words.append(...ends.map(() => document.createElement("span")));
    row.append(words);
    refreshers.push(() => ends.forEach((end, i) => (words.children[i].textContent = end())));
  }
  input.addEventListener("input", () => change({ [name]: allowed(name, input.value) }));
  refreshers.push(() => {
    input.value = value();
    const shown = show(value());
    if (written.textContent !== shown) written.textContent = shown;
    input.setAttribute("aria-valuetext", say(value()));
  });
  input.classList.toggle("centred", min < 0);
  place.append(row);
  return written;
}

/** The seed can also be typed: on a phone 256 seeds are too near to each other on a slider. */
function addSeed(place) {
  const field = document.createElement("input");
  const [min, max] = limits.seed;
  Object.assign(field, { type: "number", min, max, ariaLabel: "Seed", inputMode: "numeric" });
  field.addEventListener("input", () => {
    const seed = allowed("seed", field.value);
    if (seed !== null) change({ seed: Math.floor(seed) });
  });
  refreshers.push(() => {
    if (document.activeElement !== field) field.value = state.seed;
  });
  field.addEventListener("blur", () => (field.value = state.seed));
  addSlider(place, "seed", "Seed", { step: 1, show: String }).replaceWith(field);
}

/** A choice with a name, of [value, text]. */
function fillChoice(select, name, options) {
  for (const [value, text] of options) select.append(new Option(text, value));
  select.addEventListener("change", () => change({ [name]: Number(select.value) }));
  refreshers.push(() => (select.value = state[name]));
}

/** The class or the mixture of classes at a place of the slider, in words. */
function percent(mix) {
  const from = classes[state.from], to = classes[state.to], share = Math.round(100 * mix);
  if (share === 0 || from === to) return from;
  return share === 100 ? to : `${100 - share}% ${from}, ${share}% ${to}`;
}

function buildControls() {
  const brain = element("brain");
  addSeed(brain);
  if (classes.length > 2) {
    const choices = document.createElement("div");
    choices.className = "choices";
    for (const [name, text] of [["from", "From class"], ["to", "To class"]]) {
      const label = document.createElement("label"), select = document.createElement("select");
      select.id = name;
      label.append(text, select);
      choices.append(label);
      fillChoice(select, name, classes.map((title, i) => [i, title]));
    }
    brain.append(choices);
  }
  if (classes.length > 1) {
    const ends = [() => classes[state.from], () => classes[state.to]];
    const shares = (mix) => `${Math.round(100 * (1 - mix))} / ${Math.round(100 * mix)} %`;
    addSlider(brain, "mix", "Class", { show: shares, ends, say: percent });
  }
  const psi = [() => "typical", () => "full variety"];
  addSlider(brain, "psi", "Truncation", { show: (v) => v.toFixed(2), ends: psi });
  if (positions) {
    const show = (v) => v.toFixed(2) + (state.position === null ? ", by seed" : "");
    const ends = [() => "lowest", () => "highest"];
    addSlider(brain, "position", "Position in scan", { show, ends, value: currentPosition });
  }
  settings.directions.forEach((title, i) => {
    const show = (v) => (v ? (v > 0 ? "+" : "−") + Math.abs(v).toFixed(1) : "0");
    addSlider(element("shifts"), `d${i + 1}`, title, { step: 0.1, show });
  });
  element("shifts").hidden = !settings.directions.length;
  fillChoice(element("scale"), "scale", scales.map((v) => [v, `±${v}`]));
  element("size").textContent = `${resolution} × ${resolution} pixels, enlarged`;
  element("compared").hidden = classes.length < 2;
  element("pictures").classList.toggle("single", classes.length < 2);
  for (const text of settings.about) {
    const paragraph = document.createElement("p");
    paragraph.textContent = text;
    element("about").append(paragraph);
  }
}

/** Take new values over, show them, and ask for the image. */
function change(values) {
  Object.assign(state, values);
  // at an end of the class slider, the other end is the more telling one to compare with
  if (state.mix === state.versus) state.versus = 1 - state.versus;
  refreshers.forEach((refresh) => refresh());
  return update();
}

// Images: from the worker, or from the server that answered with this page

/** The state as a request, for the class at `mix`. */
function requestOf(mix) {
  const directions = settings.directions.map((_, i) => state[`d${i + 1}`]);
  const { seed, from, to, psi, position } = state;
  return { seed, from, to, mix, psi, position, directions };
}

/** A function that sends a request to the worker and promises the image. */
function startWorker() {
  const source = new Blob([element("generator").textContent], { type: "text/javascript" });
  const worker = new Worker(URL.createObjectURL(source));
  worker.postMessage({ settings, weights: element("weights").textContent });
  return (request) => new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => resolve(data);
    worker.onerror = (event) => reject(new Error(event.message || "the worker does not start"));
    worker.postMessage(request);
  });
}

/** Ask the server for an image. */
async function askServer(request) {
  const parts = Object.entries(request).filter(([, value]) => value !== null);
  const answer = await fetch(`image?${new URLSearchParams(parts)}`).catch(() => null);
  if (!answer) throw new Error("the server does not answer; start it again");
  if (!answer.ok) throw new Error(await answer.text());
  return new Uint8ClampedArray(await answer.arrayBuffer());
}

const ask = settings.served ? askServer : startWorker();
const kept = new Map(); // the latest images by request: the other class often stays the same

async function imageOf(request) {
  const key = JSON.stringify(request);
  if (!kept.has(key)) {
    kept.set(key, await ask(request));
    if (kept.size > 8) kept.delete(kept.keys().next().value);
  }
  return kept.get(key);
}

let running = null, changed = false, pixels = null, writing = 0;

/** Draw the newest state. While one image is computed others only wait, and the newest one wins. */
function update() {
  changed = true;
  running ??= drawNewest().catch((error) => {
    element("problem").textContent = `No image: ${error.message}`;
  }).finally(() => (running = null));
  return running;
}

async function drawNewest() {
  while (changed) {
    changed = false;
    const { scale, mix, versus } = state, titles = [describe(), percent(mix), percent(versus)];
    const shown = requestOf(mix), other = requestOf(versus);
    pixels = await imageOf(shown);
    show("image", pixels, (grey) => [grey, grey, grey]);
    element("caption").textContent = titles[0];
    element("problem").textContent = "";
    if (classes.length > 1) {
      element("difference").classList.toggle("waiting", changed);
      if (changed && !playing) continue; // the newer state first
      drawDifference(pixels, await imageOf(other), scale);
      element("versus").textContent = `${mix % 1 ? "this mixture" : titles[1]} minus ${titles[2]}`;
      element("difference").classList.remove("waiting");
    }
  }
  clearTimeout(writing);
  if (!playing) writing = setTimeout(writeAddress, 150); // browsers limit how often it may change
}

/** Paint values into a canvas of the generator's size. */
function show(id, values, colour) {
  const canvas = element(id);
  if (canvas.width !== resolution) canvas.width = canvas.height = resolution;
  const picture = new ImageData(resolution, resolution);
  values.forEach((value, p) => picture.data.set([...colour(value), 255], 4 * p));
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

/** Colour of a difference from -1 to 1: blue below zero, black at zero, orange above. */
function signed(value) {
  const size = Math.min(1, Math.abs(value));
  const [middle, end] = value < 0
    ? [[24, 104, 200], [190, 226, 255]]
    : [[205, 92, 16], [255, 232, 190]];
  if (size < 0.5) return middle.map((v) => 2 * size * v);
  return middle.map((v, i) => v + (2 * size - 1) * (end[i] - v));
}

function drawDifference(shown, other, scale) {
  const values = Array.from(shown, (grey, p) => grey - other[p]);
  show("difference", values, (value) => signed(value / scale));
  element("lowest").textContent = `−${scale}`;
  element("highest").textContent = `+${scale}`;
  const low = values.reduce((a, v) => Math.min(a, v), 0);
  const high = values.reduce((a, v) => Math.max(a, v), 0);
  const range = `${low} to ${high > 0 ? "+" : ""}${high}`.replace("-", "−");
  element("extremes").textContent = `Both of the same seed. From ${range}.`;
}

function drawBar() {
  const context = element("bar").getContext("2d"), picture = new ImageData(255, 1);
  for (let i = 0; i < 255; i++) picture.data.set([...signed((i - 127) / 127), 255], 4 * i);
  context.putImageData(picture, 0, 0);
}

/** The image in words. */
function describe() {
  const low = Math.floor(state.seed);
  const seed = state.seed > low ? `between seeds ${low} and ${low + 1}` : `seed\u00a0${low}`;
  return `Generated${classes.length > 1 ? ` as ${percent(state.mix)}` : ""}, ${seed}`;
}

// Buttons

let playing = false, player = null;

/** Move from seed to seed, in three seconds if the images are fast enough, until it is stopped. */
async function play() {
  let last = performance.now();
  while (playing) {
    await new Promise(requestAnimationFrame);
    const now = performance.now(), step = Math.min(0.1, (now - last) / 3000);
    last = now;
    await change({ seed: allowed("seed", (state.seed + Math.max(0.01, step)) % limits.seed[1]) });
    if (element("problem").textContent) setPlaying(false);
  }
  writeAddress();
}

function setPlaying(on) {
  playing = on;
  element("play").textContent = on ? "Pause" : "Play";
  if (on) player ??= play().finally(() => (player = null));
}

element("play").addEventListener("click", () => setPlaying(!playing));
element("save").addEventListener("click", async () => {
  await running;
  if (!pixels) return;
  const blob = await new Promise((resolve) => element("image").toBlob(resolve));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `generated_seed${state.seed}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});
element("controls").addEventListener("submit", (event) => event.preventDefault()); // by Enter
element("controls").addEventListener("reset", (event) => {
  event.preventDefault();
  change({ ...initial });
});
window.addEventListener("hashchange", () => {
  readAddress();
  change({});
});

readAddress();
buildControls();
drawBar();
change({});
