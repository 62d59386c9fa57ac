// The map of a folder, a lasso on it, and the grid of images that are selected or nearest.

const SHOWN = 60; // images that the grid shows at first, and more each time
const CELL = 58; // pixels of a thumbnail on the map
const RADIUS = 14; // pixels around a point of the map within which an image is under the pointer

const folder = {
  count: 0,
  layer: document.createElement("canvas"), // the map without lasso and circle
  drawn: [], // thumbnails on the map: {row, x, y}
  places: null, // Uint16Array of x and y of each image, 0 to 65535
  scale: 1, left: 0, top: 0, // the part of the map that is shown: zoom, and its corner from 0 to 1
  chosen: new Set(), // rows
  grid: [], // [{row, text}] in order
  limit: SHOWN,
  line: null, // the lasso while it is drawn: [[x, y], ...] in pixels of the canvas
  circle: null, // for keys: {x, y, radius}, in pixels
  thumbnails: new Map(), // row -> Image
  open: () => {}, // called with a row
};

/** The place of an image on the canvas, in CSS pixels. */
function onMap(row) {
  const { width, height } = mapSize();
  return [(folder.places[2 * row] / 65535 - folder.left) * folder.scale * (width - 2 * CELL) + CELL,
    (folder.places[2 * row + 1] / 65535 - folder.top) * folder.scale * (height - 2 * CELL) + CELL];
}

const mapCanvas = () => byId("map").querySelector("canvas");

function mapSize() {
  const { clientWidth: width, clientHeight: height } = mapCanvas();
  return { width, height };
}

const thumbnailOf = (row) => `thumbnails/${row}?${folder.version}`;

let mapFrame = 0, mapChanged = false;

/** Draw the map at the next frame; without `all` only the line that is drawn over its images. */
function redrawMap(all = true) {
  mapChanged ||= all;
  mapFrame ||= requestAnimationFrame(() => {
    mapFrame = 0;
    if (mapChanged) drawImages();
    mapChanged = false;
    drawLine();
  });
}

const colorOf = (name) => getComputedStyle(document.body).getPropertyValue(name);

/** Draw points, thumbnails and what is chosen, on a canvas that is not shown. */
function drawImages() {
  const ratio = window.devicePixelRatio, { width, height } = mapSize();
  const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
  folder.layer = element("canvas", { width: across, height: down });
  if (folder.places === null || across === 0) return;
  const context = folder.layer.getContext("2d");
  context.scale(ratio, ratio);
  const cells = new Map(); // of the canvas -> the image nearest to its middle
  const dot = folder.count > 50000 ? 1 : folder.count > 5000 ? 2 : 3;
  context.fillStyle = colorOf("--soft");
  for (let row = 0; row < folder.count; row++) {
    const [x, y] = onMap(row);
    if (x < -CELL || y < -CELL || x > width + CELL || y > height + CELL) continue;
    context.fillRect(x - dot / 2, y - dot / 2, dot, dot);
    const [column, line] = [Math.floor(x / CELL), Math.floor(y / CELL)];
    const away = Math.hypot(x / CELL - column - 0.5, y / CELL - line - 0.5);
    const key = column * 4096 + line, before = cells.get(key);
    if (before === undefined || away < before.away) cells.set(key, { row, away, x, y });
  }
  const placed = [...cells.values()].filter(({ x, y }) =>
    x > 0 && y > 0 && x < width && y < height).sort((a, b) => a.away - b.away);
  folder.drawn = [];
  for (const cell of placed) {
    const free = folder.drawn.every((other) =>
      Math.abs(other.x - cell.x) >= CELL - 4 || Math.abs(other.y - cell.y) >= CELL - 4);
    if (free) folder.drawn.push(cell);
  }
  for (const { row, x, y } of folder.drawn) drawThumbnail(context, row, x, y);
  context.fillStyle = colorOf("--chosen");
  const size = Math.max(4, dot + 2);
  for (const row of folder.chosen) {
    const [x, y] = onMap(row);
    context.fillRect(x - size / 2, y - size / 2, size, size);
  }
}

/** A thumbnail around its place; it is fetched first, if the map has never shown it. */
function drawThumbnail(context, row, x, y) {
  let picture = folder.thumbnails.get(row);
  if (picture === undefined) {
    picture = element("img", { onload: () => redrawMap(), src: thumbnailOf(row) });
    folder.thumbnails.set(row, picture);
    if (folder.thumbnails.size > 4000) folder.thumbnails.delete(folder.thumbnails.keys().next().value);
  }
  if (!picture.complete || picture.naturalWidth === 0) return;
  const scale = (CELL - 8) / Math.max(picture.naturalWidth, picture.naturalHeight);
  const [width, height] = [picture.naturalWidth * scale, picture.naturalHeight * scale];
  context.drawImage(picture, x - width / 2, y - height / 2, width, height);
  if (!folder.chosen.has(row)) return;
  context.strokeStyle = colorOf("--chosen");
  context.lineWidth = 3;
  context.strokeRect(x - width / 2, y - height / 2, width, height);
}

/** Show what `drawImages` drew, and over it the lasso or the circle of the keys. */
function drawLine() {
  const canvas = mapCanvas(), context = canvas.getContext("2d"), path = new Path2D();
  [canvas.width, canvas.height] = [folder.layer.width, folder.layer.height];
  if (canvas.width === 0) return;
  context.drawImage(folder.layer, 0, 0);
  context.scale(window.devicePixelRatio, window.devicePixelRatio);
  if (folder.line) {
    folder.line.forEach(([x, y], i) => (i ? path.lineTo(x, y) : path.moveTo(x, y)));
    path.closePath();
  } else if (folder.circle && document.activeElement === mapCanvas()) {
    path.arc(folder.circle.x, folder.circle.y, folder.circle.radius, 0, 7);
  } else {
    return;
  }
  for (const [style, width] of [[colorOf("--ink"), 4], [colorOf("--chosen"), 2]]) {
    Object.assign(context, { strokeStyle: style, lineWidth: width });
    context.stroke(path);
  }
}

// ------------------------------------------------------------------------------ selecting
/** Whether a point lies inside of a closed line: an odd number of its edges lie to the right. */
function inside([x, y], line) {
  let odd = false;
  for (let i = 0, j = line.length - 1; i < line.length; j = i++) {
    const [[ax, ay], [bx, by]] = [line[i], line[j]];
    if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) odd = !odd;
  }
  return odd;
}

/** The test of `inside` for many points, of which most are far away. */
function surroundedBy(line) {
  const [xs, ys] = [0, 1].map((axis) => line.map((point) => point[axis]));
  const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  return (point) => point[0] >= left && point[0] <= right && point[1] >= top && point[1] <= bottom
    && inside(point, line);
}

function selectWhere(test) {
  const rows = [];
  for (let row = 0; row < folder.count; row++) if (test(onMap(row))) rows.push(row);
  folder.chosen = new Set(rows);
  const count = rows.length.toLocaleString("en");
  showGrid(`${count} image${rows.length === 1 ? "" : "s"} selected`, rows.map((row) => ({ row, text: "" })));
  redrawMap();
}

/** The image whose place is nearest to a point, within `RADIUS`, or else whose thumbnail is there. */
function under(x, y) {
  let best = null, least = RADIUS;
  for (let row = 0; row < folder.count; row++) {
    const [px, py] = onMap(row);
    const away = Math.hypot(px - x, py - y);
    if (away < least) [best, least] = [row, away];
  }
  const half = CELL / 2 - 4;
  const tile = folder.drawn.find((one) => Math.abs(one.x - x) < half && Math.abs(one.y - y) < half);
  return best ?? tile?.row ?? null;
}

/** The grid: images [{row, text}] below a title. */
function showGrid(title, images, limit = SHOWN) {
  Object.assign(folder, { grid: images, limit });
  byId("grid-title").textContent = title;
  byId("list").disabled = images.length === 0;
  byId("more").hidden = images.length <= limit;
  const shown = images.slice(0, limit);
  byId("grid").replaceChildren(...shown.map(({ row, text }) => element("li", {}, element("button", {
    type: "button", onclick: () => folder.open(row), "aria-label": `Open image ${row + 1}${text && `, ${text}`}`,
  }, element("img", { src: thumbnailOf(row), alt: "", loading: "lazy" }), element("span", { textContent: text })))));
  ask("names", { rows: shown.map(({ row }) => row) }).then((names) => {
    if (folder.grid !== images) return;
    names.forEach((name, i) => {
      const button = byId("grid").children[i].firstChild;
      const note = shown[i].text && `, ${shown[i].text}`;
      button.title = name;
      button.setAttribute("aria-label", `Open ${name}${note}`);
    });
  }, showProblem);
}

async function saveList() {
  const rows = folder.grid.map(({ row }) => row);
  const answer = await fetch("list", { method: "POST", body: JSON.stringify({ rows }) });
  const href = URL.createObjectURL(await answer.blob());
  element("a", { href, download: "selected.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60000);
}

// ------------------------------------------------------------------------------ pointer and keys
function zoom(factor, x, y) {
  const { width, height } = mapSize();
  const before = [(x - CELL) / (width - 2 * CELL), (y - CELL) / (height - 2 * CELL)];
  const scale = Math.max(1, Math.min(200, folder.scale * factor));
  folder.left += before[0] / folder.scale - before[0] / scale;
  folder.top += before[1] / folder.scale - before[1] / scale;
  folder.scale = scale;
  if (scale === 1) folder.left = folder.top = 0;
  redrawMap();
}

function listenToMap() {
  const canvas = mapCanvas();
  let start = null, naming = 0;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    start = { x: event.offsetX, y: event.offsetY, left: folder.left, top: folder.top, moves: event.shiftKey };
    folder.line = start.moves ? null : [[event.offsetX, event.offsetY]];
    folder.circle = null;
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = [event.offsetX, event.offsetY];
    if (start?.moves) {
      const { width, height } = mapSize();
      folder.left = start.left - (x - start.x) / folder.scale / (width - 2 * CELL);
      folder.top = start.top - (y - start.y) / folder.scale / (height - 2 * CELL);
      redrawMap();
    } else if (start) {
      folder.line.push([x, y]);
      redrawMap(false);
    } else {
      clearTimeout(naming);
      naming = setTimeout(() => nameOf(under(x, y)), 80);
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    const line = folder.line, far = start && Math.hypot(event.offsetX - start.x, event.offsetY - start.y);
    const drawn = line?.some(([x, y]) => Math.hypot(x - start.x, y - start.y) > 6);
    const { moves } = start ?? {};
    folder.line = start = null;
    if (drawn && line.length > 2) selectWhere(surroundedBy(line));
    else if (!moves && far < 6) openAt(event.offsetX, event.offsetY);
    redrawMap(false);
  });
  canvas.addEventListener("pointercancel", () => {
    folder.line = start = null;
    redrawMap(false);
  });
  canvas.addEventListener("wheel", (event) => {
    zoom(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
    event.preventDefault();
  }, { passive: false });
  canvas.addEventListener("keydown", onMapKey);
  for (const event of ["focus", "blur"]) canvas.addEventListener(event, () => redrawMap(false));
  const middle = (factor) => () => zoom(factor, mapSize().width / 2, mapSize().height / 2);
  byId("in").onclick = middle(1.5);
  byId("out").onclick = middle(1 / 1.5);
  new ResizeObserver(() => redrawMap()).observe(canvas);
  new MutationObserver(() => redrawMap()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
}

function openAt(x, y) {
  const row = under(x, y);
  if (row !== null) folder.open(row);
}

function onMapKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const { width, height } = mapSize();
  const circle = folder.circle ??= { x: width / 2, y: height / 2, radius: 60 };
  if (event.key in ARROWS) {
    const [down, right] = ARROWS[event.key].map((step) => step * (event.shiftKey ? 50 : 10));
    circle.x = Math.max(0, Math.min(width, circle.x + right));
    circle.y = Math.max(0, Math.min(height, circle.y + down));
    clearTimeout(folder.naming);
    folder.naming = setTimeout(() => nameOf(under(circle.x, circle.y)), 200);
  } else if (event.key === "+" || event.key === "-") {
    circle.radius = Math.max(8, Math.min(2000, circle.radius * (event.key === "+" ? 1.2 : 1 / 1.2)));
  } else if (event.key === "Enter") {
    selectWhere(([x, y]) => Math.hypot(x - circle.x, y - circle.y) <= circle.radius);
  } else if (event.key.toLowerCase() === "o") {
    openAt(circle.x, circle.y);
  } else {
    return;
  }
  redrawMap(false);
  event.preventDefault();
}

/** Show the name of the image under the pointer. */
async function nameOf(row) {
  if (row === null) {
    byId("under").textContent = "";
    return;
  }
  const [name] = await ask("names", { rows: [row] });
  byId("under").textContent = `\u00b7 ${name}`;
}

/** Show the folder, and its map as soon as it is made. */
async function showFolder({ count, root, version }, open) {
  Object.assign(folder, { count, version, open });
  byId("folder").hidden = false;
  const images = `${count.toLocaleString("en")} images in ${root}`;
  byId("folder-about").textContent = images;
  byId("list").onclick = () => saveList().catch(showProblem);
  byId("more").onclick = () => showGrid(byId("grid-title").textContent, folder.grid, folder.limit + SHOWN);
  listenToMap();
  for (;;) {
    const answer = await fetch("map");
    if (answer.headers.get("Content-Type").startsWith("application/octet-stream")) {
      folder.places = new Uint16Array(await answer.arrayBuffer());
      break;
    }
    const { error, placing } = await answer.json();
    if (error) throw new Error(error);
    byId("folder-about").textContent = `${images}; the map is being made from ${placing.toLocaleString("en")} of them ...`;
    await new Promise((done) => setTimeout(done, 1000));
  }
  byId("folder-about").textContent = images;
  redrawMap();
  byId("map").dataset.ready = "true";
}
