// Body of (values, data, memo, format) => result for penalty_explorer: the Tilt of bilevel_core/oracles.py, for the page.
const [low, high, n] = data.nodes, h = (high - low) / (n - 1), { gamma, lam } = values;
const logSumExp = (a) => {
  let top = -Infinity, sum = 0;
  for (const v of a) if (v > top) top = v;
  for (const v of a) sum += Math.exp(v - top);
  return top + Math.log(sum);
};
if (!memo.x) {
  memo.x = Float64Array.from({ length: n }, (_, i) => low + i * h);
  const density = memo.x.map((x) => logSumExp(data.weights.map((w, k) => {
    const z = (x - data.means[k]) / data.stds[k];
    return Math.log(w) - (z * z) / 2 - Math.log(data.stds[k] * Math.sqrt(2 * Math.PI));
  })));
  const total = logSumExp(density);
  memo.logP0 = density.map((v) => v - total);
  memo.up = memo.x.map((x) => -((x - 1.2) ** 2) / 2);
  memo.low = memo.x;
  memo.lams = Array.from({ length: data.lams[2] }, (_, i) => data.lams[0] * (data.lams[1] / data.lams[0]) ** (i / (data.lams[2] - 1)));
}
const { x, logP0, up, low: rLow } = memo, a = new Float64Array(n);
// the law p_0 exp((r_up/gamma + r_low)/lam): log Z, KL to p_0 and, if asked, the moments that (C) and the plots need
const law = (strength, lambda, moments) => {
  let top = -Infinity;
  for (let i = 0; i < n; i += 1) {
    a[i] = logP0[i] + (strength * up[i] + rLow[i]) / lambda;
    if (a[i] > top) top = a[i];
  }
  let sum = 0, gain = 0, eUp = 0, eLow = 0;
  for (let i = 0; i < n; i += 1) {
    if (a[i] < top - 50) continue;
    const p = Math.exp(a[i] - top);
    sum += p;
    gain += p * (a[i] - logP0[i]);
    eUp += p * up[i];
    eLow += p * rLow[i];
  }
  const logZ = top + Math.log(sum), out = { logZ, kl: gain / sum - logZ, up: eUp / sum, low: eLow / sum };
  if (moments) {
    let cov = 0, second = 0;
    for (let i = 0; i < n; i += 1) {
      const p = Math.exp(a[i] - top) / sum;
      cov += p * (rLow[i] - out.low) * up[i];
      second += p * (x[i] - out.low) ** 2;
    }
    out.hyper = cov / lambda ** 2;
    out.reach = out.low + 4 * Math.sqrt(second);
    out.density = Array.from(a, (v) => Math.exp(v - logZ) / h);
  }
  return out;
};
const penalty = (lambda, star, tilted) => -gamma * lambda * (tilted.logZ - star.logZ);
const slope = (star, tilted) => gamma * (tilted.kl - star.kl);
if (!memo.stars) memo.stars = memo.lams.map((lambda) => law(0, lambda, true)).map(({ density, ...rest }) => rest);
if (memo.gamma !== gamma) {
  memo.gamma = gamma;
  memo.curve = memo.lams.map((lambda, i) => {
    const tilted = law(1 / gamma, lambda);
    return [penalty(lambda, memo.stars[i], tilted), slope(memo.stars[i], tilted)];
  });
  // the root of the slope, by false position with halving (Illinois), from the bracket that the curve gives
  const at = Math.max(1, memo.curve.findIndex((c) => c[1] >= 0));
  let [a0, a1] = [memo.lams[at - 1], memo.lams[at]], [f0, f1] = [memo.curve[at - 1][1], memo.curve[at][1]], side = 0;
  for (let i = 0; i < 60 && a1 - a0 > 1e-11; i += 1) {
    const middle = (a0 * f1 - a1 * f0) / (f1 - f0), f = slope(law(0, middle), law(1 / gamma, middle));
    memo.best = middle;
    if (Math.abs(f) < 1e-11 * gamma) break;
    if (f < 0) {
      [a0, f0] = [middle, f];
      if (side < 0) f1 /= 2;
      side = -1;
    } else {
      [a1, f1] = [middle, f];
      if (side > 0) f0 /= 2;
      side = 1;
    }
  }
  memo.bestValue = penalty(memo.best, law(0, memo.best), law(1 / gamma, memo.best));
}
const star = law(0, lam, true), tilted = law(1 / gamma, lam, true);
const value = penalty(lam, star, tilted), grad = slope(star, tilted);
const to = Math.max(5, Math.ceil(Math.max(star.reach, tilted.reach)));
const first = Math.round((-5 - low) / h), count = Math.round((to + 5) / h) + 1;
const view = Array.from(x).slice(first, first + count), part = (list) => list.slice(first, first + count);
const ratio = grad / star.hyper;
let message = ratio < 0 ? data.wrong : data.close;
if (ratio >= 0 && !(ratio >= 1 / data.sameSize && ratio <= data.sameSize)) {
  message = data.wrongSize.replace("RATIO", format(ratio, ".2g"));
}
return {
  laws: [
    { label: "0.4 exp(r_{up})", x: view, y: view.map((v) => 0.4 * Math.exp(-((v - 1.2) ** 2) / 2)), role: "reward", shape: "area" },
    { label: "p_{0}", x: view, y: part(Array.from(logP0, (v) => Math.exp(v) / h)), role: "base", shape: "line" },
    { label: "p_{∗}", x: view, y: part(star.density), role: "star", shape: "line" },
    { label: "p_{γ}", x: view, y: part(tilted.density), role: "gamma", shape: "line" },
  ],
  value: [
    { label: "", x: [lam], y: [], role: "marker", shape: "vline" },
    { label: "its limit, γ → ∞", x: memo.lams, y: memo.stars.map((s) => -s.up), role: "star", shape: "line" },
    { label: "L_{γ}", x: memo.lams, y: memo.curve.map((c) => c[0]), role: "gamma", shape: "line" },
    { label: "its minimum", x: [memo.best], y: [memo.bestValue], role: "gamma", shape: "points" },
  ],
  grad: [
    { label: "", x: [], y: [0], role: "zero", shape: "hline" },
    { label: "", x: [lam], y: [], role: "marker", shape: "vline" },
    { label: "hypergradient (C)", x: memo.lams, y: memo.stars.map((s) => s.hyper), role: "star", shape: "line" },
    { label: "dL_{γ}/dλ (A)", x: memo.lams, y: memo.curve.map((c) => c[1]), role: "gamma", shape: "line" },
  ],
  readout: [
    ["L_{γ}(λ)", value], ["dL_{γ}/dλ (A)", grad], ["hypergradient (C)", star.hyper],
    ["KL(p_{∗} ‖ p_{0})", star.kl], ["KL(p_{γ} ‖ p_{0})", tilted.kl],
    ["argmin L_{γ}", memo.best], ["λ^{∗}", data.lamStar],
  ],
  message,
  warn: message !== data.close,
};
