// The generator's forward pass in plain JavaScript, on one core, in a Web Worker.
//
// It computes what modules.py computes, with noise_mode="const", and keeps its names. A feature map
// x is a Float32Array [C, H, H], channel after channel. Nearly all time goes into `multiply`, by
// which Winograd's method [1] computes convolutions with a quarter of the multiplications.
//
// [1] Lavin and Gray 2016, Fast Algorithms for Convolutional Neural Networks, arXiv:1509.09308
"use strict";

const ACTIVATION_GAIN = Math.SQRT2;
const TILES = 64; // that are multiplied at a time: their values stay in the cache

// Tensors

/** Half precision, as a 16-bit integer -> number. */
function fromHalf(h) {
  const exponent = (h >> 10) & 31, fraction = (h & 1023) / 1024;
  const size = exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction;
  return h & 0x8000 ? -size : size;
}

/** Tensors by name. `index` lists [name, shape, bytes per value]; `text` has the values, base64. */
function readTensors(index, text) {
  const letters = atob(text), bytes = new Uint8Array(letters.length), tensors = {};
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  const content = new DataView(bytes.buffer);
  let at = 0;
  for (const [name, shape, size] of index) {
    const values = new Float32Array(shape.reduce((a, b) => a * b, 1));
    for (let i = 0; i < values.length; i++, at += size) {
      values[i] = size === 2 ? fromHalf(content.getUint16(at, true)) : content.getFloat32(at, true);
    }
    tensors[name] = { shape, values };
  }
  return tensors;
}

// Matrices

/** A matrix for `multiply`, of the values value(row, column): strips of four rows, [R / 4, K, 4].
 *  Missing rows of the last strip are zero. */
function inStrips(rows, columns, value) {
  const strips = new Float32Array(Math.ceil(rows / 4) * columns * 4);
  for (let r = 0; r < rows; r++) {
    const start = (r >> 2) * columns * 4 + (r & 3);
    for (let k = 0; k < columns; k++) strips[start + 4 * k] = value(r, k);
  }
  return strips;
}

/** out [M, N] = A B, for A [M, K] in strips of four rows and B [K, N] in strips of four columns.
 *  The sixteen sums of a 4 x 4 square stay in registers: 16 products need only 8 loads. */
function multiply(A, B, out, M, N, K) {
  for (let m = 0; m < M; m += 4) {
    for (let n = 0; n < N; n += 4) {
      let s00 = 0, s01 = 0, s02 = 0, s03 = 0, s10 = 0, s11 = 0, s12 = 0, s13 = 0;
      let s20 = 0, s21 = 0, s22 = 0, s23 = 0, s30 = 0, s31 = 0, s32 = 0, s33 = 0;
      for (let a = m * K, b = n * K, end = a + 4 * K; a < end; a += 4, b += 4) {
        const a0 = A[a], a1 = A[a + 1], a2 = A[a + 2], a3 = A[a + 3];
        const b0 = B[b], b1 = B[b + 1], b2 = B[b + 2], b3 = B[b + 3];
        s00 += a0 * b0; s01 += a0 * b1; s02 += a0 * b2; s03 += a0 * b3;
        s10 += a1 * b0; s11 += a1 * b1; s12 += a1 * b2; s13 += a1 * b3;
        s20 += a2 * b0; s21 += a2 * b1; s22 += a2 * b2; s23 += a2 * b3;
        s30 += a3 * b0; s31 += a3 * b1; s32 += a3 * b2; s33 += a3 * b3;
      }
      let o = m * N + n;
      out[o] = s00; out[o + 1] = s01; out[o + 2] = s02; out[o + 3] = s03; o += N;
      out[o] = s10; out[o + 1] = s11; out[o + 2] = s12; out[o + 3] = s13; o += N;
      out[o] = s20; out[o + 1] = s21; out[o + 2] = s22; out[o + 3] = s23; o += N;
      out[o] = s30; out[o + 1] = s31; out[o + 2] = s32; out[o + 3] = s33;
    }
  }
}

// Layers

/** Scale a vector to unit mean square. */
function normalize2ndMoment(x) {
  const mean = x.reduce((sum, v) => sum + v * v, 0) / x.length;
  return x.map((v) => v / Math.sqrt(mean + 1e-8));
}

/** Fully connected layer with equalized learning rate. x [I] -> [O]. */
class EqualizedLinear {
  constructor(tensors, name, gain = 1, lrMultiplier = 1) {
    const weight = tensors[`${name}.weight`];
    this.weight = weight.values;
    this.bias = tensors[`${name}.bias`].values;
    this.inputs = weight.shape[1];
    this.weightGain = (gain * lrMultiplier) / Math.sqrt(this.inputs);
    this.biasGain = gain * lrMultiplier;
  }

  forward(x) {
    return this.bias.map((bias, o) => {
      let sum = 0;
      for (let i = 0; i < this.inputs; i++) sum += this.weight[o * this.inputs + i] * x[i];
      return sum * this.weightGain + bias * this.biasGain;
    });
  }
}

const leakyRelu = (x) => (x < 0 ? 0.2 * x : x);

/** A border of one zero. [C, H, H] -> [C, H + 2, H + 2]. */
function pad(x, C, H) {
  const S = H + 2, y = new Float32Array(C * S * S);
  for (let row = 0; row < C * H; row++) {
    const at = Math.floor(row / H) * S * S + ((row % H) + 1) * S + 1;
    y.set(x.subarray(row * H, (row + 1) * H), at);
  }
  return y;
}

/** Zero insertion and the filter [1, 3, 3, 1] of gain 4, with a border of one pixel of what it
 *  gives outside the image. [C, H, H] -> [C, 2H + 2, 2H + 2]. */
function upsample(x, C, H) {
  const S = 2 * H + 2, wide = new Float32Array(H * S), y = new Float32Array(C * S * S);
  for (let channel = 0; channel < C; channel++) {
    const start = channel * H * H;
    for (let r = 0; r < H; r++) for (let c = 0; c <= H; c++) {
      const left = c > 0 ? x[start + r * H + c - 1] : 0, right = c < H ? x[start + r * H + c] : 0;
      wide[r * S + 2 * c] = (3 * left + right) / 4;
      wide[r * S + 2 * c + 1] = (left + 3 * right) / 4;
    }
    for (let r = 0; r <= H; r++) for (let c = 0; c < S; c++) {
      const above = r > 0 ? wide[(r - 1) * S + c] : 0, below = r < H ? wide[r * S + c] : 0;
      const at = (channel * S + 2 * r) * S + c;
      y[at] = (3 * above + below) / 4;
      y[at + S] = (above + 3 * below) / 4;
    }
  }
  return y;
}

// A 3x3 kernel for tiles of 6 x 6 inputs and 4 x 4 outputs: G of [1], for one row of taps
const KERNEL_TRANSFORM = [
  [1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
  [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1],
];

/** Modulated 3x3 convolution, noise, bias, leaky ReLU; with `up` it doubles the size first.
 *
 *  modules.py doubles the size by a transposed convolution, then filters. Filtering first gives the
 *  same values: both are convolutions, a transposed one with its taps in reverse order. */
class SynthesisLayer {
  constructor(tensors, name, up) {
    const { shape: [O, I], values } = tensors[`${name}.weight`];
    const noise = tensors[`${name}.noise_const`];
    Object.assign(this, { O, I, up });
    this.affine = new EqualizedLinear(tensors, `${name}.affine`, 1 / Math.sqrt(9 * I));
    this.bias = tensors[`${name}.bias`].values;
    this.noise = noise && noise.values;
    this.strength = noise && tensors[`${name}.noise_strength`].values;
    this.energy = new Float32Array(O * I); // of the nine taps, for demodulation
    values.forEach((v, i) => (this.energy[Math.floor(i / 9)] += v * v));
    this.kernels = []; // 36 matrices [O, I], for the entries of a transformed tile
    for (const column of KERNEL_TRANSFORM) for (const row of KERNEL_TRANSFORM) {
      const taps = column.flatMap((a) => row.map((b) => a * b));
      if (up) taps.reverse();
      this.kernels.push(inStrips(O, I, (o, i) => {
        let sum = 0;
        for (let k = 0, at = (o * I + i) * 9; k < 9; k++) sum += values[at + k] * taps[k];
        return sum;
      }));
    }
  }

  /** x [I, H, H], w [w_dim] -> [O, H, H], or [O, 2H, 2H] with `up`. */
  forward(x, H, w) {
    const { O, I, up, noise } = this, styles = this.affine.forward(w), R = up ? 2 * H : H;
    const scaled = new Float32Array(x.length);
    for (let i = 0, p = 0; i < I; i++) {
      for (const end = p + H * H; p < end; p++) scaled[p] = x[p] * styles[i];
    }
    const y = this.convolve(up ? upsample(scaled, I, H) : pad(scaled, I, H), R);
    for (let o = 0; o < O; o++) {
      let energy = 1e-8;
      for (let i = 0; i < I; i++) energy += styles[i] ** 2 * this.energy[o * I + i];
      const demodulation = ACTIVATION_GAIN / Math.sqrt(energy);
      const bias = this.bias[o] * ACTIVATION_GAIN;
      const strength = noise && this.strength[o] * ACTIVATION_GAIN;
      for (let p = 0, q = o * R * R; p < R * R; p++, q++) {
        y[q] = leakyRelu(y[q] * demodulation + bias + (noise ? noise[p] * strength : 0));
      }
    }
    return y;
  }

  /** 3x3 convolution by Winograd's method [1]. x [I, R + 2, R + 2] -> [O, R, R].
   *
   *  A tile is 6 x 6 inputs, of which neighbours share two rows; it gives 4 x 4 outputs. Each
   *  of the 36 entries of transformed tiles has a matrix product of its own, [O, I] [I, tiles]. */
  convolve(x, R) {
    const { O, I } = this, S = R + 2, across = R / 4, rows = 4 * Math.ceil(O / 4);
    const high = Math.min(across, Math.max(1, TILES / across)); // rows of tiles at a time
    const tiles = high * across, N = Math.max(4, tiles), y = new Float32Array(O * R * R);
    // the matrices of two entries do not lie a power of two apart: caches would mix them up
    const before = I * N + 16, after = rows * N + 16, half = new Float32Array(36);
    const inputs = new Float32Array(36 * before), outputs = new Float32Array(36 * after);
    for (let top = 0; top < across; top += high) {
      for (let i = 0; i < I; i++) for (let t = 0; t < tiles; t++) {
        const row = 4 * (top + Math.floor(t / across)), column = 4 * (t % across);
        const from = (i * S + row) * S + column, to = (t >> 2) * I * 4 + i * 4 + (t & 3);
        for (let k = 0; k < 6; k++) transformInput(x, from + k * S, half, k, 6);
        for (let k = 0; k < 6; k++) {
          transformInput(half, 6 * k, inputs, k * before + to, 6 * before);
        }
      }
      for (let k = 0; k < 36; k++) {
        const input = inputs.subarray(k * before), output = outputs.subarray(k * after);
        multiply(this.kernels[k], input, output, rows, N, I);
      }
      for (let o = 0; o < O; o++) for (let t = 0; t < tiles; t++) {
        const row = 4 * (top + Math.floor(t / across)), column = 4 * (t % across);
        const from = o * N + t, to = (o * R + row) * R + column;
        for (let k = 0; k < 6; k++) {
          transformOutput(outputs, 6 * k * after + from, after, half, k, 6);
        }
        for (let k = 0; k < 4; k++) transformOutput(half, 6 * k, 1, y, to + k, R);
      }
    }
    return y;
  }
}

/** Six inputs, x[p] and its successors, to six entries y[q], y[q + step], ...: Bᵀ of [1]. */
function transformInput(x, p, y, q, step) {
  const a = x[p], b = x[p + 1], c = x[p + 2], d = x[p + 3], e = x[p + 4], f = x[p + 5];
  y[q] = 4 * a - 5 * c + e;
  y[q + step] = d + e - 4 * (b + c);
  y[q + 2 * step] = e - d + 4 * (b - c);
  y[q + 3 * step] = e - c + 2 * (d - b);
  y[q + 4 * step] = e - c + 2 * (b - d);
  y[q + 5 * step] = 4 * b - 5 * d + f;
}

/** Six entries x[p], x[p + apart], ... to four outputs y[q], y[q + step], ...: Aᵀ of [1]. */
function transformOutput(x, p, apart, y, q, step) {
  const a = x[p], b = x[p + apart], c = x[p + 2 * apart];
  const d = x[p + 3 * apart], e = x[p + 4 * apart], f = x[p + 5 * apart];
  y[q] = a + b + c + d + e;
  y[q + step] = b - c + 2 * (d - e);
  y[q + 2 * step] = b + c + 4 * (d + e);
  y[q + 3 * step] = b - c + 8 * (d - e) + f;
}

/** Modulated 1x1 convolution to one grey channel, without demodulation. x [C, H, H] -> [H, H]. */
class ToRGB {
  constructor(tensors, name) {
    this.weight = tensors[`${name}.weight`].values;
    this.bias = tensors[`${name}.bias`].values[0];
    this.affine = new EqualizedLinear(tensors, `${name}.affine`, 1 / Math.sqrt(this.weight.length));
  }

  forward(x, w) {
    const area = x.length / this.weight.length, y = new Float32Array(area).fill(this.bias);
    this.affine.forward(w).forEach((style, i) => {
      for (let p = 0; p < area; p++) y[p] += style * this.weight[i] * x[i * area + p];
    });
    return y;
  }
}

// Networks

class Generator {
  /** `settings` are those of the page; its tensors are the generator's, `latents`, `directions`. */
  constructor(settings, tensors) {
    this.settings = settings;
    this.tensors = tensors;
    const layers = Object.keys(tensors).filter((k) => /^mapping\.layers\.\d+\.weight$/.test(k));
    this.mapping = layers.map((_, i) =>
      new EqualizedLinear(tensors, `mapping.layers.${i}`, ACTIVATION_GAIN, 0.01));
    const embed = tensors["mapping.embed.weight"];
    this.embed = embed && new EqualizedLinear(tensors, "mapping.embed");
    this.blocks = [];
    for (let H = 4, i = 0; H <= settings.resolution; H *= 2, i++) {
      const name = `synthesis.blocks.${i}`;
      this.blocks.push({
        conv0: i ? new SynthesisLayer(tensors, `${name}.conv0`, true) : null,
        conv1: new SynthesisLayer(tensors, `${name}.conv1`, false),
        torgb: new ToRGB(tensors, `${name}.torgb`),
      });
    }
  }

  /** Row of a tensor [N, C]. */
  row(name, i) {
    const { shape, values } = this.tensors[name];
    return values.subarray(i * shape[1], (i + 1) * shape[1]);
  }

  /** c: weight 1 - `mix` for class `from`, `mix` for `to`, each shared by the nearest positions. */
  condition({ from, to, mix, position }, seed) {
    const c = new Float32Array(this.embed ? this.embed.inputs : 0);
    const { positions, numPositions } = this.settings;
    const place = positions && (position ?? positions[seed]) * (numPositions - 1);
    for (const [label, weight] of [[from, 1 - mix], [to, mix]]) {
      if (!positions && c.length) c[label] += weight;
      for (let k = 0; positions && k < numPositions; k++) {
        c[label * numPositions + k] += weight * Math.max(0, 1 - Math.abs(place - k));
      }
    }
    return c;
  }

  /** The truncated w of a seed. The weights in c add up to 1. */
  mapSeed(seed, request) {
    const c = this.condition(request, seed);
    let w = normalize2ndMoment(this.row("latents", seed));
    if (this.embed) w = [...w, ...normalize2ndMoment(this.embed.forward(c))];
    for (const layer of this.mapping) w = layer.forward(w).map(leakyRelu);
    return w.map((value, k) => {
      let average = 0;
      for (let i = 0; i < Math.max(1, c.length); i++) {
        average += (c.length ? c[i] : 1) * this.row("mapping.w_avg", i)[k];
      }
      return average + request.psi * (value - average);
    });
  }

  /** w of a request: between the two nearest seeds, then moved along the directions. */
  map(request) {
    const low = Math.floor(request.seed), share = request.seed - low;
    const w = this.mapSeed(low, request), next = share ? this.mapSeed(low + 1, request) : w;
    return w.map((value, k) => request.directions.reduce(
      (sum, deviations, i) => sum + deviations * this.row("directions", i)[k],
      value + share * (next[k] - value)));
  }

  /** w [w_dim] -> image [R, R], about [-1, 1]. */
  synthesize(w) {
    let x = this.tensors["synthesis.const"].values, img = null;
    this.blocks.forEach(({ conv0, conv1, torgb }, i) => {
      const H = 4 * 2 ** i;
      if (conv0) x = conv0.forward(x, H / 2, w);
      x = conv1.forward(x, H, w);
      const rgb = torgb.forward(x, w);
      const S = H + 2, larger = img && upsample(img, 1, H / 2); // with a border
      img = rgb.map((v, p) => v + (img ? larger[(Math.floor(p / H) + 1) * S + (p % H) + 1] : 0));
    });
    return img;
  }

  /** The image of a request in grey levels, uint8 [R * R]. */
  draw(request) {
    const img = this.synthesize(this.map(request)); // a clamped array also rounds
    return Uint8ClampedArray.from(img, (v) => (v + 1) * 127.5);
  }
}

// The worker: first comes the model, then requests, one at a time

let generator = null;
self.onmessage = ({ data }) => {
  if (data.settings) {
    generator = new Generator(data.settings, readTensors(data.settings.tensors, data.weights));
  } else {
    self.postMessage(generator.draw(data));
  }
};
