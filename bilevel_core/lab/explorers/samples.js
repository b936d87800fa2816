// Body of (values, data, memo) => result for samples_explorer: the images and numbers kept at this lambda.
const now = data.prompts[values.prompt], i = Math.round(values.at), n = data.lams.length;
const line = (label, x, y, role, shape = "line") => ({ label, x, y, role, shape });
const whole = (row) => row.replace(/~(.)/g, (_, length) => "0".repeat(length.charCodeAt(0) - 48));
const unpack = (rows) => rows.map((row) => [...whole(row)].map((c) => (2 * (c.charCodeAt(0) - 48)) / (data.greys - 1) - 1));
const band = (sign) => data.lams.map((_, k) => now.up[k] + sign * 1.96 * now.se[k]);
const curve = [
  line("± 1.96 standard errors", data.lams, band(1), "zero"),
  line("± 1.96 standard errors", data.lams, band(-1), "zero"),
  line(data.labels.up, data.lams, now.up.slice(0, n), "star"),
];
if (i < n) curve.unshift(line("", [data.lams[i]], [], "marker", "vline"));
if (now.up.length > n) curve.unshift(line("pre-trained", [], [now.up[n]], "base", "hline"));
return {
  samples: now.images[i].map((rows, k) => ({ label: String(k + 1), pixels: unpack(rows) })),
  curve,
  readout: [
    ["λ", data.names[i], ".3g"],
    [data.labels.up, now.up[i], ".2f"],
    [data.labels.low, now.low[i], ".2f"],
    ["KL from p_{0}", now.kl[i], ".2f"],
    ["measured by", now.how[i], ".3g"],
    ["best of these", data.names[now.up.indexOf(Math.max(...now.up))], ".3g"],
  ],
  message: "",
  warn: false,
};
