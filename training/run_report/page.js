"use strict";
// Draws the charts of a report and makes its controls work. No library, no network.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const data = JSON.parse(document.getElementById("data").textContent);
  const view = { logX: false, smoothing: 0, zoom: null, hidden: new Set() };
  const plots = [];

  function make(name, attributes = {}, ...children) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function html(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  // Numbers.

  function format(value, percent = false) {
    if (value === null || value === undefined) return "none";
    if (percent) return `${trim((100 * value).toPrecision(3))}%`;
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size >= 1e9 || size < 1e-4) return value.toExponential(2).replace(/\.?0+e/, "e");
    for (const [scale, unit] of [[1e6, "M"], [1e4, "k"]])
      if (size >= scale) return trim((value / (unit === "k" ? 1e3 : 1e6)).toPrecision(4)) + unit;
    return trim(value.toPrecision(4));
  }

  function trim(text) {
    const number = Number(text);
    return Math.abs(number) >= 1e15 ? text : String(number);
  }

  function linearTicks(low, high, count) {
    const rough = (high - low) / Math.max(count, 1);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
      ticks.push(Number((i * step).toPrecision(12)));
    return ticks;
  }

  function logTicks(low, high, count) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const of = (factors, every) => {
      const ticks = [];
      for (let power = first; power <= last; power += every)
        for (const factor of factors) ticks.push(Number((factor * 10 ** power).toPrecision(12)));
      return ticks.filter((tick) => tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9));
    };
    for (const factors of [[1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5], [1, 2, 5], [1, 3], [1]]) {
      const ticks = of(factors, 1);
      if (ticks.length <= Math.max(count, 2)) return ticks.length > 1 ? ticks : linearTicks(low, high, 3);
    }
    return of([1], Math.ceil((last - first) / Math.max(count, 2)));
  }

  // Returns a function from values to pixels, with its inverse.
  function scale(low, high, start, end, log) {
    const to = log ? Math.log : (v) => v, from = log ? Math.exp : (v) => v;
    const a = to(low), span = to(high) - a || 1;
    const map = (value) => start + ((to(value) - a) / span) * (end - start);
    map.inverse = (pixel) => from(a + ((pixel - start) / (end - start)) * span);
    return map;
  }

  function smoothed(values, weight) {
    let sum = 0, norm = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = weight * sum + (1 - weight) * value;
      norm = weight * norm + (1 - weight);
      return sum / norm;
    });
  }

  function nearest(xs, x) {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle;
      else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  }

  // Returns the path of points [x, y], broken at null.
  function path(points) {
    let text = "", open = false;
    for (const point of points) {
      if (point === null) open = false;
      else {
        text += `${open ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
        open = true;
      }
    }
    return text;
  }

  class Plot {
    constructor(figure) {
      this.chart = data.charts[Number(figure.dataset.chart)];
      this.figure = figure;
      this.area = figure.querySelector(".plot");
      this.isBars = this.chart.kind !== "line";
      this.isShared = this.chart.x === "kimg" && !this.isBars;
      this.log = this.chart.log;
      this.own = new Set();
      this.cursor = null;
      this.lines = this.chart.lines.map((line) => ({ ...line, x: data.xs[line.x] }));
      this.build();
    }

    get hidden() {
      return data.shared ? view.hidden : this.own;
    }

    get visible() {
      return this.lines.filter((line) => !this.hidden.has(line.name));
    }

    build() {
      const caption = this.figure.querySelector("figcaption");
      if (!this.isBars) {
        const button = html("button", { type: "button", class: "small" }, "Log scale");
        button.setAttribute("aria-pressed", this.log);
        button.addEventListener("click", () => {
          this.log = !this.log;
          button.setAttribute("aria-pressed", this.log);
          this.draw();
        });
        caption.append(button);
      }
      this.area.tabIndex = 0;
      const attributes = {
        role: "slider",
        "aria-label": `${this.chart.title}: values. Arrow keys move along the axis.`,
        "aria-orientation": "horizontal",
        "aria-valuemin": 0,
      };
      for (const [key, value] of Object.entries(attributes)) this.area.setAttribute(key, value);
      this.readout = html("p", { class: "readout", "aria-hidden": "true" });
      this.area.after(this.readout);
      if (this.lines.length > 1 || data.shared) this.buildLegend();
      this.area.addEventListener("keydown", (event) => this.onKey(event));
      this.area.addEventListener("pointermove", (event) => this.onMove(event));
      this.area.addEventListener("pointerdown", (event) => this.onDown(event));
      this.area.addEventListener("pointerup", (event) => this.onUp(event));
      this.area.addEventListener("pointercancel", () => (this.drag = null));
      this.area.addEventListener("pointerleave", () => this.moveTo(null));
      this.area.addEventListener("blur", () => this.moveTo(null));
      this.area.addEventListener("dblclick", () => setZoom(null));
      new ResizeObserver(() => {
        if (this.area.clientWidth !== this.width) this.draw();
      }).observe(this.area);
    }

    buildLegend() {
      this.legend = html("div", { class: "legend", role: "group", "aria-label": "Lines of the chart" });
      for (const line of this.lines) {
        const swatch = make("svg", { viewBox: "0 0 22 10", class: "swatch", "aria-hidden": "true" });
        swatch.append(
          this.isBars
            ? make("rect", { x: 5, width: 12, height: 10, class: `fill ${colour(line)}` })
            : make("line", { x1: 0, x2: 22, y1: 5, y2: 5, class: `line ${colour(line)}` }),
        );
        const button = html("button", { type: "button", class: "key" }, swatch, line.name);
        button.dataset.line = line.name;
        button.setAttribute("aria-pressed", "true");
        button.addEventListener("click", () => {
          if (!this.hidden.delete(line.name)) this.hidden.add(line.name);
          if (data.shared) plots.forEach((plot) => plot.draw());
          else this.draw();
        });
        this.legend.append(button);
      }
      this.readout.after(this.legend);
    }

    // Drawing.

    draw() {
      this.width = this.area.clientWidth;
      for (const button of this.legend?.children ?? [])
        button.setAttribute("aria-pressed", !this.hidden.has(button.dataset.line));
      if (!this.width) return;
      this.height = this.width < 420 ? 210 : 250;
      const size = { width: this.width, height: this.height };
      this.svg = make("svg", { ...size, viewBox: `0 0 ${this.width} ${this.height}`, "aria-hidden": "true" });
      this.isBars ? this.drawBars() : this.drawLines();
      this.area.replaceChildren(this.svg);
      this.moveTo(this.cursor);
    }

    // Draws axes for the ranges of values, and sets this.sx and this.sy.
    frame([x0, x1], [y0, y1], logX, logY) {
      const ticks = logY ? logTicks : linearTicks;
      const yTicks = ticks(y0, y1, this.height / 42);
      const labels = yTicks.map((tick) => format(tick, this.chart.percent));
      const left = Math.max(...labels.map((label) => label.length), 2) * 7.4 + 12;
      const box = { left, right: this.width - 10, top: 8, bottom: this.height - 36 };
      this.box = box;
      this.sx = scale(x0, x1, box.left, box.right, logX);
      this.sy = scale(y0, y1, box.bottom, box.top, logY);
      const grid = make("g", { class: "grid" });
      yTicks.forEach((tick, i) => {
        const y = this.sy(tick);
        grid.append(make("line", { x1: box.left, x2: box.right, y1: y, y2: y }));
        grid.append(make("text", { x: box.left - 6, y: y + 4, "text-anchor": "end" }, labels[i]));
      });
      if (!this.isBars) {
        const xTicks = (logX ? logTicks : linearTicks)(x0, x1, (box.right - box.left) / 70);
        for (const tick of xTicks) this.xLabel(grid, this.sx(tick), format(tick), true);
      }
      const title = make("text", { x: box.right, y: this.height - 4, "text-anchor": "end", class: "axis" });
      title.append(this.chart.x + (logX ? " (log)" : ""));
      grid.append(title);
      this.svg.append(grid);
    }

    xLabel(grid, x, text, withLine) {
      const { top, bottom, right } = this.box;
      if (withLine) grid.append(make("line", { x1: x, x2: x, y1: top, y2: bottom, class: "faint" }));
      const anchor = x > right - 14 ? "end" : "middle";
      grid.append(make("text", { x: Math.min(x, right), y: bottom + 15, "text-anchor": anchor }, text));
    }

    drawLines() {
      const logX = this.isShared ? view.logX : this.chart.log_x;
      const zoom = this.isShared ? view.zoom : null;
      const usable = (line, i) =>
        line.y[i] !== null && (!this.log || line.y[i] > 0) && (!logX || line.x[i] > 0);
      const xs = [], ys = [];
      for (const line of this.visible)
        line.x.forEach((x, i) => {
          if (!usable(line, i) || (zoom && (x < zoom[0] || x > zoom[1]))) return;
          xs.push(x);
          ys.push(line.y[i]);
          for (const end of [line.low?.[i], line.high?.[i]])
            if (Number.isFinite(end) && (!this.log || end > 0)) ys.push(end);
        });
      this.xs = [...new Set(xs)].sort((a, b) => a - b);
      if (!xs.length) {
        const text = this.visible.length ? "No value to draw on these axes." : "All lines are hidden.";
        this.svg.append(make("text", { x: this.width / 2, y: this.height / 2, class: "empty" }, text));
        this.sx = null;
        return;
      }
      let [x0, x1] = zoom ?? [this.xs[0], this.xs[this.xs.length - 1]];
      if (!zoom && !logX && this.isShared) x0 = 0;
      if (logX) x0 = Math.max(x0, this.xs[0]);
      if (x0 === x1) [x0, x1] = logX ? [x0 / 2, x1 * 2] : [x0 - 0.5, x1 + 0.5];
      this.frame([x0, x1], range(ys, this.log), logX, this.log);
      const { left, right, top, bottom } = this.box, id = `clip-${this.figure.dataset.chart}`;
      const box = { x: left - 4, y: top - 4, width: right - left + 8, height: bottom - top + 8 };
      const lines = make("g", { "clip-path": `url(#${id})` });
      for (const line of this.visible) lines.append(...this.marks(line, usable));
      this.svg.append(make("clipPath", { id }, make("rect", box)), lines);
    }

    marks(line, usable) {
      const found = [], style = colour(line);
      const at = (i, value) =>
        !usable(line, i) || value === null || (this.log && value <= 0) ? null : [this.sx(line.x[i]), this.sy(value)];
      const dots = line.y.map((value, i) => at(i, value));
      const withMarks = line.points && dots.length <= 100;
      if (line.low) {
        // A band that reaches below what a logarithmic axis can show ends at its line.
        const ends = (values) => values.map((v, i) => at(i, v !== null && this.log && v <= 0 ? line.y[i] : v));
        const upper = ends(line.high), lower = ends(line.low);
        const whole = [...upper.keys()].filter((i) => upper[i] && lower[i]);
        if (whole.length > 1) {
          const outline = [...whole.map((i) => upper[i]), ...whole.map((i) => lower[i]).reverse()];
          found.push(make("path", { d: `${path(outline)}Z`, class: `band ${style}` }));
        }
        for (const i of withMarks ? whole : []) {
          const [[x, y1], [, y2]] = [upper[i], lower[i]];
          const d = `M${x - 3} ${y1}H${x + 3}M${x} ${y1}V${y2}M${x - 3} ${y2}H${x + 3}`;
          found.push(make("path", { d, class: `whisker ${style}` }));
        }
      }
      if (this.isShared && !line.points && view.smoothing > 0) {
        found.push(make("path", { d: path(dots), class: `line raw ${style}` }));
        const points = smoothed(line.y, view.smoothing).map((value, i) => at(i, value));
        found.push(make("path", { d: path(points), class: `line ${style}` }));
      } else found.push(make("path", { d: path(dots), class: `line ${style}` }));
      dots.forEach((point, i) => {
        if (point && (withMarks || (!dots[i - 1] && !dots[i + 1])))
          found.push(make("circle", { cx: point[0], cy: point[1], r: 3, class: `fill ${style}` }));
      });
      return found;
    }

    drawBars() {
      const lines = this.visible, names = this.chart.names, stacked = this.chart.kind === "stack";
      this.xs = names.map((_, i) => i);
      const at = (line, i) => line.y[line.x.indexOf(i)] ?? null;
      const ys = [0];
      for (const i of this.xs) {
        if (stacked) ys.push(lines.reduce((sum, line) => sum + Math.max(at(line, i) ?? 0, 0), 0));
        else
          for (const line of lines)
            for (const end of [line.y, line.low, line.high])
              if (Number.isFinite(end?.[line.x.indexOf(i)])) ys.push(end[line.x.indexOf(i)]);
      }
      if (ys.every((y) => y === 0)) ys.push(1);
      this.frame([-0.5, names.length - 0.5], stacked ? [0, Math.max(...ys)] : range(ys, false), false, false);
      const slot = this.sx(1) - this.sx(0), room = slot * 0.82, zero = this.sy(0);
      const grid = this.svg.querySelector(".grid");
      const every = Math.ceil((Math.max(...names.map((name) => name.length)) * 7 + 6) / slot);
      for (const i of this.xs) {
        if (i % every === 0) this.xLabel(grid, this.sx(i), names[i], false);
        let base = 0;
        lines.forEach((line, j) => {
          const value = at(line, i);
          if (value === null) return;
          const width = stacked ? room : room / lines.length;
          const x = this.sx(i) - room / 2 + (stacked ? 0 : j * width);
          const [from, to] = stacked ? [this.sy(base), this.sy(base + value)] : [zero, this.sy(value)];
          base += value;
          const box = { x, y: Math.min(from, to), width: Math.max(width - 1, 1), height: Math.abs(to - from) };
          this.svg.append(make("rect", { ...box, class: `fill ${colour(line)}` }));
          const place = line.x.indexOf(i), middle = x + width / 2;
          if (!stacked && Number.isFinite(line.low?.[place]))
            this.svg.append(make("path", {
              d: `M${middle} ${this.sy(line.low[place])}V${this.sy(line.high[place])}`,
              class: "whisker plain",
            }));
        });
      }
      this.svg.append(make("line", { x1: this.box.left, x2: this.box.right, y1: zero, y2: zero, class: "zero" }));
    }

    // Reading values.

    moveTo(index) {
      this.marker?.remove();
      this.cursor = index === null || !this.xs?.length ? null : Math.min(Math.max(index, 0), this.xs.length - 1);
      const shown = this.cursor ?? (this.xs?.length ?? 0) - 1;
      const text = shown < 0 || !this.sx ? "" : this.describe(this.xs[shown]);
      this.readout.textContent = text;
      this.area.setAttribute("aria-valuemax", Math.max((this.xs?.length ?? 1) - 1, 0));
      this.area.setAttribute("aria-valuenow", Math.max(shown, 0));
      this.area.setAttribute("aria-valuetext", text || "nothing is shown");
      if (this.cursor === null || !this.sx) return;
      const x = this.sx(this.xs[this.cursor]);
      this.marker = make("g", { class: "cursor" });
      this.marker.append(make("line", { x1: x, x2: x, y1: this.box.top, y2: this.box.bottom }));
      this.svg.append(this.marker);
    }

    describe(x) {
      const parts = [];
      for (const line of this.visible) {
        if (!line.x.length || x < line.x[0] || x > line.x[line.x.length - 1]) continue;
        const i = nearest(line.x, x);
        if (line.y[i] === null) continue;
        let text = `${line.name} = ${format(line.y[i], this.chart.percent)}`;
        if (Number.isFinite(line.low?.[i]) && line.low[i] !== line.high[i]) {
          const ends = [line.low[i], line.high[i]].map((end) => format(end, this.chart.percent));
          text += ` (${ends.join(" to ")})`;
        }
        parts.push(text);
      }
      const place = `${this.chart.x} ${this.isBars ? this.chart.names[x] : format(x)}`;
      return `${place}: ${parts.join("; ") || "no value"}`;
    }

    onKey(event) {
      const last = (this.xs?.length ?? 1) - 1, now = this.cursor ?? last;
      const target = {
        ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1,
        PageDown: now - 10, PageUp: now + 10, Home: 0, End: last,
      }[event.key];
      if (target !== undefined && !event.altKey && !event.ctrlKey && !event.metaKey) this.moveTo(target);
      else if (event.key === "Escape") this.cursor === null ? setZoom(null) : this.moveTo(null);
      else if (this.isShared && this.sx && (event.key === "+" || event.key === "-")) this.zoomAt(event.key === "+" ? 0.5 : 2);
      else return;
      event.preventDefault();
    }

    zoomAt(factor) {
      const [low, high] = [this.box.left, this.box.right].map((pixel) => this.sx.inverse(pixel));
      const middle = this.xs[this.cursor ?? this.xs.length - 1], half = ((high - low) * factor) / 2;
      const kimg = plots.filter((plot) => plot.isShared).flatMap((plot) => plot.lines.flatMap((line) => line.x));
      const end = kimg.reduce((a, b) => Math.max(a, b), 0);
      const start = Math.max(Math.min(middle - half, end - 2 * half), 0);
      setZoom(2 * half >= end ? null : [start, Math.min(start + 2 * half, end)]);
    }

    onMove(event) {
      if (!this.sx || !this.xs.length) return;
      const x = event.clientX - this.area.getBoundingClientRect().left;
      this.moveTo(nearest(this.xs, this.sx.inverse(x)));
      if (!this.drag) return;
      const ends = [this.drag, x].sort((a, b) => a - b);
      this.marker.append(make("rect", { x: ends[0], width: ends[1] - ends[0], y: this.box.top, height: this.box.bottom - this.box.top, class: "drag" }));
    }

    onDown(event) {
      this.onMove(event);
      if (event.pointerType === "mouse" && event.button === 0 && this.isShared)
        this.drag = event.clientX - this.area.getBoundingClientRect().left;
    }

    onUp(event) {
      const start = this.drag, end = event.clientX - this.area.getBoundingClientRect().left;
      this.drag = null;
      if (start == null || Math.abs(end - start) < 8 || !this.sx) return;
      const ends = [start, end].map((x) => this.sx.inverse(Math.min(Math.max(x, this.box.left), this.box.right)));
      setZoom(ends.sort((a, b) => a - b));
    }
  }

  function colour(line) {
    return `c${line.colour % 8} dash${Math.floor(line.colour / 8) % 3}`;
  }

  // Returns the ends of an axis for values, of which there is at least one.
  function range(values, log) {
    let [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    if (log) {
      const pad = Math.max((high / low) ** 0.06, 1.02);
      return [low / pad, high * pad];
    }
    if (low >= 0 && low <= 0.5 * high) low = 0;
    if (low === high) {
      const pad = Math.abs(low) * 0.1 || 1;
      return low === 0 ? [0, 1] : [low - pad, high + pad];
    }
    const pad = 0.06 * (high - low);
    return [low === 0 ? 0 : low - pad, high === 0 ? 0 : high + pad];
  }

  function setZoom(zoom) {
    view.zoom = zoom;
    const button = document.getElementById("reset-zoom");
    if (button) button.hidden = zoom === null;
    redrawShared();
  }

  function redrawShared() {
    for (const plot of plots) if (plot.isShared) plot.draw();
  }

  // Controls.

  for (const bar of document.querySelectorAll(".toolbar")) bar.hidden = false;
  document.getElementById("log-kimg")?.addEventListener("click", (event) => {
    view.logX = !view.logX;
    event.currentTarget.setAttribute("aria-pressed", view.logX);
    redrawShared();
  });
  document.getElementById("smoothing")?.addEventListener("input", (event) => {
    view.smoothing = Number(event.target.value);
    event.target.nextElementSibling.textContent = view.smoothing.toFixed(2);
    redrawShared();
  });
  document.getElementById("reset-zoom")?.addEventListener("click", () => setZoom(null));

  for (const figure of document.querySelectorAll(".grids")) {
    const pictures = [...figure.querySelectorAll(".stack img")], slider = figure.querySelector("input");
    if (!slider) continue;
    const output = figure.querySelector("output"), note = figure.querySelector(".caption");
    const show = () => {
      const index = Number(slider.value);
      pictures.forEach((picture, i) => (picture.hidden = i !== index));
      note.textContent = pictures[index].dataset.caption;
      output.textContent = `${index + 1} of ${pictures.length}`;
      slider.setAttribute("aria-valuetext", pictures[index].dataset.caption);
    };
    slider.addEventListener("input", show);
    figure.querySelector(".stepper").hidden = false;
    show();
  }

  for (const button of document.querySelectorAll("button.copy")) {
    const command = button.closest(".step").querySelector("code");
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(command.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(command);
        button.textContent = "Selected";
      }
      setTimeout(() => (button.textContent = "Copy"), 2000);
    });
  }

  for (const input of document.querySelectorAll("input.filter")) {
    const rows = input.closest("details").querySelectorAll("tbody tr");
    input.parentElement.hidden = false;
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
  }

  for (const figure of document.querySelectorAll("[data-chart]")) plots.push(new Plot(figure));
  for (const plot of plots) plot.draw();
  document.documentElement.dataset.ready = "true";
})();
