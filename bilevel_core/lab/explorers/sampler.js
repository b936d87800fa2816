// Sampling in the paper's letters: DDIM, the exact tilt by moves in noise. Part of the worker of a live figure.

// Algorithm 4 with the DDIM update: x_s = c_x x_t + c_eps eps_hat + sigma z, from abar at the levels down to 1.
// eps(x, i) of step i; levels: abar_{t_1} < ... < 1 with the final 1; noise: a tensor for each step but the last if eta > 0
function sampleDDIM(eps, x, levels, eta = 0, noise = []) {
  for (let i = 0; i + 1 < levels.length; i += 1) {
    const next = tf.tidy(() => {
      const a_t = levels[i], a_s = levels[i + 1], final = a_s === 1;
      const sigma = eta && !final ? eta * Math.sqrt(((1 - a_s) / (1 - a_t)) * (1 - a_t / a_s)) : 0;
      const c_x = Math.sqrt(a_s / a_t), c_eps = (final ? 0 : Math.sqrt(Math.max(0, 1 - a_s - sigma ** 2))) - c_x * Math.sqrt(1 - a_t);
      const hat = eps(x, i);
      const mean = tf.add(tf.mul(x, c_x), tf.mul(hat, c_eps));
      return sigma ? tf.add(mean, tf.mul(noise[i], sigma)) : mean;
    });
    if (i) x.dispose();
    x = next;
  }
  return x;
}

// One seed, one stream: xoshiro128** (Blackman and Vigna) seeded by splitmix32; normal by Box and Muller.
class Random {
  constructor(seed) {
    let s = seed >>> 0;
    this.state = Uint32Array.from({ length: 4 }, () => {
      s = (s + 0x9e3779b9) >>> 0;
      let z = Math.imul(s ^ (s >>> 16), 0x21f0aaad);
      z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
      return (z ^ (z >>> 15)) >>> 0;
    });
  }
  next() {
    const s = this.state, m = Math.imul(s[1], 5), out = Math.imul((m << 7) | (m >>> 25), 9) >>> 0, t = s[1] << 9;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = (s[3] << 11) | (s[3] >>> 21);
    return out;
  }
  uniform() {
    return (this.next() + 0.5) / 2 ** 32;
  }
  normal(n) {
    const out = new Float32Array(n);
    for (let i = 0; i < n; i += 2) {
      const r = Math.sqrt(-2 * Math.log(this.uniform())), angle = 2 * Math.PI * this.uniform();
      out[i] = r * Math.cos(angle);
      if (i + 1 < n) out[i + 1] = r * Math.sin(angle);
    }
    return out;
  }
}

// The tilt p_0 exp(r/lam) by moves in noise: `sample_tempered` at one strength, without its ladder.
// look(z) -> Promise of {r (C,), ...} for z (C, d) as one Float32Array
class Tilt {
  constructor(look, chains, d, random) {
    Object.assign(this, { look, chains, d, random, logS: Math.log(0.5), accept: 0.3, kept: [] });
  }
  async start(z = this.random.normal(this.chains * this.d)) {
    this.now = { z, ...(await this.look(z)) };
    return this.now;
  }
  // z' = sqrt(1 - s^2) z + s xi, taken with probability min(1, exp((r' - r)/lam)); s follows the share of accepted moves
  // in the first `warmup` sweeps at a strength, k = 0, 1, ... of it, and stays from then on.
  async sweep(lam, k, warmup, xi = this.random.normal(this.chains * this.d), u = null) {
    const { now, chains, d } = this, s = Math.exp(this.logS), c = Math.sqrt(1 - s ** 2), z = new Float32Array(now.z.length);
    for (let i = 0; i < z.length; i += 1) z[i] = c * now.z[i] + s * xi[i];
    const next = await this.look(z), taken = [];
    for (let j = 0; j < chains; j += 1) {
      const yes = Math.log(u ? u[j] : this.random.uniform()) < (next.r[j] - now.r[j]) / lam;
      taken.push(yes);
      if (!yes) continue;
      now.z.set(z.subarray(j * d, (j + 1) * d), j * d);
      for (const [name, value] of Object.entries(next)) now[name][j] = value[j];
    }
    const share = taken.filter(Boolean).length / chains;
    if (k < warmup) this.logS = Math.min(0, this.logS + (share - this.accept) / Math.sqrt(1 + k));
    if (k === 0) this.kept = [];
    if (k >= warmup) this.kept.push([...now.r]);
    return { taken, share, s, climb: climb(this.kept) };
  }
}
// By how many standard errors, over the chains, the later half of the rows (sweeps x chains) exceeds the earlier one
function climb(rows) {
  const half = rows.length >> 1;
  if (half < 5) return 0;
  const rise = rows[0].map((_, j) => {
    let sum = 0;
    for (let k = 0; k < half; k += 1) sum += rows[rows.length - 1 - k][j] - rows[k][j];
    return sum / half;
  });
  const C = rise.length, mean = rise.reduce((a, b) => a + b) / C;
  const se = Math.sqrt(rise.reduce((sum, v) => sum + (v - mean) ** 2, 0) / (C * (C - 1)));
  return se > 0 ? mean / se : 0;
}

// ---- what is measured -------------------------------------------------------------------------------------------------
// Stroke width of a picture (H x W, in [-1, 1]): twice the ink over the length of its edge (lab/models/captions.py)
function thickness(image, H, W) {
  const ink = (i, j) => (i < 0 || j < 0 || i >= H || j >= W ? 0 : (image[i * W + j] + 1) / 2);
  let total = 0, edge = 0;
  for (let i = 0; i < H; i += 1) for (let j = 0; j < W; j += 1) total += ink(i, j);
  for (let i = 0; i <= H; i += 1) {
    for (let j = 0; j <= W; j += 1) {
      const a = ink(i - 1, j - 1), b = ink(i - 1, j), c = ink(i, j - 1), d = ink(i, j);
      const right = (d - c + (b - a)) / 2, below = (d - b + (c - a)) / 2;
      edge += Math.sqrt(right * right + below * below + 1e-12);
    }
  }
  return (2 * total) / edge;
}
// How far a picture leans to the right, pixels per pixel of height
function slant(image, H, W) {
  let sum = 0, up = 0, across = 0;
  const ink = Float64Array.from(image, (v) => (v + 1) / 2 + 1e-9);
  ink.forEach((v, k) => {
    sum += v;
    up -= v * Math.floor(k / W);
    across += v * (k % W);
  });
  up /= sum;
  across /= sum;
  let both = 0, square = 0;
  ink.forEach((v, k) => {
    const h = -Math.floor(k / W) - up;
    both += v * h * ((k % W) - across);
    square += v * h * h;
  });
  return both / square;
}

// Eigenvalues and vectors of a symmetric matrix (n x n, row by row), by Jacobi's rotations; float64
function eigen(matrix, n) {
  const a = Float64Array.from(matrix), v = new Float64Array(n * n);
  for (let i = 0; i < n; i += 1) v[i * n + i] = 1;
  for (let round = 0; round < 60; round += 1) {
    let off = 0, all = 0;
    for (let i = 0; i < n; i += 1) for (let j = 0; j < n; j += 1) (i === j ? 0 : (off += a[i * n + j] ** 2)), (all += a[i * n + j] ** 2);
    if (off <= 1e-26 * all) break;
    for (let p = 0; p < n; p += 1) {
      for (let q = p + 1; q < n; q += 1) {
        const apq = a[p * n + q];
        if (apq === 0) continue;
        const theta = (a[q * n + q] - a[p * n + p]) / (2 * apq);
        const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.sqrt(theta * theta + 1)), c = 1 / Math.sqrt(t * t + 1), s = t * c;
        for (let k = 0; k < n; k += 1) {
          const x = a[k * n + p], y = a[k * n + q];
          [a[k * n + p], a[k * n + q]] = [c * x - s * y, s * x + c * y];
        }
        for (let k = 0; k < n; k += 1) {
          const x = a[p * n + k], y = a[q * n + k], g = v[k * n + p], h = v[k * n + q];
          [a[p * n + k], a[q * n + k]] = [c * x - s * y, s * x + c * y];
          [v[k * n + p], v[k * n + q]] = [c * g - s * h, s * g + c * h];
        }
      }
    }
  }
  return { values: Array.from({ length: n }, (_, i) => a[i * n + i]), vectors: v };
}

// The Frechet distance of features (m x n) to a Gaussian of a mean and of `root`, its covariance's square root
function frechet(features, m, n, mean, root, ridge = 1e-6) {
  const own = new Float64Array(n), cov = new Float64Array(n * n), product = (x, y) => {
    const out = new Float64Array(n * n);
    for (let i = 0; i < n; i += 1) for (let k = 0; k < n; k += 1) for (let j = 0; j < n; j += 1) out[i * n + j] += x[i * n + k] * y[k * n + j];
    return out;
  };
  for (let i = 0; i < m; i += 1) for (let j = 0; j < n; j += 1) own[j] += features[i * n + j] / m;
  for (let i = 0; i < m; i += 1) {
    for (let j = 0; j < n; j += 1) {
      for (let k = 0; k < n; k += 1) cov[j * n + k] += ((features[i * n + j] - own[j]) * (features[i * n + k] - own[k])) / (m - 1);
    }
  }
  const real = product(root, root), trace = (x) => Array.from({ length: n }, (_, i) => x[i * n + i]).reduce((a, b) => a + b, 0);
  const extra = (ridge * trace(real)) / n;
  for (let i = 0; i < n; i += 1) cov[i * n + i] += extra;
  const overlap = eigen(product(product(root, cov), root), n).values.reduce((sum, v) => sum + Math.sqrt(Math.max(0, v)), 0);
  return own.reduce((sum, v, j) => sum + (v - mean[j]) ** 2, 0) + trace(cov) + trace(real) - 2 * overlap;
}
