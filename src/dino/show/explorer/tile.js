// One picture of the page: its map, outline, marks and caption, and what is saved of it.

const VEIL = [16, 18, 22, 200]; // over what a mask leaves out

/** An element with properties, attributes of accessibility ("role", "aria-...") and children. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (/^(role$|aria-)/.test(name)) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** Two paths, of which the lower one is the casing of the upper one. */
function lines(rows, columns) {
  const holder = element("template", { innerHTML: `<svg viewBox="0 0 ${columns} ${rows}"
    preserveAspectRatio="none" aria-hidden="true"><path class="casing"/><path class="line"/></svg>` });
  return holder.content.firstChild;
}

class Tile {
  /** `image` is an entry of the content; `save` is called with "mask" or "picture". */
  constructor(image, save) {
    this.image = image;
    this.picture = element("img", { src: image.picture, alt: "", draggable: false });
    this.canvas = element("canvas", { width: image.columns, height: image.rows });
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.pixels = this.context.createImageData(image.columns, image.rows);
    this.lines = lines(image.rows, image.columns);
    this.marks = element("div", { className: "marks" });
    const label = `${image.name}, ${image.rows} rows and ${image.columns} columns of patches`;
    this.surface = element("div", { className: "surface", tabIndex: 0, role: "application",
      "aria-label": label, "aria-describedby": "keys" },
    this.picture, this.canvas, this.lines, this.marks);
    this.surface.style.aspectRatio = `${image.width} / ${image.height}`;
    this.note = element("span", { className: "note" });
    this.buttons = ["mask", "picture"].map((what) => element("button", {
      type: "button", textContent: what === "mask" ? "Mask" : "Picture", className: what,
      title: `Save the ${what} as PNG`, "aria-label": `Save the ${what} of ${image.name}`,
      onclick: () => save(what),
    }));
    this.figure = element("figure", {}, this.surface, element("figcaption", {},
      element("span", { className: "name", textContent: image.name, title: image.name }),
      this.note, element("span", { className: "saves" }, ...this.buttons)));
  }

  /** The patch at a point of the window. */
  patchAt(x, y) {
    const box = this.surface.getBoundingClientRect();
    const cell = (share, count) => Math.max(0, Math.min(count - 1, Math.floor(share * count)));
    const row = cell((y - box.top) / box.height, this.image.rows);
    return row * this.image.columns + cell((x - box.left) / box.width, this.image.columns);
  }

  /** A map in the colours of a table, from `low` to `high`. */
  paintValues(values, low, high, table) {
    const scale = 255.999 / Math.max(high - low, 1e-12);
    this.#paint((i, pixels, at) => {
      const color = table[Math.max(0, Math.min(255, ((values[i] - low) * scale) | 0))];
      pixels[at] = color[0];
      pixels[at + 1] = color[1];
      pixels[at + 2] = color[2];
      pixels[at + 3] = 255;
    });
  }

  /** Colours [r, g, b, r, ...], one for each patch. */
  paintColors(colors) {
    this.#paint((i, pixels, at) => {
      pixels.set(colors.subarray(3 * i, 3 * i + 3), at);
      pixels[at + 3] = 255;
    });
  }

  /** A veil over all patches outside of a mask. */
  paintVeil(mask) {
    this.#paint((i, pixels, at) => {
      for (let c = 0; c < 4; c++) pixels[at + c] = mask[i] ? 0 : VEIL[c];
    });
  }

  #paint(one) {
    const { data } = this.pixels;
    for (let i = 0, at = 0; at < data.length; i++, at += 4) one(i, data, at);
    this.context.putImageData(this.pixels, 0, 0);
  }

  /** The outline of a mask; none for null. */
  outlineMask(mask) {
    const data = mask === null ? "" : outline(mask, this.image.rows, this.image.columns);
    for (const path of this.lines.children) path.setAttribute("d", data);
  }

  /** Marks [{kind, patch, text}] over the picture. */
  mark(marks) {
    while (this.marks.children.length > marks.length) this.marks.lastChild.remove();
    while (this.marks.children.length < marks.length) this.marks.append(element("span"));
    marks.forEach(({ kind, patch, text = "" }, i) => {
      const mark = this.marks.children[i];
      const [x, y] = this.#center(patch);
      if (mark.className !== kind) mark.className = kind;
      if (mark.textContent !== text) mark.textContent = text;
      mark.style.left = `${100 * x}%`;
      mark.style.top = `${100 * y}%`;
    });
    this.shown = marks;
  }

  #center(patch) {
    const { rows, columns } = this.image;
    return [((patch % columns) + 0.5) / columns, (Math.floor(patch / columns) + 0.5) / rows];
  }

  /** A mask at the full size of the image, white on black. */
  maskCanvas(mask) {
    const { width, height, rows, columns } = this.image;
    const canvas = element("canvas", { width, height });
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, width, height);
    context.fillStyle = "#fff";
    const edge = (index, count, length) => Math.round((index * length) / count);
    for (let i = 0; i < mask.length; i++) {
      if (!mask[i]) continue;
      const [r, c] = [Math.floor(i / columns), i % columns];
      const [left, top] = [edge(c, columns, width), edge(r, rows, height)];
      context.fillRect(left, top,
        edge(c + 1, columns, width) - left, edge(r + 1, rows, height) - top);
    }
    return canvas;
  }

  /** The picture as it is shown, of 1000 pixels or more, with a legend below it. */
  pictureCanvas(strength, { text, table, low, high }) {
    const { naturalWidth, naturalHeight } = this.picture;
    const times = Math.max(1, Math.round(1000 / Math.max(naturalWidth, naturalHeight)));
    const [width, height] = [naturalWidth * times, naturalHeight * times];
    const unit = width / 48;
    const canvas = element("canvas", { width, height: Math.ceil(height + 4 * unit) });
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(this.picture, 0, 0, width, height);
    context.globalAlpha = strength;
    context.imageSmoothingEnabled = false;
    context.drawImage(this.canvas, 0, 0, width, height);
    context.globalAlpha = 1;
    this.#drawLines(context, width, height, unit);
    this.#drawMarks(context, width, height, unit);
    context.font = `${unit * 1.15}px system-ui, sans-serif`;
    context.fillStyle = "#1d1f24";
    let left = unit;
    if (table) {
      context.fillText(low, left, height + 2.4 * unit);
      left += context.measureText(low).width + unit / 2;
      table.forEach((color, i) => {
        context.fillStyle = `rgb(${color.join()})`;
        context.fillRect(left + (i * 12 * unit) / 256, height + 1.4 * unit, unit / 16, 1.2 * unit);
      });
      context.fillStyle = "#1d1f24";
      context.fillText(high, left + 12.5 * unit, height + 2.4 * unit);
      left += 13.5 * unit + context.measureText(high).width;
    }
    context.fillText(text, left, height + 2.4 * unit, width - left - unit);
    return canvas;
  }

  #drawLines(context, width, height, unit) {
    const path = new Path2D();
    const { rows, columns } = this.image;
    path.addPath(new Path2D(this.lines.firstChild.getAttribute("d") ?? ""),
      new DOMMatrix().scale(width / columns, height / rows));
    for (const [color, line] of [["#000c", unit / 4], ["#fff", unit / 8]]) {
      Object.assign(context, { strokeStyle: color, lineWidth: line, lineCap: "square" });
      context.stroke(path);
    }
  }

  #drawMarks(context, width, height, unit) {
    for (const { kind, patch, text = "" } of this.shown ?? []) {
      const style = getComputedStyle(this.marks.getElementsByClassName(kind)[0]);
      const [x, y] = this.#center(patch);
      const size = Math.max(width / this.image.columns / 2, unit * 0.7);
      context.beginPath();
      if (style.borderRadius === "50%") context.arc(x * width, y * height, size, 0, 7);
      else context.rect(x * width - size, y * height - size, 2 * size, 2 * size);
      for (const [color, line] of [["#000", unit / 2.5], ["#fff", unit / 5]]) {
        Object.assign(context, { strokeStyle: color, lineWidth: line });
        context.stroke();
      }
      if (!text) continue;
      context.fillStyle = style.backgroundColor;
      context.fill();
      Object.assign(context, { fillStyle: "#fff", textAlign: "center", textBaseline: "middle" });
      context.font = `bold ${1.6 * size}px system-ui, sans-serif`;
      context.fillText(text, x * width, y * height);
      Object.assign(context, { textAlign: "start", textBaseline: "alphabetic" });
    }
  }
}
