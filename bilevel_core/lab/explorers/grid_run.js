// Body of (figure) for grid_explorer: the levels on a line, to drag, and a drawing at each release.
const { el, svg, base, memo, values, data, request, put, reset, root, panels } = figure;
const run = (memo.run = { points: [], found: null, busy: false }), half = Math.PI / 2, GAP = 0.004;
const box = el("div", { class: "blx-panel blx-wide" }, el("div", { class: "blx-panel-title" }, "The levels that the sampler visits"));
const canvas = svg("svg", { role: "group", "aria-label": "Noise levels, as shares of pi/2: drag, or use the arrow keys", width: "100%", height: 58 });
box.append(canvas, el("div", { class: "blx-note" }, "angle/(π/2): 0 is the image, 1 is noise"));
panels.prepend(box);
const learned = el("button", { type: "button", class: "blx-learned" }, "Learned grid");
reset.before(learned);
let ask = null, wanted = false, shown = "", held = null;

const place = (level) => 12 + (level / half) * (canvas.clientWidth - 24);
const level = (x) => ((x - 12) / (canvas.clientWidth - 24)) * half;
// level k anywhere between its neighbours, within what the network has seen
function move(k, to) {
  const levels = [...memo.now], low = k ? levels[k - 1] + GAP : data.seen[0], high = k + 1 < levels.length ? levels[k + 1] - GAP : data.seen[1];
  levels[k] = Math.min(Math.max(to, low), Math.max(low, high));
  [memo.levels, memo.name] = [levels, "by hand"];
  redraw();
}
const redraw = () => {
  request();
  requestAnimationFrame(() => requestAnimationFrame(paint)); // compute sets memo.now
};
function paint() {
  const levels = memo.now || [], key = `${levels.join()} ${canvas.clientWidth}`;
  if (key === shown || !canvas.clientWidth) return;
  shown = key;
  const handles = canvas.querySelectorAll("[role=slider]");
  if (handles.length !== levels.length) {
    const line = svg("line", { x1: 12, x2: canvas.clientWidth - 12, y1: 30, y2: 30, class: "blx-frame" });
    canvas.replaceChildren(line, ...levels.map((_, k) => {
      const handle = svg("circle", { r: 9, cy: 30, role: "slider", tabindex: 0, "aria-label": `level ${k + 1}`, "aria-valuemin": 0, "aria-valuemax": 1, class: "blx-handle" });
      handle.addEventListener("pointerdown", (event) => {
        held = k;
        handle.setPointerCapture(event.pointerId);
      });
      handle.addEventListener("pointermove", (event) => held === k && move(k, level(event.clientX - canvas.getBoundingClientRect().left)));
      handle.addEventListener("pointerup", () => {
        if (held === k) draw();
        held = null;
      });
      handle.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -0.005, ArrowDown: -0.005, ArrowRight: 0.005, ArrowUp: 0.005, PageUp: 0.05, PageDown: -0.05 }[event.key];
        if (!step) return;
        event.preventDefault();
        move(k, memo.now[k] + step * half);
      });
      handle.addEventListener("keyup", (event) => /Arrow|Page/.test(event.key) && draw());
      return handle;
    }));
  }
  canvas.querySelector("line").setAttribute("x2", canvas.clientWidth - 12);
  canvas.querySelectorAll("[role=slider]").forEach((handle, k) => {
    handle.setAttribute("cx", place(levels[k]));
    handle.setAttribute("aria-valuenow", (levels[k] / half).toFixed(4));
  });
}

// Draws what is set; what moves meanwhile is drawn once, afterwards.
async function draw() {
  if (!ask) return;
  wanted = true;
  if (run.busy) return;
  run.busy = true;
  try {
    while (wanted) {
      wanted = false;
      await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))); // compute has set memo.now
      while (document.hidden) await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
      const levels = memo.now, name = memo.levels ? memo.name : "the sliders' grid";
      const found = await ask({ ask: "draw", levels, stretch: data.stretch });
      run.found = { ...found, name, N: levels.length };
      run.points = [...run.points, { N: levels.length, distance: found.distance }].slice(-40);
    }
  } catch (error) {
    Object.assign(memo.live, { phase: "failed", said: `It stopped: ${error.message}. Load the page anew.` });
    ask = null;
  }
  run.busy = false;
  request();
}
learned.addEventListener("click", () => {
  const known = Object.keys(data.grids).map(Number), N = known.reduce((a, b) => (Math.abs(b - values.N) < Math.abs(a - values.N) ? b : a));
  put("N", N);
  [memo.levels, memo.name] = [data.grids[N], `the learned grid of ${N} steps`];
  redraw();
  draw();
});
const byHand = (event) => {
  if (!event.target.matches("input[type=range]")) return;
  memo.levels = null;
  redraw();
  if (event.type === "change") draw();
};
root.addEventListener("input", byHand);
root.addEventListener("change", byHand);
reset.addEventListener("click", () => {
  Object.assign(run, { points: [], found: null });
  memo.levels = null;
  redraw();
  draw();
});
connect(figure, async (given) => {
  ask = given;
  await draw();
});
if (window.ResizeObserver) new ResizeObserver(redraw).observe(canvas);
redraw();
