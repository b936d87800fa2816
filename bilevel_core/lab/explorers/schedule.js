// Body of (values, data, memo) => result for schedule_explorer: bilevel_core/schedules.py once more, for the page.
const T = data.T;
const names = ["start", "end", "tau", "epsilon"];
// as Python's f"{v:.{n}g}"
const g = (v, n = 6) => {
  if (v === 0) return "0";
  const [mantissa, exponent] = v.toExponential(n - 1).split("e"), p = Number(exponent);
  const bare = (s) => (s.includes(".") ? s.replace(/\.?0+$/, "") : s);
  if (p >= -4 && p < n) return bare(v.toFixed(Math.max(0, n - 1 - p)));
  return bare(mantissa) + "e" + (p < 0 ? "-" : "+") + String(Math.abs(p)).padStart(2, "0");
};
// log F(t/T), t = 0..T
const logCurve = ([start, end, tau, epsilon], kind) => Array.from({ length: T + 1 }, (_, t) => {
  const w = start + (t / T) * (end - start), v = (w + epsilon) / (1 + epsilon);
  if (kind === "cosine") return 2 * tau * Math.log(Math.sin(Math.min(1, Math.max(1e-300, 1 - v)) * (Math.PI / 2)));
  if (kind === "sigmoid") {
    const z = (1 - w) / tau + epsilon;
    return Math.min(z, 0) - Math.log1p(Math.exp(-Math.abs(z)));
  }
  return -tau * (0.1 * v + 9.95 * v * v);
});
const betas = (q, kind, form) => {
  let f = logCurve(q, kind);
  if (form === "normalised") {
    const last = f[T];
    f = f.slice(0, T).map((a) => a + Math.log(Math.max(1e-300, -Math.expm1(last - a))));
  }
  const clip = (b) => Math.min(data.maxBeta, Math.max(0, b));
  return Array.from({ length: T }, (_, t) => (t + 1 < f.length ? clip(-Math.expm1(f[t + 1] - f[t])) : data.maxBeta));
};
const abarOf = (beta) => {
  const out = [1];
  let sum = 0;
  for (const b of beta) out.push(Math.exp((sum += Math.log1p(-b))));
  return out;
};
const last = (q, kind, form) => abarOf(betas(q, kind, form))[T];
const check = (q, kind, form) => {
  for (let i = 0; i < 4; i += 1) {
    const [low, high] = data.bounds[kind][i];
    if (!(q[i] >= low && q[i] <= high)) {
      return `${names[i]} = ${g(q[i])} is outside [${g(low)}, ${g(high)}] for the ${kind} schedule`;
    }
  }
  if (q[1] - q[0] < data.gap - 1e-9) return `end - start = ${g(q[1] - q[0])} is below ${data.gap}: raise end or lower start`;
  const a = last(q, kind, form);
  if (a < data.minAbar * (1 - 1e-9)) {
    return `abar_T = ${g(a, 2)} is below ${g(data.minAbar)} at T = ${T}: lower end or tau, or call project()`;
  }
  return "";
};
const project = (given, kind, form) => {
  const bounds = data.bounds[kind];
  const q = given.map((v, i) => Math.min(bounds[i][1], Math.max(bounds[i][0], v)));
  q[0] = Math.min(q[0], bounds[1][1] - data.gap);
  q[1] = Math.max(q[1], q[0] + data.gap);
  const dark = (end) => last([q[0], end, q[2], q[3]], kind, form) < data.minAbar;
  let low = q[0] + data.gap, high = q[1];
  if (dark(high)) {
    if (dark(low)) return null;
    for (let i = 0; i < 60; i += 1) {
      const middle = (low + high) / 2;
      if (dark(middle)) high = middle;
      else low = middle;
    }
    q[1] = low;
  }
  return q;
};

const { kind, form } = values;
let q = names.map((name) => values[name]), message = "", warn = true;
const reason = check(q, kind, form);
if (reason) {
  q = project(q, kind, form);
  message = `Not admissible: ${reason}.`;
  if (!q) return { readout: [], message, warn };
  message += ` Drawn instead is its projection, start = ${g(q[0], 4)}, end = ${g(q[1], 4)}.`;
}
const beta = betas(q, kind, form), abar = abarOf(beta), usual = abarOf(betas(data.defaults[kind], kind, form));
const u = abar.map((_, t) => t / T), snr = (a) => a.slice(1).map((v) => Math.log(v) - Math.log1p(-v));
const steps = data.frames.map((v) => Math.round(v * T)), dots = steps.map((t) => t / T);
const at = (list, offset) => steps.filter((t) => t >= offset).map((t) => list[t - offset]);
if (!message && abar[T] > data.terminal) {
  message = data.warning.replace("ABAR", g(abar[T], 3)).replace("ROOT", g(Math.sqrt(abar[T]), 3));
} else if (!message) [message, warn] = [data.fine, false];
const logSnr = snr(abar);
return {
  abar: [
    { label: "default q", x: u, y: usual, role: "base", shape: "line" },
    { label: "this q", x: u, y: abar, role: "star", shape: "line" },
    { label: "digits below", x: dots, y: at(abar, 0), role: "star", shape: "points" },
  ],
  snr: [
    { label: "default q", x: u.slice(1), y: snr(usual), role: "base", shape: "line" },
    { label: "this q", x: u.slice(1), y: logSnr, role: "star", shape: "line" },
    { label: "digits below", x: dots.slice(1), y: at(logSnr, 1), role: "star", shape: "points" },
  ],
  digits: steps.map((t) => ({
    label: `u = ${g(t / T)}`,
    pixels: data.digit.map((row, i) => row.map((x, j) => Math.sqrt(abar[t]) * x + Math.sqrt(1 - abar[t]) * data.noise[i][j])),
  })),
  readout: [["ᾱ_{T}", abar[T], ".3g"], ["√ᾱ_{T}", Math.sqrt(abar[T]), ".3g"], ["largest β_{t}", Math.max(...beta), ".3g"]],
  message,
  warn,
};
