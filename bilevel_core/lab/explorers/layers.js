// Layers on TensorFlow.js, one function each, and the file that weights come in. Part of the worker of a live figure.
// Images lie as (B, H, W, C); weights are stored as PyTorch stores them and turned around once, when first used.

// The tensors of a safetensors file: {name: {shape, data}}, float32 from "F32" or "F16".
function readSafetensors(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const size = Number(view.getBigUint64(0, true)), start = 8 + size;
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  const out = {};
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const raw = bytes.slice(start + from, start + to).buffer;
    if (dtype === "F32") out[name] = { shape, data: new Float32Array(raw) };
    else if (dtype === "F16") out[name] = { shape, data: Float32Array.from(new Uint16Array(raw), half) };
    else throw new Error(`${name} is ${dtype}; a file for the page holds F16 and F32`);
  }
  return out;
}
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}

// Weights of one network, by the names of PyTorch below a prefix; each becomes a tensor when first asked for.
class Weights {
  constructor(tensors, prefix) {
    [this.tensors, this.prefix, this.made] = [tensors, prefix, {}];
  }
  has(name) {
    return `${this.prefix}${name}` in this.tensors;
  }
  raw(name) {
    const found = this.tensors[`${this.prefix}${name}`];
    if (!found) throw new Error(`no tensor ${this.prefix}${name} among the weights`);
    return found;
  }
  keep(key, make) {
    if (!this.made[key]) this.made[key] = tf.keep(tf.tidy(make));
    return this.made[key];
  }
  vector(name) {
    return this.keep(name, () => tf.tensor1d(this.raw(name).data));
  }
  // (outputs, inputs) -> (inputs, outputs)
  matrix(name) {
    return this.keep(name, () => tf.transpose(tf.tensor(this.raw(name).data, this.raw(name).shape)));
  }
  // (outputs, inputs, height, width) -> (height, width, inputs, outputs)
  filter(name) {
    return this.keep(name, () => tf.transpose(tf.tensor(this.raw(name).data, this.raw(name).shape), [2, 3, 1, 0]));
  }
}

const silu = (x) => tf.mul(x, tf.sigmoid(x));
// erf to 1.5e-7: Abramowitz and Stegun 7.1.26
function gelu(x) {
  const z = tf.mul(tf.abs(x), Math.SQRT1_2), t = tf.reciprocal(tf.add(tf.mul(z, 0.3275911), 1));
  let poly = tf.mul(t, 1.061405429);
  for (const c of [-1.453152027, 1.421413741, -0.284496736, 0.254829592]) poly = tf.mul(tf.add(poly, c), t);
  const tail = tf.mul(poly, tf.exp(tf.neg(tf.square(z)))); // 1 - erf(|x|/sqrt 2)
  return tf.mul(tf.mul(x, 0.5), tf.add(tf.mul(tf.sub(1, tail), tf.sign(x)), 1));
}

function linear(w, name, x) {
  const y = tf.matMul(x, w.matrix(`${name}.weight`));
  return w.has(`${name}.bias`) ? tf.add(y, w.vector(`${name}.bias`)) : y;
}
// The same for the last axis of (B, L, C).
function linearRows(w, name, x) {
  const [B, L, C] = x.shape, y = linear(w, name, tf.reshape(x, [B * L, C]));
  return tf.reshape(y, [B, L, y.shape[1]]);
}
function conv(w, name, x, stride = 1) {
  const filter = w.filter(`${name}.weight`), bias = w.has(`${name}.bias`) ? w.vector(`${name}.bias`) : undefined;
  return tf.fused.conv2d({ x, filter, strides: stride, pad: filter.shape[0] >> 1, bias, activation: "linear" });
}

// Mean and variance of a group by the means of its channels: a product with a matrix of blocks.
function groupNorm(w, name, x, groups = 8, eps = 1e-5) {
  const [, H, W, C] = x.shape, size = C / groups;
  const blocks = w.keep(`blocks ${C}/${groups}`, () => {
    const block = new Float32Array(C * C);
    for (let i = 0; i < C * C; i += 1) if (Math.floor(i / C / size) === Math.floor((i % C) / size)) block[i] = 1 / size;
    return tf.tensor2d(block, [C, C]);
  });
  const average = (v) => tf.matMul(tf.reshape(tf.avgPool(v, [H, W], 1, "valid"), [-1, C]), blocks);
  const row = (v) => tf.reshape(v, [-1, 1, 1, C]);
  const mean = average(x), centred = tf.sub(x, row(mean)), variance = average(tf.square(centred));
  const gain = tf.mul(tf.rsqrt(tf.add(variance, eps)), w.vector(`${name}.weight`));
  return tf.add(tf.mul(centred, row(gain)), w.vector(`${name}.bias`));
}
function layerNorm(w, name, x, eps = 1e-5) {
  const centred = tf.sub(x, tf.mean(x, -1, true)), scale = tf.rsqrt(tf.add(tf.mean(tf.square(centred), -1, true), eps));
  return tf.add(tf.mul(tf.mul(centred, scale), w.vector(`${name}.weight`)), w.vector(`${name}.bias`));
}
// softmax(q k^T / sqrt d) v with heads; q (B, L, C), k and v (B, M, C)
function attend(q, k, v, heads) {
  const split = (x) => tf.transpose(tf.reshape(x, [x.shape[0], x.shape[1], heads, x.shape[2] / heads]), [0, 2, 1, 3]);
  const weights = tf.softmax(tf.mul(tf.matMul(split(q), split(k), false, true), (q.shape[2] / heads) ** -0.5));
  return tf.reshape(tf.transpose(tf.matMul(weights, split(v)), [0, 2, 1, 3]), q.shape);
}
