// Body of (values, data, memo) => result for gamma_explorer: the embedded numbers at the nearest end and gamma.
const nearest = (list, distance) => {
  let at = 0;
  list.forEach((v, i) => { if (distance(v) < distance(list[at])) at = i; });
  return at;
};
const i = nearest(data.ends, (v) => Math.abs(v - values.end));
const j = nearest(data.gammas, (v) => Math.abs(Math.log(v / values.gamma)));
const k = data.names.indexOf(values.which);
const [fStar, ...hyper] = data.limits[i], [f, , ...grad] = data.table[i][j];
const share = 1 - f / fStar, off = Math.abs(grad[k] - hyper[k]);
let key = off > 0.1 * Math.abs(hyper[k]) ? "weak" : "fine";
if (grad[k] * hyper[k] < 0) key = "turned";
const line = (label, x, y, role, shape = "line") => ({ label, x, y, role, shape });
const law = (std) => data.x.map((v) => Math.exp(-(v * v) / (2 * std * std)) / (std * Math.sqrt(2 * Math.PI)));
const ends = [data.gammas[0], data.gammas[data.gammas.length - 1]];
return {
  grad: [
    line("", [], [0], "zero", "hline"),
    line("", [data.gammas[j]], [], "marker", "vline"),
    line("hypergradient", ends, [hyper[k], hyper[k]], "star"),
    line("penalty gradient", data.gammas, data.table[i].map((row) => row[2 + k]), "gamma"),
  ],
  value: [
    line("", [data.ends[i]], [], "marker", "vline"),
    line("f(q, θ_{∗}(q))", data.ends, data.limits.map((row) => row[0]), "star"),
    line("L_{γ}(q)", data.ends, data.table.map((rows) => rows[j][1]), "gamma"),
  ],
  laws: [
    line("data", data.x, law(data.s), "base", "area"),
    line("θ_{∗}", data.x, law(data.s - Math.sqrt(fStar)), "star"),
    line("θ_{γ}", data.x, law(data.s - Math.sqrt(f)), "gamma"),
  ],
  readout: [
    ["f at θ_{∗}", fStar, ".3g"],
    ["f at θ_{γ}", f, ".3g"],
    [`penalty gradient in ${values.which}`, grad[k], ".3g"],
    [`hypergradient in ${values.which}`, hyper[k], ".3g"],
  ],
  message: data.says[key].replace("SHARE", `${(100 * share).toFixed(0)} %`),
  warn: key !== "fine",
};
