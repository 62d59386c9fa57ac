// The page: what is shown of all images, and what pointer, keys and controls change.

const FITTED = [0.02, 0.998]; // shares of a map's values that a fitted colour scale leaves below
const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;
const cosine = (value) => value.toFixed(2).replace("-", "\u2212");
const byId = (id) => document.getElementById(id);

const state = {
  content: null, // what Python wrote, without its images
  images: [], // entries of the content with their arrays, `tile`, `values` and `onScreen`
  tables: {}, // colours of maps, by mode
  mode: "similarity",
  query: null, // {image, patch}
  pins: [], // {image, patch, like, values: [of each image]}
  head: "mean",
  masks: null, // of each image; null where they must be computed anew
  share: 1, // of the window below the controls that pictures may fill
  caption: 34, // pixels of the line below a picture
};

// ------------------------------------------------------------------------------ what is shown
/** The similarity of all patches of an image to pins, or without any to the marked patch. */
function pinned(index, like) {
  const chosen = state.pins.filter((pin) => pin.like === like);
  return maximum(chosen.map((pin) => pin.values[index]));
}

function attentionOf(image) {
  if (state.head !== "mean") return image.attention[state.head];
  image.mean ??= Float32Array.from(image.attention[0], (_, i) =>
    image.attention.reduce((sum, head) => sum + head[i], 0) / image.attention.length);
  return image.mean;
}

/** The mask of an image: of the examples, of the marked patch, or of a head's attention. */
function maskOf(image, index) {
  if (state.mode === "attention") return massMask(attentionOf(image), byId("mass").value / 100);
  const like = pinned(index, true) ?? (state.pins.length === 0 ? image.values : null);
  if (like === null) return new Uint8Array(image.count);
  return exampleMask(like, pinned(index, false), byId("threshold").value / 100);
}

const usesQuery = () => state.mode === "similarity" || state.mode === "mask";
const masksFollowQuery = () => state.mode === "mask" && state.pins.length === 0;
const hasMasks = () => state.mode === "attention" || state.mode === "mask"
  || (state.mode === "similarity" && state.pins.length > 0);

let frame = 0;

/** Draw at the next frame; `all` draws also what does not depend on the marked patch. */
function redraw(all = true) {
  if (all) state.masks = null;
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    performance.mark("start");
    draw();
    performance.measure("draw", "start");
  });
}

function draw() {
  if (state.query === null) return;
  const shown = state.images.filter((image) => image.onScreen);
  const from = state.images[state.query.image];
  if (usesQuery()) {
    for (const image of shown) cosines(from, state.query.patch, image, image.values);
  }
  const fresh = state.masks === null;
  if (fresh) state.masks = state.images.map(() => null);
  const scale = colorScale(shown);
  for (const image of shown) {
    const index = state.images.indexOf(image);
    if (fresh || masksFollowQuery() || state.masks[index] === null) {
      state.masks[index] = hasMasks() ? maskOf(image, index) : null;
      image.tile.outlineMask(state.masks[index]);
      if (state.mode === "mask") image.tile.paintVeil(state.masks[index]);
      if (state.mode === "attention") image.tile.paintValues(attentionOf(image), ...scale);
      if (state.mode === "components") image.tile.paintColors(image.colors);
    }
    if (state.mode === "similarity") image.tile.paintValues(image.values, ...scale);
    annotate(image, index);
  }
  drawLegend(scale);
  announce();
}

/** The values of the darkest and the brightest colour, and the colours. */
function colorScale(shown) {
  if (state.mode === "attention") {
    return [0, quantiles(shown.map(attentionOf), 0, FITTED[1])[1], state.tables.attention];
  }
  const arrays = state.mode === "similarity" ? shown.map((image) => image.values) : [];
  const range = byId("full").checked || arrays.length === 0 ? [0, 1] : quantiles(arrays, ...FITTED);
  return [...range, state.tables.similarity];
}

/** Row and column of a patch, from 1. */
const place = (patch, { columns }) => [Math.floor(patch / columns) + 1, (patch % columns) + 1];

/** Marks and note of an image. */
function annotate(image, index) {
  const { query, pins, mode } = state;
  const own = index === query.image;
  const best = usesQuery() && !own ? largest(image.values) : -1;
  const [row, column] = place(query.patch, image);
  const marks = pins.filter((pin) => pin.image === index).map(({ patch, like }) =>
    ({ kind: like ? "like" : "unlike", patch, text: like ? "+" : "\u2212" }));
  if (mode === "similarity" && best >= 0) marks.push({ kind: "best", patch: best });
  if (own) marks.push({ kind: "query", patch: query.patch });
  image.tile.mark(marks);
  const notes = {
    similarity: () => (own ? `row ${row}, column ${column}` : `nearest ${cosine(image.values[best])}`),
    attention: () => {
      const values = attentionOf(image);
      return `${own ? "here" : "peak"} ${percent(values[own ? query.patch : largest(values)], 2)}`;
    },
    components: () => "",
    mask: () => `${percent(state.masks[index].reduce((sum, one) => sum + one, 0) / image.count)} inside`,
  };
  image.note = notes[mode]();
  image.tile.note.textContent = image.note;
  image.tile.buttons[0].disabled = state.masks[index] === null;
}

const MEANINGS = {
  similarity: "cosine similarity to the marked patch",
  attention: "attention of the CLS token to a patch; inside the line: the chosen share of it",
  components: "equal colours: similar features (red, green, blue: their first three principal components)",
  mask: "inside: similarity to an example at least the threshold, and more than to any counterexample",
};
const UNPINNED = "inside: similarity to the marked patch at least the threshold";

function drawLegend([low, high, table]) {
  const bar = state.mode === "similarity" || state.mode === "attention";
  for (const id of ["low", "bar", "high"]) byId(id).hidden = !bar;
  const words = state.mode === "attention" ? (value) => percent(value, 2) : cosine;
  byId("low").textContent = words(low);
  byId("high").textContent = words(high);
  const outlined = state.mode === "similarity" && state.pins.length > 0 ? "; line: the mask" : "";
  const meaning = (masksFollowQuery() ? UNPINNED : MEANINGS[state.mode]) + outlined;
  byId("meaning").textContent = meaning;
  state.legend = { text: meaning, low: words(low), high: words(high), table: bar ? table : null };
  const context = byId("bar").getContext("2d");
  if (!bar || state.drawnTable === table) return;
  state.drawnTable = table;
  table.forEach((color, i) => {
    context.fillStyle = `rgb(${color.join()})`;
    context.fillRect(i, 0, 1, 1);
  });
}

let announcing = 0;

/** Tell a screen reader where the marked patch is, once it rests. */
function announce() {
  clearTimeout(announcing);
  announcing = setTimeout(() => {
    const { query, images } = state;
    if (query === null) return;
    const [row, column] = place(query.patch, images[query.image]);
    const notes = images.map(({ name, note }) => `${name}: ${note}`).join(", ");
    byId("status").textContent =
      `Row ${row}, column ${column} of ${images[query.image].name}. ${state.mode}: ${notes}`;
  }, 400);
}

// ------------------------------------------------------------------------------ what changes it
function look(image, patch) {
  if (state.query?.image === image && state.query.patch === patch) return;
  state.query = { image, patch };
  redraw(false);
}

/** The cosines of a patch with all patches of each image. */
function valuesOf(image, patch) {
  const from = state.images[image];
  return state.images.map((to) => cosines(from, patch, to, new Float32Array(to.count)));
}

/** Pin the marked patch, or remove the pin that is there. */
function pin(like) {
  const { image, patch } = state.query;
  const same = state.pins.findIndex((one) => one.image === image && one.patch === patch);
  const removed = same >= 0 ? state.pins.splice(same, 1)[0] : null;
  if (removed === null || removed.like !== like) {
    state.pins.push({ image, patch, like, values: valuesOf(image, patch) });
  }
  byId("clear").disabled = state.pins.length === 0;
  redraw();
}

function clearPins() {
  state.pins = [];
  byId("clear").disabled = true;
  redraw();
}

function onPointer(event, index) {
  const { tile } = state.images[index];
  look(index, tile.patchAt(event.clientX, event.clientY));
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function onKey(event) {
  const { image } = state.query;
  const { rows, columns } = state.images[image];
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key in ARROWS) {
    const [down, right] = ARROWS[event.key].map((step) => step * (event.shiftKey ? 5 : 1));
    const row = Math.floor(state.query.patch / columns) + down;
    const column = (state.query.patch % columns) + right;
    const within = (value, count) => Math.max(0, Math.min(count - 1, value));
    look(image, within(row, rows) * columns + within(column, columns));
  } else if (event.key === "Enter" || event.key === " ") {
    pin(!event.shiftKey);
  } else if (event.key === "-") {
    pin(false);
  } else {
    return;
  }
  event.preventDefault();
}

function save(index, what) {
  const { tile, name } = state.images[index];
  const strength = state.mode === "mask" ? 1 : byId("strength").value / 100;
  const canvas = what === "mask" ? tile.maskCanvas(state.masks[index])
    : tile.pictureCanvas(strength, state.legend);
  canvas.toBlob((blob) => {
    const href = URL.createObjectURL(blob);
    const stem = name.replace(/^.*\//, "").replace(/\.\w+$/, "");
    const kind = what === "mask" ? "mask" : { mask: "cutout" }[state.mode] ?? state.mode;
    element("a", { href, download: `${stem}-${kind}.png` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 60000);
  });
}

// ------------------------------------------------------------------------------ building the page
/** Add a decoded image of the content to the page. */
function addImage(entry) {
  const index = state.images.length;
  const image = { ...entry, onScreen: true };
  image.values = new Float32Array(image.count);
  image.tile = new Tile(image, (what) => save(index, what));
  const { surface, figure } = image.tile;
  surface.addEventListener("pointermove", (event) => onPointer(event, index));
  surface.addEventListener("pointerdown", (event) => onPointer(event, index));
  surface.addEventListener("click", (event) => {
    if (event.pointerType !== "touch") pin(!event.shiftKey);
  });
  surface.addEventListener("keydown", onKey);
  surface.addEventListener("focus", () => {
    const middle = Math.floor(image.rows / 2) * image.columns + Math.floor(image.columns / 2);
    if (state.query.image !== index) look(index, middle);
  });
  figure.dataset.index = index;
  state.images.push(image);
  byId("images").append(figure);
}

/** One height for all pictures: the largest with which they fit into the window, if that suffices. */
function arrange() {
  if (state.images.length === 0) return;
  const gap = 14, least = 130, { share, caption } = state;
  const main = byId("images");
  main.style.maxWidth = "none";
  const [width, height] = [main.clientWidth, share * (window.innerHeight - main.offsetTop) - gap];
  const ratios = state.images.map((image) => image.width / image.height);
  const layout = (columns, most) => {
    const rows = ratios.map((_, i) => ratios.slice(i, i + columns)).filter((_, i) => !(i % columns));
    const sums = rows.map((row) => row.reduce((sum, ratio) => sum + ratio, 0));
    const heights = rows.map((row, i) => (width - gap * (row.length - 1)) / sums[i]);
    const size = Math.min(...heights, most ?? height / rows.length - caption - gap);
    return { size, width: Math.max(...sums) * size + gap * (columns - 1) };
  };
  const layouts = ratios.map((_, i) => layout(i + 1));
  let best = layouts.reduce((one, other) => (other.size > one.size + 1 ? other : one));
  if (best.size < least) best = layout(Math.max(2, Math.floor(width / 320)), 0.8 * height);
  state.images.forEach(({ tile }, i) => {
    tile.surface.style.width = `${Math.floor(best.size * ratios[i])}px`;
  });
  main.style.maxWidth = `${Math.ceil(best.width) + 1}px`;
}

function showControls() {
  for (const control of document.querySelectorAll("[data-for]")) {
    control.hidden = !control.dataset.for.split(" ").includes(state.mode);
  }
  for (const output of byId("controls").querySelectorAll("output")) {
    const { id, value } = byId(output.htmlFor.value);
    output.textContent = id === "threshold" ? cosine(value / 100) : percent(value / 100);
  }
  const strength = state.mode === "mask" ? 1 : byId("strength").value / 100;
  document.documentElement.style.setProperty("--strength", strength);
}

function onControl() {
  state.mode = document.querySelector("[name=mode]:checked").value;
  const head = document.querySelector("[name=head]:checked")?.value ?? "mean";
  state.head = head === "mean" ? head : Number(head);
  showControls();
  redraw();
}

/** The choice of heads, as far as there are any. */
function showHeads(count) {
  const choice = document.querySelector("[name=mode][value=attention]");
  choice.parentElement.hidden = count === 0;
  if (count === 0 && choice.checked) document.querySelector("[name=mode]").checked = true;
  if (byId("heads").querySelectorAll("label").length === count + 1) return;
  for (const label of byId("heads").querySelectorAll("label")) label.remove();
  const names = [["mean", "mean"], ...Array.from({ length: count }, (_, i) => [i, `${i + 1}`])];
  for (const [value, text] of names) {
    const input = element("input", { type: "radio", name: "head", value, checked: value === "mean" });
    byId("heads").append(element("label", {}, input, text));
  }
}

/** A threshold that one patch in ten exceeds, from a sample of pairs. */
function typicalThreshold() {
  const step = Math.ceil(state.images.length / 4);
  const sample = state.images.filter((_, i) => i % step === 0);
  const maps = sample.flatMap((from) => [0.2, 0.35, 0.5, 0.65, 0.8].flatMap((share) => sample.map(
    (to) => cosines(from, Math.floor(share * from.count), to, new Float32Array(to.count)))));
  return quantiles(maps, 0, 0.9)[1];
}

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").textContent = dark ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `Use ${dark ? "light" : "dark"} colours`);
}

const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const image = state.images[target.dataset.index];
    if (image?.tile.figure === target) image.onScreen = isIntersecting;
  }
  redraw();
});

/** Where a patch of an image is, so that it is found again in other features of the image. */
function position({ image, patch, ...rest }) {
  const { columns, rows, key } = state.images[image];
  const [row, column] = [Math.floor(patch / columns), patch % columns];
  return { key, x: (column + 0.5) / columns, y: (row + 0.5) / rows, ...rest };
}

/** The inverse of `position`; null if the image is gone. */
function found({ key, x, y, ...rest }) {
  const image = state.images.findIndex((one) => one.key === key);
  if (image < 0) return null;
  const { columns, rows } = state.images[image];
  const patch = Math.floor(y * rows) * columns + Math.floor(x * columns);
  return { image, patch, ...rest };
}

/** Show these images in place of those before; the marked patch and pins stay where they were. */
async function fill(content) {
  const { images, ...rest } = content;
  const entries = [];
  for (const entry of images) entries.push({ ...entry, ...(await decoded(entry, rest)) });
  const marked = state.query && position(state.query);
  const pins = state.pins.map(position);
  for (const { tile } of state.images) {
    observer.unobserve(tile.figure);
    tile.figure.remove();
  }
  Object.assign(state, { content: rest, images: [], pins: [], query: null, masks: null });
  for (const mode of ["similarity", "attention"]) state.tables[mode] = colorTable(rest.tables[mode]);
  showHeads(rest.heads);
  entries.forEach(addImage);
  byId("loading")?.remove();
  byId("controls").hidden = entries.length === 0;
  if (entries.length > 0) {
    const { rows, columns } = entries[0];
    const middle = { image: 0, patch: Math.floor(rows / 2) * columns + Math.floor(columns / 2) };
    state.query = (marked && found(marked)) ?? middle;
    for (const { image, patch, like } of pins.map(found).filter((one) => one !== null)) {
      state.pins.push({ image, patch, like, values: valuesOf(image, patch) });
    }
    byId("threshold").value = Math.round(100 * typicalThreshold());
  }
  byId("clear").disabled = state.pins.length === 0;
  for (const { tile } of state.images) observer.observe(tile.figure);
  onControl();
  arrange();
}

/** What the page has whatever images it shows. */
function setUp() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches);
  dark.addEventListener("change", () => setTheme(dark.matches));
  byId("theme").onclick = () => setTheme(document.documentElement.dataset.theme !== "dark");
  byId("controls").addEventListener("input", onControl);
  byId("like").onclick = () => pin(true);
  byId("unlike").onclick = () => pin(false);
  byId("clear").onclick = clearPins;
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") clearPins();
  });
  window.addEventListener("resize", arrange);
}
