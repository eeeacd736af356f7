// The page of `segnext serve`: the picture is composed here, from the photograph, its labels and the colours of the classes.

const element = (id) => document.getElementById(id);
const canvas = element("picture");
const loading = fetch("api/model").then((response) => response.json());
let model = null;

// What is shown. heat: the picture of a heat map, in place of the classes' colours.
let shown = null; // {key, width, height, photo, labels, hidden, pixel, heat}
let requests = 0; // files that were opened; what belongs to an earlier one comes too late

function say(text) {
  element("message").textContent = text;
  element("message").hidden = !text;
}

// A response that is not an error; errors come with a sentence.
async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer; is it still running?");
  }
  if (response.ok) return response;
  const error = await response.json().catch(() => ({}));
  throw new Error(error.detail ?? `The server failed (${response.status}); its terminal says more.`);
}

async function attempt(task) {
  say("");
  element("drop").classList.add("busy");
  try {
    await task();
  } catch (error) {
    say(error.message);
  } finally {
    element("drop").classList.remove("busy");
  }
}

async function open(file) {
  const request = ++requests;
  model = await loading;
  if (file.size > model.mostBytes) throw new Error(`${file.name} is larger than ${model.mostBytes / 1e6} MB.`);
  const answer = await ask(`api/photos?name=${encodeURIComponent(file.name.slice(-255))}`, {
    method: "POST",
    body: file,
    headers: { "Content-Type": "application/octet-stream" },
  });
  const found = await answer.json();
  const [photo, labels] = await Promise.all([
    ask(`api/photos/${found.key}/photo`).then((response) => response.blob()).then(createImageBitmap),
    ask(`api/photos/${found.key}/labels`).then((response) => response.arrayBuffer()),
  ]);
  if (request !== requests) return;
  shown = { ...found, photo, labels: new Uint8Array(labels), hidden: new Set(), pixel: null, heat: null };
  canvas.width = found.width;
  canvas.height = found.height;
  canvas.style.setProperty("--shape", found.width / found.height);
  const [width, height] = found.original;
  const size = `${width} x ${height} pixels`;
  element("size").textContent = width === found.width && height === found.height ? size : `${size}, shown at ${found.width} x ${found.height}`;
  element("mask").href = `api/photos/${found.key}/mask.png`;
  for (const id of ["picture", "results", "mask"]) element(id).hidden = false;
  element("hint").hidden = true;
  element("drop").classList.add("filled");
  showLegend();
  showTimes(found.seconds);
  showPixel();
  draw();
}

function showLegend() {
  element("legend").replaceChildren(...shown.shares.map(([label, share]) => {
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: !shown.hidden.has(label) });
    box.addEventListener("change", () => {
      box.checked ? shown.hidden.delete(label) : shown.hidden.add(label);
      draw();
    });
    const percent = `${(100 * share).toFixed(1)}%`;
    const line = Object.assign(document.createElement("label"), { className: "class" });
    line.append(box, swatch(label), cell("span", model.classes[label]), cell("span", percent));
    const item = document.createElement("li");
    item.append(line);
    return item;
  }));
}

function swatch(label) {
  const square = cell("span", "", "swatch");
  square.style.background = `rgb(${model.palette[label]})`;
  return square;
}

function cell(kind, text, className = "") {
  return Object.assign(document.createElement(kind), { textContent: text, className });
}

function row(...cells) {
  const line = document.createElement("tr");
  line.append(...cells);
  return line;
}

function showTimes(seconds) {
  const milliseconds = (value) => cell("td", `${(1000 * value).toFixed(1)} ms`, "number");
  const total = seconds.reduce((sum, [, value]) => sum + value, 0);
  const rows = seconds.map(([name, value]) => row(cell("td", name), milliseconds(value)));
  element("times").replaceChildren(...rows, row(cell("td", "together"), milliseconds(total)));
}

function showPixel(found) {
  element("cam").hidden = !found;
  element("hide").hidden = !shown.heat;
  element("scores").replaceChildren();
  if (!found) {
    element("place").textContent = "Click into the picture for its class and scores.";
    return;
  }
  const { x, y } = shown.pixel;
  element("place").textContent = `${x}, ${y}: ${model.classes[found.class]}`;
  element("scores").replaceChildren(...found.scores.map(([label, score]) => {
    const meter = cell("td", "");
    meter.append(Object.assign(document.createElement("meter"), { value: score }));
    const button = Object.assign(cell("button", "Grad-CAM"), { title: `where the model finds ${model.classes[label]}` });
    button.addEventListener("click", () => attempt(() => heat(label)));
    const action = cell("td", "");
    action.append(button);
    return row(cell("td", model.classes[label]), meter, cell("td", score.toFixed(3), "number"), action);
  }));
}

async function click(event) {
  const here = shown;
  const box = canvas.getBoundingClientRect();
  const within = (at, count) => Math.min(count - 1, Math.max(0, Math.floor(at * count)));
  const x = within((event.clientX - box.left) / box.width, here.width);
  const y = within((event.clientY - box.top) / box.height, here.height);
  const found = await (await ask(`api/photos/${here.key}/pixel?x=${x}&y=${y}`)).json();
  if (here !== shown) return;
  shown.pixel = { x, y };
  showPixel(found);
  draw();
}

async function heat(label) {
  const here = shown;
  const query = new URLSearchParams({ class: label, layer: element("layer").value });
  if (element("region").checked) for (const [name, value] of Object.entries(here.pixel)) query.set(name, value);
  const answer = await ask(`api/photos/${here.key}/gradcam?${query}`);
  const picture = await createImageBitmap(await answer.blob());
  if (here !== shown) return;
  shown.heat = picture;
  element("hide").hidden = false;
  const milliseconds = Number(answer.headers.get("Server-Timing").match(/dur=([\d.]+)/)[1]);
  showTimes([...shown.seconds, [`Grad-CAM of ${model.classes[label]}`, milliseconds / 1000]]);
  draw();
}

// The classes' colours where they are not hidden, transparent elsewhere.
function colours() {
  const image = new ImageData(shown.width, shown.height);
  const table = new Uint32Array(256);
  model.palette.forEach(([red, green, blue], label) => {
    if (!shown.hidden.has(label)) new Uint8Array(table.buffer, 4 * label, 4).set([red, green, blue, 255]);
  });
  const pixels = new Uint32Array(image.data.buffer);
  shown.labels.forEach((label, i) => { pixels[i] = table[label]; });
  const layer = new OffscreenCanvas(shown.width, shown.height);
  layer.getContext("2d").putImageData(image, 0, 0);
  return layer;
}

function draw() {
  const context = canvas.getContext("2d");
  context.globalAlpha = 1;
  context.drawImage(shown.photo, 0, 0);
  context.globalAlpha = Number(element("opacity").value);
  context.drawImage(shown.heat ?? colours(), 0, 0);
  if (!shown.pixel) return;
  const size = Math.max(3, shown.width / 120);
  const { x, y } = shown.pixel;
  context.globalAlpha = 1;
  for (const [colour, width] of [["black", size / 2], ["white", size / 4]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.beginPath();
    context.arc(x + 0.5, y + 0.5, size, 0, 2 * Math.PI);
    context.stroke();
  }
}

element("file").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  target.value = ""; // so that the same file can be chosen again
  if (file) attempt(() => open(file));
});
element("opacity").addEventListener("input", () => shown && draw());
element("all").addEventListener("click", () => { shown.hidden.clear(); showLegend(); draw(); });
element("none").addEventListener("click", () => { shown.shares.forEach(([label]) => shown.hidden.add(label)); showLegend(); draw(); });
element("hide").addEventListener("click", () => { shown.heat = null; element("hide").hidden = true; showTimes(shown.seconds); draw(); });
canvas.addEventListener("click", (event) => attempt(() => click(event)));
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault(); // or the browser would leave the page for the file
    element("drop").classList.toggle("over", type === "dragover");
    if (type !== "drop") return;
    const [file] = event.dataTransfer.files;
    attempt(() => file ? open(file) : Promise.reject(new Error("What was dropped is not a file.")));
  });
}
document.addEventListener("paste", ({ clipboardData: { files: [file] } }) => file && attempt(() => open(file)));

model = await loading; // last, so that what is dropped before it is there isn't lost
element("model").textContent = model.name;
document.title = model.name;
element("layer").append(...model.layers.map((layer) => new Option(layer, layer, layer === "stage4", layer === "stage4")));
