// Body of (values, data, memo) => result for tilt_explorer: the frame of the nearest lambda.
const distance = (lam) => Math.abs(Math.log(lam / values.lam));
let at = 0;
data.lams.forEach((lam, i) => { if (distance(lam) < distance(data.lams[at])) at = i; });
const now = data.frames[at];
const line = (label, x, y, role, shape = "line") => ({ label, x, y, role, shape });
const rings = now.rings.map(([x, y], k) => line(k === 0 ? "exact: 2 sd of each mode" : "", x, y, "star"));
return {
  line: [
    line("guided", data.middles, now.guided, "gamma", "area"),
    line("p_{0}", data.grid, data.base, "base"),
    line("exact tilt", data.grid, now.exact, "star"),
    line("particles", data.middles, now.particles, "reward"),
  ],
  cloud: [...rings, line("guided", ...now.cloud, "gamma", "points")],
  swarm: [...rings, line("particles", ...now.swarm, "reward", "points")],
  readout: data.names.map((name, i) => [name, now.readout[i], ".3g"]),
  message: data.says[now.key],
  warn: now.key === "biased",
};
