// The runtime of every explorer on a page: builds the controls, calls compute(values, data, memo, format) at most once per
// frame, and draws the panels. Written inline into each explorer's HTML; the first one on a page defines it.
(() => {
  "use strict";
  const KEY = "/*KEY*/";
  if (window[KEY]) return;

  // ---- text -----------------------------------------------------------------------------------------------------
  const SUPER = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  const minus = (text) => text.replace("-", "−");

  // ".2f": fixed decimals; ".3g": significant digits, as 1.2 × 10⁻⁵ when very small or large. As format_number in Python.
  function format(value, spec) {
    if (typeof value === "string") return value;
    if (Number.isNaN(value)) return "undefined";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
    const digits = parseInt(spec.slice(1), 10);
    if (spec.endsWith("f")) {
      const text = value.toFixed(digits);
      return minus(Number(text) === 0 ? text.replace("-", "") : text);
    }
    if (value === 0) return "0";
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    const power = Number(exponent);
    const bare = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
    if (power >= -4 && power < 6) return minus(bare(value.toFixed(Math.max(0, digits - 1 - power))));
    const lead = minus(bare(mantissa)).replace(/^(−?)1$/, "$1"), raised = "10" + [...String(power)].map((c) => SUPER[c]).join("");
    return lead && lead !== "−" ? `${lead} × ${raised}` : lead + raised;
  }

  // "L_{γ}(λ)" -> [["L", ""], ["γ", "_"], ["(λ)", ""]]
  function segments(text) {
    const out = [];
    let rest = 0;
    for (const hit of text.matchAll(/([_^])\{([^}]*)\}/g)) {
      if (hit.index > rest) out.push([text.slice(rest, hit.index), ""]);
      out.push([hit[2], hit[1]]);
      rest = hit.index + hit[0].length;
    }
    if (rest < text.length) out.push([text.slice(rest), ""]);
    return out;
  }
  const plain = (text) => text.replace(/([_^])\{([^}]*)\}/g, "$1$2");

  function rich(node, text) {
    node.replaceChildren(
      ...segments(text).map(([part, kind]) => (kind ? el(kind === "_" ? "sub" : "sup", {}, part) : part)),
    );
    return node;
  }

  function svgText(attributes, text) {
    const node = svg("text", attributes);
    let shift = 0;
    for (const [part, kind] of segments(text)) {
      const level = kind === "_" ? 3 : kind === "^" ? -5 : 0;
      const span = svg("tspan", kind ? { dy: level - shift, "font-size": "76%" } : { dy: level - shift });
      span.textContent = part;
      shift = level;
      node.append(span);
    }
    return node;
  }

  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  function svg(tag, attributes = {}) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  }

  // ---- axes -----------------------------------------------------------------------------------------------------
  function ticks(low, high, log, room) {
    if (log) {
      const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
      const stride = Math.max(1, Math.ceil((last - first + 1) / room));
      const out = [];
      for (let k = first; k <= last; k += stride) out.push([10 ** k, `10^{${minus(String(k))}}`]);
      return out;
    }
    const raw = (high - low) / room, unit = 10 ** Math.floor(Math.log10(raw));
    const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= raw * 0.85);
    const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const out = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) {
      out.push([k * step, format(k * step, `.${decimals}f`)]);
    }
    return out;
  }

  // [low, high] of an axis: what the panel fixes, else the data's range with a little air
  function limits(fixed, series, key, log) {
    let low = Infinity, high = -Infinity;
    if (!fixed || fixed[0] === null || fixed[1] === null) {
      for (const line of series) {
        if (line.shape === "vline" || line.shape === "hline") continue;
        for (const value of line[key]) {
          if (Number.isFinite(value) && !(log && value <= 0)) {
            if (value < low) low = value;
            if (value > high) high = value;
          }
        }
      }
      if (!(low <= high)) [low, high] = log ? [0.1, 10] : [0, 1];
      if (key === "y" && !log) {
        const air = (high - low || Math.abs(high) || 1) * 0.05;
        [low, high] = [low - air, high + air];
      }
      if (log && low === high) [low, high] = [low / 2, high * 2];
    }
    return [fixed && fixed[0] !== null ? fixed[0] : low, fixed && fixed[1] !== null ? fixed[1] : high];
  }

  // ---- a panel of lines -----------------------------------------------------------------------------------------
  function linesPanel(panel, holder, legend, id) {
    const canvas = svg("svg", { role: "img", "aria-label": `${plain(panel.title)}: ${plain(panel.ylabel)} against ${plain(panel.xlabel)}` });
    const frame = svg("g"), curves = svg("g", { "clip-path": `url(#${id}-clip)` }), front = svg("g");
    const clip = svg("clipPath", { id: `${id}-clip` }), box = svg("rect");
    clip.append(box);
    canvas.append(clip, frame, curves, front);
    holder.append(canvas);
    let frameKey = "", legendKey = "", marginKey = "", marginWidth = 52;
    // room for the axis's name and the widest of its numbers
    const margin = (labels) => {
      const key = labels.join("|");
      if (key === marginKey) return marginWidth;
      const trial = svg("g", { visibility: "hidden" }), texts = labels.map((label) => svgText({}, label));
      trial.append(...texts);
      canvas.append(trial);
      const widest = Math.max(0, ...texts.map((text) => text.getComputedTextLength()));
      trial.remove();
      marginKey = key;
      return (marginWidth = Math.max(52, Math.ceil(widest) + 28));
    };

    return (series) => {
      const width = Math.floor(holder.clientWidth);
      if (width < 60) return;
      const height = Math.round(Math.min(panel.wide ? 280 : 250, Math.max(190, width * (panel.wide ? 0.42 : 0.64))));
      const [x0, x1] = limits(panel.xlim, series, "x", panel.xlog);
      const [y0, y1] = limits(panel.ylim, series, "y", panel.ylog);
      const right = width - 10, top = 10, bottom = height - 40;
      const levels = ticks(y0, y1, panel.ylog, Math.max(3, Math.min(6, (bottom - top) / 36)));
      const left = margin(levels.map(([, label]) => label));
      const scale = (a, b, p, q, log) =>
        log
          ? (value) => (value > 0 ? p + ((Math.log(value) - Math.log(a)) / (Math.log(b) - Math.log(a))) * (q - p) : NaN)
          : (value) => p + ((value - a) / (b - a)) * (q - p);
      const X = scale(x0, x1, left, right, panel.xlog), Y = scale(y0, y1, bottom, top, panel.ylog);

      const key = [width, height, left, x0, x1, y0, y1].join();
      if (key !== frameKey) {
        frameKey = key;
        for (const [name, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}` })) canvas.setAttribute(name, value);
        for (const [name, value] of Object.entries({ x: left, y: top, width: right - left, height: bottom - top })) box.setAttribute(name, value);
        frame.replaceChildren();
        const rule = (a, b, c, d, name) => frame.append(svg("line", { x1: a, y1: b, x2: c, y2: d, class: name }));
        for (const [value, label] of ticks(x0, x1, panel.xlog, Math.max(3, Math.min(7, (right - left) / 56)))) {
          const at = X(value);
          rule(at, top, at, bottom, "blx-grid");
          frame.append(svgText({ x: at, y: bottom + 16, "text-anchor": "middle" }, label));
        }
        for (const [value, label] of levels) {
          const at = Y(value);
          rule(left, at, right, at, "blx-grid");
          frame.append(svgText({ x: left - 6, y: at + 4, "text-anchor": "end" }, label));
        }
        frame.append(svg("path", { d: `M${left},${top}V${bottom}H${right}`, class: "blx-frame" }));
        frame.append(svgText({ x: (left + right) / 2, y: height - 6, "text-anchor": "middle", class: "blx-axis" }, panel.xlabel));
        const turned = svgText({ "text-anchor": "middle", class: "blx-axis" }, panel.ylabel);
        turned.setAttribute("transform", `translate(12,${(top + bottom) / 2}) rotate(-90)`);
        frame.append(turned);
      }

      const nodes = [], dots = [];
      const at = (value, a, b) => Math.min(b, Math.max(a, value)).toFixed(1);
      for (const line of series) {
        const stroke = `var(--blx-${line.role})`, style = panel.roles[line.role];
        let path = "";
        if (line.shape === "vline") path = `M${at(X(line.x[0]), -1e4, 1e4)},${top}V${bottom}`;
        else if (line.shape === "hline") path = `M${left},${at(Y(line.y[0]), -1e4, 1e4)}H${right}`;
        else if (line.shape === "points") {
          line.x.forEach((value, i) => {
            const cx = X(value), cy = Y(line.y[i]);
            if (cx >= left - 1 && cx <= right + 1 && cy >= top - 1 && cy <= bottom + 1) {
              dots.push(svg("circle", { cx: cx.toFixed(1), cy: cy.toFixed(1), r: 4, style: `fill:${stroke};stroke:var(--blx-bg);stroke-width:1.5` }));
            }
          });
          continue;
        } else {
          let pen = "M";
          for (let i = 0; i < line.x.length; i += 1) {
            const a = X(line.x[i]), b = Y(line.y[i]);
            if (Number.isFinite(a) && (Number.isFinite(b) || Math.abs(b) === Infinity)) {
              path += `${pen}${at(a, -1e4, 1e4)},${at(b, -1e4, 1e4)}`;
              pen = "L";
            } else pen = "M";
          }
          if (line.shape === "area" && path) {
            const ends = [X(line.x[0]), X(line.x[line.x.length - 1])].map((value) => value.toFixed(1));
            nodes.push(svg("path", { d: `${path}L${ends[1]},${bottom}L${ends[0]},${bottom}Z`, style: `fill:${stroke};opacity:.13` }));
          }
        }
        nodes.push(svg("path", { d: path, style: `stroke:${stroke};stroke-width:${style.width};stroke-dasharray:${style.dash || "none"}` }));
      }
      curves.replaceChildren(...nodes);
      front.replaceChildren(...dots);

      const entry = (line) => line.label + line.role + line.shape;
      const named = series.filter((line, i) => line.label && series.findIndex((other) => entry(other) === entry(line)) === i);
      const names = named.map(entry).join("|");
      if (names !== legendKey) {
        legendKey = names;
        legend.replaceChildren(
          ...named.map((line) => {
            const style = panel.roles[line.role], swatch = svg("svg", { width: line.shape === "points" ? 10 : 26, height: 12, "aria-hidden": "true" });
            const colour = `var(--blx-${line.role})`;
            if (line.shape === "points") swatch.append(svg("circle", { cx: 5, cy: 6, r: 4, style: `fill:${colour}` }));
            else {
              if (line.shape === "area") swatch.append(svg("rect", { width: 26, height: 12, style: `fill:${colour};opacity:.13` }));
              swatch.append(svg("path", { d: line.shape === "vline" ? "M13,0V12" : "M0,6H26", style: `stroke:${colour};stroke-width:${style.width};stroke-dasharray:${style.dash || "none"}` }));
            }
            return el("span", {}, swatch, rich(el("span"), line.label));
          }),
        );
      }
    };
  }

  // ---- a panel of images ----------------------------------------------------------------------------------------
  function imagesPanel(panel, holder) {
    const strip = el("div", { class: "blx-images" });
    holder.append(strip);
    if (panel.xlabel) holder.append(rich(el("div", { class: "blx-note" }), panel.xlabel));
    let tiles = [];
    return (images) => {
      if (tiles.length !== images.length) {
        tiles = images.map(() => {
          const canvas = el("canvas", { role: "img" }), label = el("div");
          return { canvas, label, box: el("div", {}, canvas, label) };
        });
        strip.replaceChildren(...tiles.map((tile) => tile.box));
      }
      images.forEach((image, i) => {
        const { canvas, label } = tiles[i], rows = image.pixels.length, columns = image.pixels[0].length;
        if (canvas.width !== columns || canvas.height !== rows) [canvas.width, canvas.height] = [columns, rows];
        const pen = canvas.getContext("2d"), bitmap = pen.createImageData(columns, rows);
        image.pixels.flat().forEach((value, j) => {
          const grey = Math.round((Math.min(1, Math.max(-1, value)) + 1) * 127.5);
          bitmap.data.set([grey, grey, grey, 255], 4 * j);
        });
        pen.putImageData(bitmap, 0, 0);
        if (label.dataset.text !== image.label) {
          label.dataset.text = image.label;
          rich(label, image.label);
          canvas.setAttribute("aria-label", `${plain(panel.title)}, ${plain(image.label)}`);
        }
      });
    };
  }

  // ---- controls -------------------------------------------------------------------------------------------------
  // the values a slider can take; the same list as Slider.grid in Python
  function grid(slider) {
    const out = [];
    if (slider.log) {
      const first = Math.round(Math.log10(slider.min) * slider.log), last = Math.round(Math.log10(slider.max) * slider.log);
      for (let k = first; k <= last; k += 1) out.push(Number((10 ** (k / slider.log)).toPrecision(2)));
    } else {
      const count = Math.round((slider.max - slider.min) / slider.step);
      for (let i = 0; i <= count; i += 1) out.push(Number((slider.min + i * slider.step).toPrecision(12)));
    }
    return out;
  }
  const nearest = (list, value) => list.reduce((best, item, i) => (Math.abs(item - value) < Math.abs(list[best] - value) ? i : best), 0);

  function build(root, spec, compute, extra) {
    root.dataset.ready = "1";
    const base = document.querySelectorAll(`[id="${root.id}"]`).length > 1 ? `${root.id}-${Math.random().toString(36).slice(2)}` : root.id;
    const app = el("div"), bars = {};
    for (const type of ["choice", "slider"]) {
      const count = spec.controls.filter((control) => control.type === type).length;
      if (count) bars[type] = el("div", { class: type === "slider" && count < 3 ? "blx-controls blx-few" : "blx-controls" });
    }
    const reset = el("button", { type: "button" }, "Reset");
    const readout = el("div", { class: "blx-readout" }), message = el("div", { class: "blx-message", role: "status" });
    const panels = el("div", { class: "blx-panels" });
    app.append(el("div", { class: "blx-head" }, rich(el("div", { class: "blx-title" }), spec.title), reset), ...Object.values(bars), readout, message, panels);

    const values = {}, widgets = {}, memo = {};
    let result = null, pending = 0;
    const request = () => {
      if (!pending) {
        pending = requestAnimationFrame(() => {
          pending = 0;
          draw();
        });
      }
    };

    for (const control of spec.controls) {
      const id = `${base}-${control.name}`;
      const name = el("span", { class: "blx-name" }, rich(el("b"), control.label));
      if (control.hint) name.append(" ", el("span", { class: "blx-hint" }, control.hint));
      if (control.type === "choice") {
        const select = el("select", { id, name: control.name }, ...control.options.map(([value, label]) => el("option", { value }, label)));
        select.addEventListener("change", () => {
          values[control.name] = select.value;
          applyRanges(control);
          request();
        });
        widgets[control.name] = { control, put: (value) => { values[control.name] = select.value = value; applyRanges(control); } };
        bars.choice.append(el("div", { class: "blx-control" }, el("div", { class: "blx-row" }, el("label", { for: id }, name)), select));
      } else {
        const input = el("input", { type: "range", id, name: control.name, min: 0, step: 1 }), shown = el("output", { for: id });
        let list = [];
        const show = () => {
          shown.textContent = (control.names || [])[Number(input.value)] || format(values[control.name], control.format);
          input.setAttribute("aria-valuetext", shown.textContent);
        };
        const range = (slider) => {
          list = grid(slider);
          input.max = list.length - 1;
          put(slider.value);
        };
        const put = (value) => {
          input.value = nearest(list, value);
          values[control.name] = list[Number(input.value)];
          show();
        };
        input.addEventListener("input", () => {
          values[control.name] = list[Number(input.value)];
          show();
          request();
        });
        widgets[control.name] = { control, put, range };
        range(control);
        bars.slider.append(el("div", { class: "blx-control" }, el("div", { class: "blx-row" }, el("label", { for: id }, name), shown), input));
      }
    }
    function applyRanges(choice) {
      for (const [name, range] of Object.entries((choice.ranges || {})[values[choice.name]] || {})) widgets[name].range(range);
    }
    function start() {
      for (const control of spec.controls) if (control.type !== "choice") widgets[control.name].range(control);
      for (const control of spec.controls) if (control.type === "choice") widgets[control.name].put(control.value);
    }

    const painters = spec.panels.map((panel) => {
      const holder = el("div"), legend = el("div", { class: "blx-legend" });
      const box = el("div", { class: panel.wide ? "blx-panel blx-wide" : "blx-panel" }, rich(el("div", { class: "blx-panel-title" }), panel.title));
      if (panel.kind === "lines") box.append(legend);
      box.append(holder);
      panels.append(box);
      const paint = panel.kind === "lines" ? linesPanel({ ...panel, roles: spec.roles }, holder, legend, `${base}-${panel.id}`) : imagesPanel(panel, holder);
      return [panel.id, paint, holder];
    });

    let cells = [], messageWidth = 0, messageHeight = 0;
    function draw() {
      result = compute(values, spec.data, memo, format);
      for (const [id, paint] of painters) paint(result[id] || []);
      const rows = result.readout || [];
      if (cells.length !== rows.length || cells.some((cell, i) => cell.label !== rows[i][0])) {
        cells = rows.map(([label]) => ({ label, value: el("span") }));
        readout.replaceChildren(...cells.map((cell) => el("div", {}, rich(el("span"), cell.label), cell.value)));
      }
      rows.forEach(([, value, spec], i) => {
        cells[i].value.textContent = format(value, spec || ".4g");
      });
      const text = result.message || "";
      if (message.dataset.text !== text) {
        message.dataset.text = text;
        message.classList.toggle("blx-warn", Boolean(result.warn));
        rich(message, text && (result.warn ? "⚠ " : "✓ ") + text);
        // never shrinks, so that the plots do not jump while a slider moves across a threshold
        if (message.offsetWidth !== messageWidth) [messageWidth, messageHeight] = [message.offsetWidth, 0];
        message.style.minHeight = "0";
        messageHeight = Math.max(messageHeight, message.offsetHeight);
        message.style.minHeight = `${messageHeight}px`;
      }
    }

    reset.addEventListener("click", () => {
      start();
      request();
    });
    // keys move a slider, not the notebook around it (the attribute is JupyterLab's, the event the older ones')
    root.setAttribute("data-lm-suppress-shortcuts", "true");
    root.addEventListener("keydown", (event) => {
      if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
    });
    root.querySelector(".blx-fallback").replaceWith(app);
    start();
    draw();
    if (window.ResizeObserver) new ResizeObserver(request).observe(panels);
    else window.addEventListener("resize", request);
    root.explorer = {
      values: () => ({ ...values }),
      result: () => result,
      compute: (given) => compute(given, spec.data, {}, format),
      format,
    };
    // what a figure adds of its own: buttons, a worker, a panel to drag in
    const put = (name, value) => widgets[name].put(value);
    if (extra) extra({ root, base, reset, panels, values, memo, data: spec.data, request, put, el, svg, rich, format });
  }

  window[KEY] = {
    // the output may be attached to the page only after its script has run (JupyterLab): look for it for a while
    mount(id, spec, compute, extra = null, tries = 0) {
      const roots = document.querySelectorAll(`[id="${id}"]:not([data-ready])`);
      if (roots.length) roots.forEach((root) => build(root, spec, compute, extra));
      else if (tries < 200) setTimeout(() => this.mount(id, spec, compute, extra, tries + 1), 50);
    },
  };
})();
