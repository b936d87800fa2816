// Body of (values, data, memo, format) => result for pull_explorer: what pull_run.js has found so far, or the recorded state.
const { prompt, lam } = values, told = data.prompts[prompt], curve = data.curves[prompt];
const live = memo.live || { phase: "idle", said: "" }, run = memo.run && memo.run.prompt === prompt ? memo.run : null;
const rows = (pixels, side) => Array.from({ length: side }, (_, i) => Array.from(pixels.slice(i * side, (i + 1) * side)));
let untuned = [], tilted = [];
if (run) {
  untuned = run.start.images.map((image, j) => ({ label: format(run.start.clip[j], ".0f"), pixels: rows(image, 28) }));
  tilted = run.now.images.map((image, j) => ({ label: format(run.now.clip[j], ".0f"), pixels: rows(image, 28) }));
} else if (prompt === data.first) {
  const { side, pixels } = data.untuned, raw = atob(pixels), size = side * side;
  memo.untuned = memo.untuned || Array.from({ length: raw.length / size }, (_, j) => ({
    label: "p_{0}",
    pixels: rows(Array.from({ length: size }, (_, k) => raw.charCodeAt(j * size + k) / 127.5 - 1), side),
  }));
  untuned = memo.untuned;
}
const lines = (name, key) => {
  const out = [{ label: "now", x: [lam], y: [], role: "marker", shape: "vline" }];
  if (curve.lam) out.push({ label: "recorded", x: curve.lam, y: curve[name], role: "star", shape: "line" });
  if (!run) return out;
  for (const point of run.points) {
    if (!point[key]) continue;
    const { mean, se } = point[key], bar = [mean - 1.96 * se, mean + 1.96 * se];
    out.push({ label: "yours ± 1.96 standard errors", x: [point.lam, point.lam], y: bar, role: "gamma", shape: "line" });
    out.push({ label: "yours", x: [point.lam], y: [mean], role: "gamma", shape: "points" });
  }
  return out;
};
let readout = [["λ", lam, ".2g"], ["p_{0} hears", told.heard], ["pulled up", told.up]];
let message = data.idle, warn = false;
if (run) {
  const at = run.point && run.point.lam === lam ? run.point : null;
  const shown = (found, spec) => (found ? `${format(found.mean, spec)} ± ${format(1.96 * found.se, spec)}` : "–");
  readout = [
    ["λ", lam, ".2g"],
    ["sweeps", at ? String(at.k) : "0"],
    ["moves taken", at && at.k ? `${format((100 * at.taken) / (at.k * run.chains), ".0f")} %` : "–"],
    ["E CLIP score", shown(at && at.clip, ".1f")],
    ["E z", shown(at && at.z_hat, ".2f")],
    ["seconds a sweep", run.ms / 1000, ".2g"],
  ];
  message = run.hidden ? "Paused while this tab is hidden." : !run.playing ? "Paused. Play goes on from here." : !at || at.k < data.warmup
    ? `Warming up at this λ: sweep ${at ? at.k : 0} of ${data.warmup}.`
    : "Each sweep proposes a move to every chain; the means gather.";
  if (at && at.climb > data.climb) [message, warn] = ["At this λ the chains still climb: the means are of chains on their way.", true];
  if (run.chains < data.chains) message += ` A sweep of ${data.chains} chains would take too long here: there are ${run.chains}.`;
}
if (live.phase === "loading" || live.phase === "failed") [message, warn] = [live.said, live.phase === "failed"];
return { untuned, tilted, clip: lines("clip", "clip"), pull: lines("pull", "z_hat"), readout, message, warn };
