// Body of (figure) for pull_explorer: Play, one sweep, and the means of each strength, chain by chain.
const { el, memo, values, data, request, reset, root } = figure;
const play = el("button", { type: "button", class: "blx-play" }, "Play"), once = el("button", { type: "button", class: "blx-once" }, "One sweep");
const state = { chains: data.chains, playing: false, hidden: false, busy: false };
let ask = null;

// Chains begin anew, at p_0, for a prompt; fewer where a sweep takes too long.
async function begin() {
  const prompt = values.prompt, chain = { name: prompt, ...data.prompts[prompt].chain };
  const found = await ask({ ask: "start", chain, chains: state.chains, seed: data.seed });
  if (found.ms > data.patience && state.chains > 2) {
    state.chains /= 2;
    return begin();
  }
  memo.run = Object.assign(state, { prompt, start: found, now: found, ms: found.ms, points: [], point: null });
  request();
}

function summary(sums, n) {
  const means = sums.map((v) => v / n), mean = means.reduce((a, b) => a + b) / means.length;
  const square = means.reduce((a, b) => a + (b - mean) ** 2, 0) / (means.length - 1);
  return { mean, se: Math.sqrt(square / means.length) };
}

async function sweep() {
  if (state.prompt !== values.prompt) await begin();
  const lam = values.lam, run = state;
  if (!run.point || run.point.lam !== lam) {
    run.point = { lam, k: 0, n: 0, taken: 0, sums: { clip: Array(run.chains).fill(0), z_hat: Array(run.chains).fill(0) } };
    run.points = [...run.points.filter((other) => other.lam !== lam), run.point];
  }
  const point = run.point, found = await ask({ ask: "sweep", lam, k: point.k, warmup: data.warmup });
  point.k += 1;
  point.climb = found.climb;
  point.taken += found.taken.filter(Boolean).length;
  if (point.k > data.warmup) {
    point.n += 1;
    for (const [name, sums] of Object.entries(point.sums)) {
      found[name].forEach((value, j) => (sums[j] += value));
      point[name] = summary(sums, point.n);
    }
  }
  Object.assign(run, { now: found, ms: found.ms });
  request();
}

// One piece of work at a time; an error ends the figure. A prompt that has changed meanwhile, or a reset, begins anew.
async function alone(work) {
  if (state.busy || !ask) return;
  state.busy = true;
  try {
    await work();
  } catch (error) {
    Object.assign(memo.live, { phase: "failed", said: `It stopped: ${error.message}. Load the page anew.` });
    [ask, state.playing] = [null, false];
  }
  state.busy = false;
  label();
  if (state.prompt !== values.prompt) alone(begin);
}
// One sweep after the other while playing, in sight; what moves meanwhile counts from the next one on.
const go = (single = false) => alone(async () => {
  do await sweep();
  while (!single && state.playing && !document.hidden);
});
function label() {
  play.textContent = state.playing ? "Pause" : "Play";
  state.hidden = state.playing && document.hidden;
  request();
}
play.addEventListener("click", () => {
  state.playing = !state.playing;
  label();
  if (state.playing) go();
});
once.addEventListener("click", () => go(true));
document.addEventListener("visibilitychange", () => {
  label();
  if (state.playing && !document.hidden) go();
});
reset.addEventListener("click", () => {
  [state.playing, state.prompt] = [false, null];
  label();
  alone(begin);
});
root.addEventListener("change", (event) => {
  if (event.target.tagName === "SELECT" && !state.playing) alone(begin);
});
connect(figure, async (given) => {
  ask = given;
  reset.before(play, once);
  await begin();
});
