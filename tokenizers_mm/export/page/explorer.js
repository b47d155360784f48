"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { width, height, lengths } = data;
const byId = (id) => document.getElementById(id);

// Every grid of ids: its stream, its size and where its ids begin.
const grids = [];
{
  let start = 0;
  data.streams.forEach((stream, number) => {
    stream.grids.forEach(([rows, columns], scale) => {
      grids.push({ stream: number, scale, rows, columns, start, name: `${stream.name} ${rows}×${columns}` });
      start += rows * columns;
    });
  });
}

const state = { grid: grids[grids.length - 1], upto: lengths.length, code: null };
const panels = { a: makePanel("a", 0), b: makePanel("b", Math.min(1, data.images.length - 1)) };

// --- the decoder -------------------------------------------------------------------------------------------------

async function unpack(name) {
  const text = atob(globalThis.explorerFiles[name]);
  const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  delete globalThis.explorerFiles[name];
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function loadScript(name) {
  return new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = name;
    script.onload = done;
    script.onerror = () => failed(new Error(`${name} cannot be read`));
    document.head.append(script);
  });
}

async function openDecoder() {
  await Promise.all([loadScript("runtime.js"), loadScript("decoder.js")]);
  const code = new Blob([await unpack("module")], { type: "text/javascript" });
  const ort = await import(URL.createObjectURL(code));
  ort.env.wasm.wasmBinary = (await unpack("binary")).buffer;
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "error";
  const graph = await unpack("decoder");
  const adapter = navigator.gpu ? await navigator.gpu.requestAdapter().catch(() => null) : null;
  for (const provider of adapter ? ["webgpu", "wasm"] : ["wasm"]) {
    try {
      const session = await ort.InferenceSession.create(graph, { executionProviders: [provider], logSeverityLevel: 3 });
      const decoder = { ort, session, provider };
      await run(decoder, data.images[0].ids, lengths.length); // some failures show at the first run
      return decoder;
    } catch (error) {
      if (provider === "wasm") throw error;
    }
  }
}

async function run({ ort, session }, ids, upto) {
  const weights = Float32Array.from(lengths, (_, index) => (index === upto - 1 ? 1 : 0));
  const [idsName, weightsName] = session.inputNames;
  const feeds = { [idsName]: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]) };
  if (weightsName) feeds[weightsName] = new ort.Tensor("float32", weights, [weights.length]);
  const output = (await session.run(feeds))[session.outputNames[0]];
  const plane = width * height;
  const pixels = new Uint8ClampedArray(4 * plane).fill(255);
  const values = output.data;
  for (let i = 0; i < plane; i++)
    for (let channel = 0; channel < 3; channel++)
      pixels[4 * i + channel] = Math.round((values[channel * plane + i] + 1) * 127.5);
  return new ImageData(pixels, width, height);
}

let decoder = null;
let busy = 0; // decodings on their way
let queue = Promise.resolve(); // a session runs one request at a time
const cache = new Map(); // decoded images of unchanged ids

function decode(ids, upto) {
  const key = `${upto}:${ids.join()}`;
  if (!cache.has(key)) {
    const image = queue.then(() => run(decoder, ids, upto));
    queue = image.catch(() => {});
    cache.set(key, image);
    if (cache.size > 200) cache.delete(cache.keys().next().value);
  }
  return cache.get(key);
}

// --- panels ------------------------------------------------------------------------------------------------------

function makePanel(letter, image) {
  const root = byId(`panel-${letter}`);
  root.append(byId("panel").content.cloneNode(true));
  const title = root.querySelector("h2");
  title.id = `title-${letter}`;
  title.textContent = `Image ${letter.toUpperCase()}`;
  root.querySelector(".choose span").textContent = `Image ${letter.toUpperCase()} is`;
  const select = root.querySelector("select");
  data.images.forEach((entry, index) => select.add(new Option(entry.name, index)));
  const [canvas, change] = root.querySelectorAll("canvas");
  for (const each of [canvas, change]) Object.assign(each, { width, height });
  const panel = { letter, root, select, canvas, change, cells: root.querySelector(".cells"), image, ids: [], at: 0, asked: 0 };
  select.addEventListener("change", () => choose(panel, Number(select.value)));
  panel.cells.addEventListener("click", (event) => pick(panel, event.target.closest(".cell")));
  panel.cells.addEventListener("pointerover", (event) => point(event.target.closest(".cell")));
  panel.cells.addEventListener("focusin", (event) => point(event.target.closest(".cell")));
  panel.cells.addEventListener("keydown", (event) => move(panel, event));
  panel.cells.addEventListener("pointerleave", () => point(selected(panel)));
  return panel;
}

function choose(panel, image) {
  panel.image = image;
  panel.ids = [...data.images[image].ids];
  panel.select.value = image;
  const original = panel.root.querySelector("img");
  original.src = data.images[image].source;
  original.alt = `${data.images[image].name}, the original`;
  refresh(panel);
}

const selected = (panel) => panel.cells.querySelectorAll(".cell")[panel.at];
const colour = (code) => `hsl(${(code * 137.508) % 360} ${55 + ((code * 7) % 4) * 12}% ${38 + ((code * 13) % 5) * 8}%)`;

function drawCells(panel) {
  const { rows, columns, start } = state.grid;
  panel.at = Math.min(panel.at, rows * columns - 1);
  panel.cells.style.gridTemplate = `repeat(${rows}, minmax(0, 1fr)) / repeat(${columns}, minmax(0, 1fr))`;
  panel.cells.setAttribute("aria-label", `Codes of image ${panel.letter.toUpperCase()}, ${state.grid.name}`);
  const lines = [];
  for (let row = 0; row < rows; row++) {
    const line = document.createElement("div");
    line.setAttribute("role", "row");
    for (let column = 0; column < columns; column++) {
      const index = row * columns + column;
      const code = panel.ids[start + index];
      const changed = code !== data.images[panel.image].ids[start + index];
      const cell = document.createElement("div");
      cell.className = changed ? "cell changed" : "cell";
      cell.setAttribute("role", "gridcell");
      cell.setAttribute("aria-label", `row ${row + 1}, column ${column + 1}, code ${code}${changed ? ", changed" : ""}`);
      cell.setAttribute("aria-selected", index === panel.at);
      cell.tabIndex = index === panel.at ? 0 : -1;
      cell.dataset.code = code;
      cell.dataset.index = index;
      cell.textContent = columns <= 16 ? code : "";
      cell.style.setProperty("--code", colour(code));
      line.append(cell);
    }
    lines.push(line);
  }
  const focused = panel.cells.contains(document.activeElement);
  panel.cells.replaceChildren(...lines);
  if (focused) selected(panel).focus();
  tell(panel);
}

function tell(panel) {
  const { start, columns, name } = state.grid;
  const code = panel.ids[start + panel.at];
  const place = `row ${Math.floor(panel.at / columns) + 1}, column ${(panel.at % columns) + 1}`;
  panel.root.querySelector(".about").textContent = `Selected: code ${code} at ${place} of ${name}`;
}

async function refresh(panel) {
  drawCells(panel);
  mark();
  if (!decoder) return;
  const asked = ++panel.asked;
  document.body.dataset.busy = ++busy;
  const before = data.images[panel.image].ids;
  const images = [decode(panel.ids, state.upto), decode(before, state.upto)];
  const [image, plain] = await Promise.all(images).finally(() => (document.body.dataset.busy = --busy));
  if (asked !== panel.asked) return; // a later change is on its way
  panel.canvas.getContext("2d").putImageData(image, 0, 0);
  const name = data.images[panel.image].name;
  panel.canvas.setAttribute("aria-label", `${name}, decoded up to scale ${state.upto} of ${lengths.length}`);
  const gap = new ImageData(width, height);
  let moved = 0;
  for (let i = 0; i < gap.data.length; i += 4) {
    let most = 0;
    for (let channel = 0; channel < 3; channel++)
      most = Math.max(most, Math.abs(image.data[i + channel] - plain.data[i + channel]));
    gap.data.fill(Math.min(255, 4 * most), i, i + 3);
    gap.data[i + 3] = 255;
    if (most > 2) moved++;
  }
  panel.change.getContext("2d").putImageData(gap, 0, 0);
  const share = Math.round((1000 * moved) / (width * height)) / 10;
  panel.change.setAttribute("aria-label", `${share}% of the pixels differ by more than 2 of 255`);
}

const refreshAll = () => Promise.all(Object.values(panels).map(refresh));

// --- choosing and pointing ---------------------------------------------------------------------------------------

// The other image follows a choice in A; a choice in B leaves A where it is, so that two places can be swapped.
function pick(panel, cell) {
  if (!cell) return;
  const at = Number(cell.dataset.index);
  for (const each of panel === panels.a ? [panels.a, panels.b] : [panel]) {
    each.at = at;
    drawCells(each);
  }
  selected(panel).focus();
  point(selected(panel));
}

function move(panel, event) {
  const { rows, columns } = state.grid;
  const cell = event.target.closest(".cell");
  if (!cell) return;
  const index = Number(cell.dataset.index);
  const [row, column] = [Math.floor(index / columns), index % columns];
  const places = {
    ArrowLeft: [row, Math.max(0, column - 1)],
    ArrowRight: [row, Math.min(columns - 1, column + 1)],
    ArrowUp: [Math.max(0, row - 1), column],
    ArrowDown: [Math.min(rows - 1, row + 1), column],
    Home: [row, 0],
    End: [row, columns - 1],
  };
  if (event.key === "Enter" || event.key === " ") pick(panel, cell);
  else if (places[event.key]) {
    const cells = panel.cells.querySelectorAll(".cell");
    const next = cells[places[event.key][0] * columns + places[event.key][1]];
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  } else return;
  event.preventDefault();
}

function point(cell) {
  state.code = cell ? Number(cell.dataset.code) : null;
  mark();
  listPlaces();
}

// The cells with the code that is pointed at.
function mark() {
  for (const panel of Object.values(panels))
    for (const cell of panel.cells.querySelectorAll(".cell"))
      cell.classList.toggle("same", state.code !== null && Number(cell.dataset.code) === state.code);
}

// Every place of a code in the images of the page, in any grid of its stream.
function placesOf(code, stream) {
  return data.images.map(({ ids }) => {
    const found = [];
    for (const grid of grids) {
      if (grid.stream !== stream) continue;
      for (let index = 0; index < grid.rows * grid.columns; index++)
        if (ids[grid.start + index] === code) found.push({ grid, row: Math.floor(index / grid.columns), column: index % grid.columns });
    }
    return found;
  });
}

let listed = null;
function listPlaces() {
  const stream = state.grid.stream;
  const key = state.code === null ? null : `${stream}:${state.code}`;
  if (key === null || key === listed) return;
  listed = key;
  const places = placesOf(state.code, stream);
  const total = places.reduce((sum, found) => sum + found.length, 0);
  const images = places.filter((found) => found.length).length;
  byId("where-title").textContent = `Where code ${state.code} occurs`;
  const times = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
  byId("where-text").textContent = `${times(total, "place")} in ${times(images, "image")} of ${data.images.length}, stream “${data.streams[stream].name}”.`;
  const items = [];
  places.forEach((found, index) => {
    if (!found.length) return;
    const item = document.createElement("li");
    const stage = document.createElement("div");
    stage.className = "stage";
    const image = new Image();
    image.src = data.images[index].source;
    image.alt = "";
    stage.append(image);
    for (const { grid, row, column } of found) {
      const spot = document.createElement("span");
      spot.className = "spot";
      Object.assign(spot.style, {
        left: `${(100 * column) / grid.columns}%`,
        top: `${(100 * row) / grid.rows}%`,
        width: `${100 / grid.columns}%`,
        height: `${100 / grid.rows}%`,
      });
      stage.append(spot);
    }
    const scales = [...new Set(found.map(({ grid }) => `${grid.rows}×${grid.columns}`))].join(", ");
    item.append(stage, `${data.images[index].name}: ${times(found.length, "place")} (${scales})`);
    items.push(item);
  });
  byId("where-list").replaceChildren(...items);
}

// --- changes -----------------------------------------------------------------------------------------------------

function swap(places) {
  const { a, b } = panels;
  for (const [i, j] of places) [a.ids[i], b.ids[j]] = [b.ids[j], a.ids[i]];
  refreshAll();
}

function showUpto() {
  const last = grids.filter((grid) => grid.start + grid.rows * grid.columns <= lengths[state.upto - 1]).pop();
  byId("upto").value = state.upto;
  byId("upto-text").textContent = `${state.upto} of ${lengths.length} (${last.rows}×${last.columns})`;
  byId("upto").setAttribute("aria-valuetext", byId("upto-text").textContent);
  return refreshAll();
}

async function play() {
  byId("play").disabled = true;
  for (state.upto = 1; ; state.upto++) {
    await showUpto();
    if (state.upto === lengths.length) break;
    await new Promise((done) => setTimeout(done, 600));
  }
  byId("play").disabled = false;
}

// --- the page ----------------------------------------------------------------------------------------------------

function start() {
  const count = data.streams.map((stream) => `${stream.name}: ${stream.size} codes`).join(", ");
  byId("facts").textContent =
    `${data.tokenizer} (${data.family}), ${width}×${height} pixels, ${lengths[lengths.length - 1]} ids per image; ${count}.`;
  grids.forEach((grid, index) => {
    const label = document.createElement("label");
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "grid", value: index });
    radio.checked = grid === state.grid;
    radio.addEventListener("change", () => {
      state.grid = grid;
      state.code = listed = null;
      Object.values(panels).forEach(drawCells);
      mark();
    });
    label.append(radio, ` ${grid.name}`);
    byId("grids").append(label);
  });
  byId("upto").max = lengths.length;
  byId("upto").addEventListener("input", (event) => {
    state.upto = Number(event.target.value);
    showUpto();
  });
  byId("depth").hidden = lengths.length === 1;
  if (lengths.length === 1) byId("depth").style.display = "none";
  byId("play").addEventListener("click", play);
  for (const [id, name] of [["lines", "lined"], ["colours", "coloured"], ["numbers", "numbered"]]) {
    const show = () => document.body.classList.toggle(name, byId(id).checked);
    byId(id).addEventListener("change", show);
    show();
  }
  byId("swap").addEventListener("click", () => {
    const { start } = state.grid;
    swap([[start + panels.a.at, start + panels.b.at]]);
  });
  byId("swap-scale").addEventListener("click", () => {
    const { start, rows, columns } = state.grid;
    swap(Array.from({ length: rows * columns }, (_, index) => [start + index, start + index]));
  });
  byId("reset").addEventListener("click", () => Object.values(panels).forEach((panel) => choose(panel, panel.image)));
  Object.values(panels).forEach((panel) => choose(panel, panel.image));
}

const needing = ["swap", "swap-scale", "reset", "play"].map(byId);
needing.forEach((button) => (button.disabled = true));
start();
showUpto();
openDecoder()
  .then(async (opened) => {
    decoder = opened;
    await refreshAll();
    needing.forEach((button) => (button.disabled = false));
    const where = opened.provider === "webgpu" ? "WebGPU" : "WebAssembly";
    byId("status").textContent = `The decoder runs in this browser (${where}).`;
    document.body.dataset.ready = opened.provider;
  })
  .catch((error) => {
    byId("status").textContent = `The decoder cannot run here: ${error.message}. Ids and places can still be looked at.`;
    document.body.dataset.ready = "no";
  });
