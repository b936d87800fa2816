// What a live figure asks of its worker: {id, ask, ...} is answered by {id, ...} or {id, error}. Follows TensorFlow.js,
// layers.js, networks.js, cosine.js and sampler.js in one script.
let tensors = null, tilt = null, digit = null, small = null;

// SHA-256 of bytes as hexadecimal: crypto.subtle is missing on pages without https
function sha256(bytes) {
  const power = (x, k) => Math.floor((x ** (1 / k) % 1) * 2 ** 32), primes = [];
  for (let n = 2; primes.length < 64; n += 1) if (primes.every((p) => n % p)) primes.push(n);
  const K = Uint32Array.from(primes, (p) => power(p, 3)), H = Uint32Array.from(primes.slice(0, 8), (p) => power(p, 2));
  const length = bytes.length, padded = new Uint8Array(((length + 72) >> 6) << 6), w = new Uint32Array(64);
  padded.set(bytes);
  padded[length] = 0x80;
  const view = new DataView(padded.buffer);
  view.setUint32(padded.length - 8, Math.floor(length / 2 ** 29));
  view.setUint32(padded.length - 4, length << 3);
  for (let at = 0; at < padded.length; at += 64) {
    for (let i = 0; i < 16; i += 1) w[i] = view.getUint32(at + 4 * i);
    for (let i = 16; i < 64; i += 1) {
      const x = w[i - 15], y = w[i - 2];
      const s0 = ((x >>> 7) | (x << 25)) ^ ((x >>> 18) | (x << 14)) ^ (x >>> 3);
      const s1 = ((y >>> 17) | (y << 15)) ^ ((y >>> 19) | (y << 13)) ^ (y >>> 10);
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    let [a, b, c, d, e, f, g, h] = H;
    for (let i = 0; i < 64; i += 1) {
      const s1 = ((e >>> 6) | (e << 26)) ^ ((e >>> 11) | (e << 21)) ^ ((e >>> 25) | (e << 7));
      const t1 = (h + s1 + ((e & f) ^ (~e & g)) + K[i] + w[i]) | 0;
      const s0 = ((a >>> 2) | (a << 30)) ^ ((a >>> 13) | (a << 19)) ^ ((a >>> 22) | (a << 10));
      const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + t2) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((v, i) => (H[i] += v));
  }
  return Array.from(H, (v) => v.toString(16).padStart(8, "0")).join("");
}

// From rows of pixels to (B, side/f, side/f, f^2) as pixel_unshuffle does, and back.
function fold(pixels, side, f) {
  const out = new Float32Array(pixels.length), n = side / f, size = side * side;
  for (let k = 0; k < pixels.length; k += 1) {
    const b = Math.floor(k / size), i = Math.floor((k % size) / side), j = k % side;
    out[b * size + (Math.floor(i / f) * n + Math.floor(j / f)) * f * f + (i % f) * f + (j % f)] = pixels[k];
  }
  return out;
}
function unfold(folded, side, f) {
  const out = new Float32Array(folded.length), n = side / f, size = side * side;
  for (let k = 0; k < out.length; k += 1) {
    const b = Math.floor(k / size), i = Math.floor((k % size) / side), j = k % side;
    out[k] = folded[b * size + (Math.floor(i / f) * n + Math.floor(j / f)) * f * f + (i % f) * f + (j % f)];
  }
  return out;
}

// G: noise z (C, steps, 28 x 28) -> pictures and their rewards, for one prompt; the chain of lab/models/chains.py
class Digit {
  constructor({ name, prompt, empty, scale, steps, eta, T, q, maxBeta, pull }) {
    Object.assign(this, { text: tensors[`text.${name}`].data, eta, pull, ts: timesteps(T, steps) });
    const abar = cosine(q, T, maxBeta);
    this.levels = [...this.ts, 0].map((t) => abar[t]);
    this.denoiser = new PromptedDenoiser(tensors, prompt, empty, scale);
    this.encoder = new PictureEncoder(tensors);
    this.d = steps * 784;
  }
  async look(z) {
    const C = z.length / this.d, steps = this.ts.length, noise = [];
    for (let i = 0; i < steps; i += 1) {
      const rows = new Float32Array(C * 784);
      for (let j = 0; j < C; j += 1) rows.set(z.subarray(j * this.d + i * 784, j * this.d + (i + 1) * 784), j * 784);
      noise.push(tf.tensor(fold(rows, 28, 2), [C, 14, 14, 4]));
    }
    const x = sampleDDIM((v, i) => this.denoiser.eps(v, this.ts[i]), noise[0], this.levels, this.eta, noise.slice(1));
    const pixels = unfold(await x.data(), 28, 2).map((v) => Math.min(1, Math.max(-1, v)));
    tf.dispose([x, noise]);
    const cosines = tf.tidy(() => {
      const vectors = this.encoder.encode(tf.tensor(pixels, [C, 28, 28, 1]));
      return tf.matMul(vectors, tf.tensor2d(this.text, [this.text.length, 1])).dataSync();
    });
    const images = Array.from({ length: C }, (_, j) => pixels.slice(j * 784, (j + 1) * 784));
    const { measure, sign, mean, sd, at } = this.pull;
    const attribute = images.map((image) => (measure === "slant" ? slant : thickness)(image, 28, 28));
    const z_hat = attribute.map((v) => (sign * v - mean) / sd);
    return { r: z_hat.map((v) => at * Math.tanh(v / at)), clip: Array.from(cosines, (v) => Math.max(0, 100 * v)), attribute, z_hat, images };
  }
}

const answers = {
  async load({ wasm, pack, checksum }) {
    const found = sha256(pack);
    if (found !== checksum) throw new Error("the weights are damaged (their checksum is wrong): load the page anew, or build the book again");
    self.fetch = async () => new Response(wasm, { headers: { "Content-Type": "application/wasm" } }); // the one file that the backend asks for
    tf.env().set("WASM_HAS_MULTITHREAD_SUPPORT", false);
    tf.wasm.setWasmPaths("./");
    if (!(await tf.setBackend("wasm"))) throw new Error("WebAssembly did not start in this browser");
    tensors = readSafetensors(pack);
    return {};
  },
  async start({ chain, chains, seed, z }) {
    if (digit) digit.denoiser.dispose();
    digit = new Digit(chain);
    tilt = new Tilt((v) => digit.look(v), chains, digit.d, new Random(seed));
    const began = performance.now(), now = await tilt.start(z);
    return { ...picture(now), ms: performance.now() - began };
  },
  async sweep({ lam, k, warmup, xi, u }) {
    const began = performance.now(), moved = await tilt.sweep(lam, k, warmup, xi, u);
    return { ...moved, ...picture(tilt.now), ms: performance.now() - began };
  },
  // pictures drawn at levels (radians, rising with the noise) from x (n x 64), by DDIM with eta = 0
  async draw({ levels, x = tensors.noise.data, stretch }) {
    const began = performance.now(), n = x.length / 64, down = [...levels].reverse();
    small = small || { denoiser: new LevelDenoiser(tensors, stretch), classifier: new Classifier8(tensors) };
    const abar = [...down.map((v) => Math.cos(v) ** 2), 1], first = tf.tensor(x, [n, 8, 8, 1]);
    const out = sampleDDIM((v, i) => small.denoiser.eps(v, down[i]), first, abar);
    const pixels = (await out.data()).map((v) => Math.min(1, Math.max(-1, v)));
    tf.dispose([first, out]);
    small.denoiser.unet.forget();
    const features = tf.tidy(() => small.classifier.features(tf.tensor(pixels, [n, 8, 8, 1])).dataSync());
    const distance = frechet(features, n, 32, tensors["reference.mean"].data, tensors["reference.root"].data);
    return { pixels, distance, ms: performance.now() - began };
  },
};
const picture = ({ r, clip, attribute, z_hat, images }) => ({ r: [...r], clip: [...clip], attribute: [...attribute], z_hat: [...z_hat], images: [...images] });

let queue = Promise.resolve();
self.onmessage = ({ data: { id, ask, ...rest } }) => {
  queue = queue.then(async () => {
    try {
      self.postMessage({ id, ...(await answers[ask](rest)) });
    } catch (error) {
      self.postMessage({ id, error: String((error && error.message) || error) });
    }
  });
};
