// Body of (values, data, memo) => result for lam_explorer: estimators of bilevel_core on a batch, and its oracle.
const { lam, gamma } = values, n = Number(values.n), count = data.nodes[2];
const rUp = (x) => -((x - 1.2) ** 2) / 2;
const logSumExp = (a) => {
  let top = -Infinity, sum = 0;
  for (const v of a) if (v > top) top = v;
  for (const v of a) sum += Math.exp(v - top);
  return top + Math.log(sum);
};
if (!memo.x) {
  const [low, high] = data.nodes, { weights, means, stds } = data.logP0;
  memo.x = Float64Array.from({ length: count }, (_, i) => low + (i * (high - low)) / (count - 1));
  const density = memo.x.map((x) => logSumExp(weights.map((w, k) => {
    const z = (x - means[k]) / stds[k];
    return Math.log(w) - (z * z) / 2 - Math.log(stds[k] * Math.sqrt(2 * Math.PI));
  })));
  const total = logSumExp(density);
  memo.logP0 = density.map((v) => v - total);
  memo.lams = Array.from({ length: data.axis[2] }, (_, i) => data.axis[0] * (data.axis[1] / data.axis[0]) ** (i / (data.axis[2] - 1)));
  memo.curves = {};
}
// the law of points x with log-weights log_w, tilted by h: weights, log Z, KL
const tilt = (x, logW, h) => {
  const a = Float64Array.from(x, (v, i) => logW(i) + h(v)), logZ = logSumExp(a), p = a.map((v) => Math.exp(v - logZ));
  let kl = 0;
  for (let i = 0; i < p.length; i += 1) if (p[i] > 0) kl += p[i] * (h(x[i]) - logZ);
  return { p, logZ, kl };
};
const mean = (p, x, u) => p.reduce((sum, v, i) => (v > 0 ? sum + v * u(x[i]) : sum), 0);
const both = (x, logW, lambda) => {
  const star = tilt(x, logW, (v) => v / lambda), tilted = tilt(x, logW, (v) => (rUp(v) / gamma + v) / lambda);
  return { star, tilted, grad: gamma * (tilted.kl - star.kl) };
};
const batch = data.batch.slice(0, n);
const estimate = (lambda) => {
  const { star, tilted, grad } = both(batch, () => -Math.log(n), lambda);
  const hStar = (v) => v / lambda, hTilted = (v) => (rUp(v) / gamma + v) / lambda;
  const mStar = mean(star.p, batch, hStar), mTilted = mean(tilted.p, batch, hTilted), up = mean(star.p, batch, rUp);
  let variance = 0, upVariance = 0, squares = 0;
  batch.forEach((v, i) => {
    const influence = gamma * (tilted.p[i] * (hTilted(v) - mTilted - 1) - star.p[i] * (hStar(v) - mStar - 1));
    variance += influence ** 2;
    upVariance += (star.p[i] * (rUp(v) - up)) ** 2;
    squares += star.p[i] ** 2;
  });
  return { p: star.p, grad, se: Math.sqrt(variance), up, upSe: Math.sqrt(upVariance), ess: 1 / squares };
};
const key = `${n} ${gamma}`;
if (!memo.curves[key]) {
  const level = mean(memo.logP0.map(Math.exp), memo.x, rUp), logW = (i) => memo.logP0[i];
  memo.curves[key] = {
    batch: memo.lams.map((lambda) => { const { p, ...rest } = estimate(lambda); return rest; }),
    exact: memo.lams.map((lambda) => {
      const { star, tilted, grad } = both(memo.x, logW, lambda);
      return { grad, up: mean(star.p, memo.x, rUp), est1: gamma * (tilted.logZ - star.logZ) - level / lambda };
    }),
  };
}
const { lams } = memo, curves = memo.curves[key], now = estimate(lam), truth = both(memo.x, (i) => memo.logP0[i], lam);
const centre = mean(now.p, batch, (v) => v), spread = mean(now.p, batch, (v) => (v - centre) ** 2);
const slope = mean(now.p, batch, (v) => (v - centre) * (rUp(v) - now.up)) / spread;
const order = batch.map((_, i) => i).sort((i, j) => batch[i] - batch[j] || i - j);
const dots = [];
let sum = 0, next = 0;
for (let k = 0; k < n && next < data.dots; k += 1) {
  sum += now.p[order[k]];
  while (next < data.dots && (sum >= (next + 0.5) / data.dots || k === n - 1)) {
    dots.push(batch[order[k]]);
    next += 1;
  }
}
const arch = Array.from({ length: 91 }, (_, i) => -3.5 + i * 0.1), ends = [-3.5, 5.5];
let says = "lower";
if (now.ess < data.minEss) says = "few";
else if (Math.abs(now.grad) <= 1.96 * now.se) says = "stop";
else if (now.grad < 0) says = "raise";
const line = (label, x, y, role) => ({ label, x, y, role, shape: "line" });
const marker = { label: "", x: [lam], y: [], role: "marker", shape: "vline" };
return {
  rewards: [
    line("r_{up} over r_{low}", arch, arch.map(rUp), "reward"),
    { label: "samples, by weight", x: dots, y: dots.map(rUp), role: "star", shape: "points" },
    line("their regression", ends, ends.map((v) => now.up + slope * (v - centre)), "gamma"),
  ],
  curve: [
    marker,
    line("exact", lams, curves.exact.map((c) => c.up), "base"),
    line("batch ± 1.96 standard errors", lams, curves.batch.map((c) => c.up + 1.96 * c.upSe), "zero"),
    line("batch ± 1.96 standard errors", lams, curves.batch.map((c) => c.up - 1.96 * c.upSe), "zero"),
    line("batch", lams, curves.batch.map((c) => c.up), "star"),
  ],
  grad: [
    { label: "", x: [], y: [0], role: "zero", shape: "hline" },
    marker,
    line("(A), exact", lams, curves.exact.map((c) => c.grad), "base"),
    line("(A), batch", lams, curves.batch.map((c) => c.grad), "star"),
    line("est1, exact", lams, curves.exact.map((c) => c.est1), "gamma"),
  ],
  readout: [
    ["(A), batch", now.grad, ".3f"], ["its standard error", now.se, ".2g"], ["(A), exact", truth.grad, ".3f"],
    ["E r_{up}, batch", now.up, ".3f"], ["E r_{up}, exact", mean(truth.star.p, memo.x, rUp), ".3f"],
    ["effective samples", now.ess, ".3g"],
  ],
  message: data.says[says],
  warn: says === "few",
};
