// Body of (values, data, memo, format) => result for grid_explorer, after cosine.js: what grid_run.js has drawn so far.
const live = memo.live || { phase: "idle", said: "" }, run = memo.run || { points: [] }, { seen, start } = data;
const same = Object.keys(start).every((name) => values[name] === start[name]);
const abar = cosine([values.start, values.end, values.tau, data.epsilon], data.T, data.maxBeta);
const angle = (a) => Math.atan2(Math.sqrt(Math.max(0, 1 - a)), Math.sqrt(a));
const own = timesteps(data.T, values.N).reverse().map((t) => Math.min(seen[1], Math.max(seen[0], angle(abar[t]))));
// levels in radians, rising: those that were dragged or learned, else the sliders'
const levels = memo.levels || own.filter((v, i) => i === 0 || v > own[i - 1]);
memo.now = levels;
const mosaic = (at) => {
  const side = 8, across = 8, out = Array.from({ length: 71 }, () => Array(71).fill(0));
  for (let k = 0; k < 64 * 64; k += 1) {
    const image = k >> 6, i = (k & 63) >> 3, j = k & 7;
    out[(image >> 3) * (side + 1) + i][(image % across) * (side + 1) + j] = at(k);
  }
  return out;
};
if (!memo.first) {
  const raw = atob(data.first);
  memo.first = mosaic((k) => raw.charCodeAt(k) / 127.5 - 1);
}
let drawn = same && !memo.levels ? [{ label: "", pixels: memo.first }] : [];
if (run.found) drawn = [{ label: run.found.name, pixels: (run.found.mosaic = run.found.mosaic || mosaic((k) => run.found.pixels[k])) }];
const frechet = Object.entries(data.marks).map(([label, [x, y]], i) => ({ label, x, y, role: ["star", "base"][i], shape: "line" }));
frechet.push({ label: "64 real images", x: [], y: [data.floor], role: "zero", shape: "hline" });
if (run.points.length) {
  const before = run.points.slice(0, -1), last = run.points[run.points.length - 1];
  if (before.length) frechet.push({ label: "your 64, before", x: before.map((p) => p.N), y: before.map((p) => p.distance), role: "reward", shape: "points" });
  frechet.push({ label: "your 64", x: [last.N], y: [last.distance], role: "gamma", shape: "points" });
}
const readout = [["steps", String(levels.length)], ["largest level / (π/2)", levels[levels.length - 1] / (Math.PI / 2), ".4f"]];
let message = data.idle, warn = false;
if (run.found) {
  readout.push(["Fréchet distance, 64", run.found.distance, ".2f"]);
  const mark = Object.entries(data.marks).map(([name, [x, y]]) => [name, y[x.indexOf(run.found.N)]]).filter(([, v]) => v !== undefined);
  for (const [name, v] of mark) readout.push([name, v, ".2f"]);
  readout.push(["seconds", run.found.ms / 1000, ".2g"]);
  message = run.busy ? "Drawing." : `Drawn: ${run.found.name}. Drag a level, or release a slider, to draw again.`;
}
if (live.phase === "loading" || live.phase === "failed") [message, warn] = [live.said, live.phase === "failed"];
return { drawn, frechet, readout, message, warn };
