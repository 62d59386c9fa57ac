// The served page: images that are added, network, size and block, and a running training.

const server = JSON.parse(byId("content").textContent);
const RUN_SECONDS = 5;

const open = {
  keys: [...server.given], // of the images that the page shows
  asked: 0, // changes so far
  shown: 0, // the last of them that the page shows
  working: false,
};

/** The answer of the server, as JSON; an error is its sentence. */
async function ask(route, body) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(route, body === undefined ? {} : options).catch(() => {
    throw new Error("the server does not answer: start dino explore again");
  });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

function showProblem(error) {
  byId("problem").hidden = false;
  byId("problem").firstElementChild.textContent = error.message;
}

/** Show what `open` says, computed by the server; what was asked meanwhile comes next. */
async function refresh() {
  open.asked += 1;
  if (open.working) return;
  open.working = true;
  try {
    while (open.shown < open.asked) {
      const number = open.asked;
      byId("busy").textContent = "computing ...";
      const content = await ask("patches", {
        images: open.keys, network: byId("network").value,
        size: Number(byId("size").value), block: Number(byId("block").value),
      });
      open.shown = number;
      setBlocks(content.depth, content.block);
      document.querySelector("header .soft").textContent = aboutOf(content);
      await fill(content);
      finishTiles();
    }
  } catch (error) {
    open.shown = open.asked;
    showProblem(error);
  }
  open.working = false;
  byId("busy").textContent = "";
  document.body.dataset.shown = open.shown;
}

function aboutOf({ network, images, error, depth, block }) {
  if (images.length === 0) return network;
  const counts = images.map(({ rows, columns }) => `${rows} \u00d7 ${columns}`);
  const grid = [...new Set(counts)].join(", ");
  const end = block < depth ? ` \u00b7 block ${block} of ${depth}` : "";
  return `${network}${end} \u00b7 ${grid} patches \u00b7 similarities differ by at most `
    + `${(Math.ceil(error * 1000) / 1000).toFixed(3)} from those in full precision`;
}

/** What a served page adds to a picture: to look for similar images, and to close it. */
function finishTiles() {
  byId("hint").hidden = open.keys.length > 0;
  state.images.forEach((image) => {
    const saves = image.tile.figure.querySelector(".saves");
    if (server.folder) {
      saves.append(element("button", { type: "button", className: "plain", textContent: "Nearest",
        "aria-label": `Images of the folder most similar to ${image.name}`, onclick: () => showNearest(image) }));
    }
    saves.append(element("button", { type: "button", className: "plain", textContent: "\u00d7",
      "aria-label": `Close ${image.name}`, onclick: () => {
        open.keys = open.keys.filter((key) => key !== image.key);
        refresh();
      } }));
  });
}

async function showNearest({ key, name }) {
  try {
    const found = await ask("neighbours", { image: key, count: 24 });
    showGrid(`Nearest to ${name}`, found.map(({ row, cosine: value }) => ({ row, text: cosine(value) })));
    folder.chosen = new Set(found.map(({ row }) => row));
    redrawMap();
  } catch (error) {
    showProblem(error);
  }
}

/** Add images by key; those that are there stay, and the oldest make room. */
function addKeys(keys) {
  const added = keys.filter((key) => !open.keys.includes(key));
  open.keys = [...open.keys, ...added].slice(-server.most);
  return refresh();
}

/** Show an image of the folder above, among the pictures. */
async function openRow(row) {
  const key = `row-${row}`;
  await addKeys([key]);
  state.images.find((image) => image.key === key)?.tile.figure.scrollIntoView({ block: "nearest" });
}

async function upload(files) {
  byId("problem").hidden = true;
  const keys = [];
  for (const file of files) {
    byId("busy").textContent = `reading ${file.name} ...`;
    try {
      if (file.size > server.bytes) {
        throw new Error(`${file.name} has more than ${server.bytes >> 20} MB: choose a smaller file`);
      }
      const answer = await fetch(`upload?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file })
        .catch(() => { throw new Error("the server does not answer: start dino explore again"); });
      const value = await answer.json();
      if (!answer.ok) throw new Error(value.error);
      keys.push(value.key);
    } catch (error) {
      showProblem(error);
    }
  }
  byId("busy").textContent = "";
  if (keys.length === 0) return;
  await addKeys(keys);
  const image = state.images.find(({ key }) => key === keys.at(-1));
  if (server.folder && image) await showNearest(image);
}

// ------------------------------------------------------------------------------ controls
function setBlocks(depth, block) {
  byId("blocks").hidden = depth === 0;
  byId("block").max = depth;
  byId("block").value = block;
  byId("block").nextElementSibling.textContent = `${block} of ${depth}`;
}

let waiting = 0;

function onChoice() {
  byId("size").nextElementSibling.textContent = `${byId("size").value} px`;
  byId("block").nextElementSibling.textContent = `${byId("block").value} of ${byId("block").max}`;
  clearTimeout(waiting);
  waiting = setTimeout(refresh, 150);
}

function listen() {
  for (const [value, textContent] of Object.entries(server.networks)) {
    byId("network").append(element("option", { value, textContent }));
  }
  byId("networks").hidden = Object.keys(server.networks).length === 1;
  const { value, step, most } = server.size;
  Object.assign(byId("size"), { min: step, max: most, step, value });
  setBlocks(server.depth, server.depth);
  onChoice();
  clearTimeout(waiting);
  for (const id of ["network", "size", "block"]) byId(id).addEventListener("input", onChoice);
  byId("add").onclick = () => byId("file").click();
  byId("file").onchange = () => {
    upload([...byId("file").files]);
    byId("file").value = "";
  };
  byId("problem").querySelector("button").onclick = () => { byId("problem").hidden = true; };
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    upload([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", (event) => upload([...event.clipboardData.files]));
}

// ------------------------------------------------------------------------------ a running training
let teacher = null;

/** Show the run again every few seconds, while the page is visible. */
async function watchRun() {
  byId("training").hidden = false;
  for (;;) {
    if (!document.hidden) {
      try {
        showRun(await ask("run"));
      } catch (error) {
        byId("training-about").textContent = error.message;
      }
    }
    await new Promise((done) => setTimeout(done, 1000 * RUN_SECONDS));
  }
}

function showRun({ step, total, teacher: newest, charts }) {
  const of = total ? ` of ${total.toLocaleString("en")}` : "";
  byId("training-about").textContent = `${server.run}: step ${step.toLocaleString("en")}${of}`
    + (newest === null ? ", no teacher yet" : "");
  const before = byId("curves").dataset.step;
  if (before !== `${step}/${charts.length}`) {
    byId("curves").dataset.step = `${step}/${charts.length}`;
    byId("curves").replaceChildren(...charts.map(({ title, value, svg }) => element("figure", {},
      element("figcaption", {}, element("span", { textContent: title }), element("b", { textContent: value })),
      element("div", { innerHTML: svg }))));
  }
  if (teacher !== null && newest !== teacher && byId("network").value === "run") refresh();
  teacher = newest;
}

// ------------------------------------------------------------------------------ start
document.body.dataset.served = "true";
state.caption = 62; // buttons are in a line of their own
if (server.folder || server.run) state.share = 0.75; // what comes below is seen
setUp();
listen();
byId("loading").textContent = "";
if (server.folder) showFolder(server.folder, openRow).catch(showProblem);
if (server.run) watchRun();
refresh().then(() => { document.body.dataset.ready = "true"; });
