// Body of (values, data, memo) => result for the figure of the first page: where Algorithm 2 is, and what is drawn there.
const now = data.stories[values.story], path = now.path, passed = Math.floor(values.step + 1e-9);
const place = (places, lam) => {
  lam = Math.min(Math.max(lam, places[0]), places[places.length - 1]);
  const i = Math.max(0, Math.min(places.length - 2, places.filter((at) => at <= lam).length - 1));
  return [i, Math.log(lam / places[i]) / Math.log(places[i + 1] / places[i])];
};
const worth = (lam) => {
  const [i, part] = place(data.lams, lam);
  return now.curve[i] + part * (now.curve[i + 1] - now.curve[i]);
};
memo[now.prompt] ??= Uint8Array.from(atob(data.images[now.prompt]), (c) => c.charCodeAt(0));
const bytes = memo[now.prompt], size = data.side * data.side;
const level = (i) => (i % 2 ? bytes[i >> 1] & 15 : bytes[i >> 1] >> 4);

const k = Math.min(passed, path.length - 2);
const lam = path[k] * (path[k + 1] / path[k]) ** (values.step - k);
const [i, along] = place(data.places, lam);
const part = Math.min(Math.max((along - 0.4) / 0.2, 0), 1); // the nearest recorded images; they dissolve halfway
const images = Array.from({ length: data.shown }, (_, n) => ({
  label: "",
  pixels: Array.from({ length: data.side }, (_, row) =>
    Array.from({ length: data.side }, (_, column) => {
      const at = row * data.side + column;
      const pixel = (j) => level((j * data.shown + n) * size + at);
      return ((pixel(i) * (1 - part) + pixel(i + 1) * part) * 2) / 15 - 1;
    }),
  ),
}));
const seen = path.slice(0, passed + 1), best = now.curve.indexOf(Math.max(...now.curve));
const line = (label, x, y, role, shape = "line") => ({ label, x, y, role, shape });
return {
  images,
  curve: [
    line("best", [data.lams[best]], [], "marker", "vline"),
    line("not certified", data.lams.slice(0, now.sure + 1), now.curve.slice(0, now.sure + 1), "zero"),
    line("exact CLIP score", data.lams.slice(now.sure), now.curve.slice(now.sure), "star"),
    line("steps of Algorithm 2", seen, seen.map(worth), "base", "points"),
    line("now", [lam], [worth(lam)], "gamma", "points"),
  ],
  readout: [
    ["step", `${passed} of ${path.length - 1}`],
    ["λ", lam, ".3g"],
    ["CLIP score", worth(lam), ".1f"],
  ],
  message: now.message,
  warn: false,
};
