"use strict";
// Arithmetic on patches: decoding, cosines, ranges, masks. Nothing here touches the document.
// An image has `count` patches, row by row; its features are integers, whose cosines count.

/** The bytes of a base64 text that holds a deflate stream. */
async function inflated(text) {
  const letters = atob(text);
  const packed = new Uint8Array(letters.length);
  for (let i = 0; i < packed.length; i++) packed[i] = letters.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The arrays of an image of the page's content, see `packed` in payload.py. */
async function decoded(image, { dimensions, wide, heads }) {
  const bytes = await inflated(image.data);
  const count = image.rows * image.columns;
  const high = dimensions * count;
  const attention = high + wide * count;
  const colors = attention + 2 * heads * count;
  return {
    count,
    ...featureRows(bytes, bytes.subarray(high), count, dimensions, wide),
    attention: image.peaks.map((peak, head) => {
      const low = attention + head * count;
      return Float32Array.from({ length: count }, (_, i) =>
        (bytes[low + i] + 256 * bytes[low + heads * count + i]) * (peak / 65535));
    }),
    colors: bytes.subarray(colors, colors + 3 * count),
  };
}

/** Features as rows of `stride` numbers (a multiple of 4), and 1 / length of each row. */
function featureRows(low, high, count, dimensions, wide) {
  const stride = 4 * Math.ceil(dimensions / 4);
  const features = new Int16Array(count * stride);
  for (let d = 0, k = 0; d < dimensions; d++) {
    for (let i = 0; i < count; i++, k++) {
      features[i * stride + d] = d < wide ? low[k] | (high[k] << 8) : (low[k] << 24) >> 24;
    }
  }
  const inverse = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const row = features.subarray(i * stride, (i + 1) * stride);
    const square = row.reduce((sum, value) => sum + value * value, 0);
    inverse[i] = square > 0 ? 1 / Math.sqrt(square) : 0;
  }
  return { features, inverse, stride };
}

/** The cosines of a patch of one image with all patches of another, written into `out`. */
function cosines(from, patch, to, out) {
  const { features, inverse, stride, count } = to;
  const query = from.features.slice(patch * stride, (patch + 1) * stride);
  const scale = from.inverse[patch];
  for (let i = 0, k = 0; i < count; i++) {
    let a = 0, b = 0, c = 0, d = 0;
    for (let j = 0; j < stride; j += 4, k += 4) {
      a += features[k] * query[j];
      b += features[k + 1] * query[j + 1];
      c += features[k + 2] * query[j + 2];
      d += features[k + 3] * query[j + 3];
    }
    out[i] = (a + b + c + d) * inverse[i] * scale;
  }
  return out;
}

/** The index of the largest value. */
function largest(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

/** The values below which the shares `low` and `high` of all values lie, to 1 / 1000 of their range. */
function quantiles(arrays, low, high) {
  let least = Infinity, most = -Infinity, total = 0;
  for (const values of arrays) {
    total += values.length;
    for (const value of values) {
      if (value < least) least = value;
      if (value > most) most = value;
    }
  }
  const bins = new Uint32Array(1001);
  const scale = most > least ? 1000 / (most - least) : 0;
  for (const values of arrays) {
    for (const value of values) bins[((value - least) * scale) | 0]++;
  }
  const at = (share) => {
    let bin = 0;
    for (let sum = bins[0]; sum < share * total && bin < 1000; sum += bins[++bin]);
    return scale > 0 ? least + bin / scale : least;
  };
  return [at(low), at(high)];
}

/** For each patch the largest of several values; null for none. */
function maximum(arrays) {
  if (arrays.length === 0) return null;
  const result = Float32Array.from(arrays[0]);
  for (const values of arrays.slice(1)) {
    for (let i = 0; i < result.length; i++) if (values[i] > result[i]) result[i] = values[i];
  }
  return result;
}

/** 1 for patches at least `threshold` like an example, and more like it than any counterexample. */
function exampleMask(like, unlike, threshold) {
  return Uint8Array.from(like, (value, i) =>
    value >= threshold && (unlike === null || value > unlike[i]) ? 1 : 0);
}

/** The smallest set of patches with a share `mass` of a map; of equal ones the last, as in dino. */
function massMask(values, mass) {
  const sorted = values.slice().sort();
  const total = sorted.reduce((sum, value) => sum + value, 0);
  let first = 0;
  for (let sum = sorted[0]; sum / total <= 1 - mass; sum += sorted[++first]);
  const least = sorted[first];
  let equal = sorted.lastIndexOf(least) + 1 - first;
  const mask = new Uint8Array(values.length);
  for (let i = values.length - 1; i >= 0; i--) {
    mask[i] = values[i] > least || (values[i] === least && equal-- > 0) ? 1 : 0;
  }
  return mask;
}

/** The outline of a mask as the data of an SVG path, in patches; runs of edges are one line. */
function outline(mask, rows, columns) {
  const inside = (r, c) =>
    r >= 0 && c >= 0 && r < rows && c < columns && mask[r * columns + c] === 1;
  const lines = [];
  for (let r = 0; r <= rows; r++) {
    for (let c = 0, start = 0; c <= columns; c++) {
      if (c < columns && inside(r - 1, c) !== inside(r, c)) continue;
      if (c > start) lines.push(`M${start} ${r}H${c}`);
      start = c + 1;
    }
  }
  for (let c = 0; c <= columns; c++) {
    for (let r = 0, start = 0; r <= rows; r++) {
      if (r < rows && inside(r, c - 1) !== inside(r, c)) continue;
      if (r > start) lines.push(`M${c} ${start}V${r}`);
      start = r + 1;
    }
  }
  return lines.join("");
}

/** 256 colours [r, g, b] from evenly spaced ones in hexadecimal, linear in between. */
function colorTable(text) {
  const given = text.split(" ").map((hex) =>
    [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (given.length - 1);
    const first = Math.min(Math.floor(place), given.length - 2);
    return given[first].map((value, channel) =>
      Math.round(value + (place - first) * (given[first + 1][channel] - value)));
  });
}
