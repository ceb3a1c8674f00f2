// Learning curves: values under the pointer, zoom by dragging, a logarithmic axis, smoothing, several runs at once.
"use strict";
(() => {
  const root = document.getElementById("curves");
  if (!root || !window.d3) return;
  const data = JSON.parse(document.getElementById("curves-data").textContent);
  const HEIGHT = 250, MARGIN = { top: 10, right: 14, bottom: 34, left: 52 };
  // A tooltip lists this many lines; a line of more points than these is smoothed.
  const LISTED = 12, SHORT = 20, COLORS = 8;
  const number = d3.format(".4~g");
  const state = { axis: "step", log: false, smoothing: 0.6, zoom: null, runs: new Set(), hidden: new Set() };
  data.runs.forEach((run, index) => run.shown && state.runs.add(index));
  const charts = data.charts.map((chart) => ({ ...chart, lines: chart.lines.map(prepare) }));

  function prepare(line) {
    const perEpoch = data.runs[line.run].steps_per_epoch || 1;
    const points = line.x.map((x, i) => ({ step: x, epoch: (x + 1) / perEpoch, y: line.y[i] }));
    return { ...line, points: points.filter((point) => point.y !== null) };
  }

  // An exponential moving average without the bias of its start, which is 0.
  function smooth(points) {
    if (!state.smoothing || points.length <= SHORT) return null;
    let sum = 0, weight = 0;
    return points.map((point) => {
      sum = state.smoothing * sum + (1 - state.smoothing) * point.y;
      weight = state.smoothing * weight + (1 - state.smoothing);
      return { ...point, y: sum / weight };
    });
  }

  const color = (index) => `var(--c${index % COLORS})`;
  const isHidden = (chart, line) => state.hidden.has(`${chart.name}\n${line.kind}`);
  // Where the colours tell the runs, dashes tell the training from the validation.
  const isDashed = (chart, kind) => chart.kinds.length > 1 && kind !== "validation";
  const shownRuns = () => data.runs.map((_, index) => index).filter((index) => state.runs.has(index));

  function linesOf(chart) {
    const one = state.runs.size <= 1;
    return chart.lines.filter((line) => state.runs.has(line.run) && !isHidden(chart, line)).map((line) => ({
      ...line,
      color: color(one ? chart.kinds.indexOf(line.kind) : line.run),
      isDashed: !one && isDashed(chart, line.kind),
      label: one ? line.kind || chart.name : `${data.runs[line.run].name} ${line.kind}`,
      smoothed: smooth(line.points),
    }));
  }

  function rangeOf(values) {
    let [low, high] = d3.extent(values);
    if (low === undefined) return [0, 1];
    if (low === high) [low, high] = [low - 1, high + 1];
    // The first and the last point have room for their circles.
    const margin = (high - low) * 0.015;
    return [low - margin, high + margin];
  }

  function domainOf(values) {
    const [low, high] = d3.extent(values);
    if (low === undefined) return state.log ? [0.1, 1] : [0, 1];
    if (state.log) return low === high ? [low / 2, high * 2] : [low * 0.9, high * 1.1];
    const margin = low === high ? Math.abs(low) / 10 || 1 : (high - low) * 0.05;
    // A loss is not below 0 and a share not above 1, so that no axis is.
    return [low >= 0 ? Math.max(0, low - margin) : low - margin, low >= 0 && high <= 1 ? Math.min(1, high + margin) : high + margin];
  }

  function draw(view) {
    const { chart, svg } = view;
    const width = view.box.clientWidth;
    if (!width) return;
    const lines = linesOf(chart);
    const inner = { width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
    const drawable = (point) => !state.log || point.y > 0;
    const everywhere = lines.flatMap((line) => line.points.map((point) => point[state.axis]));
    const domain = state.zoom ?? rangeOf(everywhere);
    const x = d3.scaleLinear().domain(domain).range([0, inner.width]);
    const inside = (point) => point[state.axis] >= domain[0] && point[state.axis] <= domain[1] && drawable(point);
    const values = lines.flatMap((line) => line.points.filter(inside).map((point) => point.y));
    const y = (state.log ? d3.scaleLog() : d3.scaleLinear()).domain(domainOf(values)).range([inner.height, 0]);
    if (!state.log) y.nice(5);
    const path = d3.line().defined(drawable).x((point) => x(point[state.axis])).y((point) => y(point.y));

    svg.attr("viewBox", `0 0 ${width} ${HEIGHT}`).attr("width", width).attr("height", HEIGHT).selectAll("*").remove();
    svg.append("clipPath").attr("id", view.clip).append("rect").attr("y", -6).attr("width", inner.width).attr("height", inner.height + 12);
    const plot = svg.append("g").attr("transform", `translate(${MARGIN.left},${MARGIN.top})`);
    plot.append("g").attr("class", "grid").call(d3.axisLeft(y).ticks(5, number).tickSize(-inner.width));
    plot.append("g").attr("class", "axis").attr("transform", `translate(0,${inner.height})`)
      .call(d3.axisBottom(x).ticks(Math.max(2, inner.width / 90)).tickSizeOuter(0));
    plot.append("text").attr("class", "label").attr("x", inner.width).attr("y", inner.height + 31).text(state.axis);
    const marks = plot.append("g").attr("clip-path", `url(#${view.clip})`);
    for (const line of lines) {
      const strong = line.smoothed ?? line.points;
      if (line.smoothed) marks.append("path").attr("class", "raw").attr("d", path(line.points)).style("stroke", line.color);
      marks.append("path").attr("class", line.isDashed ? "line dashed" : "line").attr("d", path(strong)).style("stroke", line.color);
      if (strong.length <= SHORT) {
        marks.selectAll(null).data(strong.filter(drawable)).enter().append("circle").attr("r", 3)
          .attr("cx", (point) => x(point[state.axis])).attr("cy", (point) => y(point.y)).style("fill", line.color);
      }
    }
    const empty = !values.length;
    if (empty) plot.append("text").attr("class", "label").attr("x", inner.width / 2 + 40).attr("y", inner.height / 2).text("nothing to show");
    Object.assign(view, { x, y, lines, inner, plot, drawable });
    view.cursor = plot.append("g").attr("class", "cursor");
  }

  function nearest(points, axis, value) {
    const index = d3.bisector((point) => point[axis]).left(points, value);
    const [before, after] = [points[index - 1], points[index]];
    return !before ? after : !after || value - before[axis] < after[axis] - value ? before : after;
  }

  function showAt(view, px) {
    const at = view.x.invert(px);
    const found = view.lines.map((line) => ({ line, point: nearest(line.points, state.axis, at) }))
      .filter(({ point }) => point && view.drawable(point) && point[state.axis] >= view.x.domain()[0] && point[state.axis] <= view.x.domain()[1]);
    view.cursor.selectAll("*").remove();
    view.tip.hidden = !found.length;
    if (!found.length) return;
    const near = d3.scan(found, (a, b) => Math.abs(a.point[state.axis] - at) - Math.abs(b.point[state.axis] - at));
    const place = found[near].point[state.axis];
    // Lines that have no value near the place are left out.
    const close = found.filter(({ point }) => Math.abs(view.x(point[state.axis]) - view.x(place)) < 24);
    view.cursor.append("line").attr("x1", view.x(place)).attr("x2", view.x(place)).attr("y2", view.inner.height);
    for (const { line, point } of close) {
      view.cursor.append("circle").attr("r", 4).attr("cx", view.x(point[state.axis])).attr("cy", view.y(point.y)).style("fill", line.color);
    }
    const tip = d3.select(view.tip);
    tip.selectAll("*").remove();
    tip.append("div").attr("class", "place").text(`${state.axis} ${number(place)}`);
    for (const { line, point } of close.slice(0, LISTED)) {
      const row = tip.append("div");
      row.append("i").style("background", line.color);
      row.append("span").text(line.label);
      row.append("b").text(number(point.y));
    }
    if (close.length > LISTED) tip.append("div").text(`and ${close.length - LISTED} more`);
    const left = view.x(place) + MARGIN.left;
    const width = view.tip.offsetWidth, room = view.box.clientWidth;
    view.tip.style.left = `${Math.max(0, Math.min(left + 14 + width > room ? left - width - 14 : left + 14, room - width))}px`;
  }

  function leave(view) {
    view.tip.hidden = true;
    view.cursor.selectAll("*").remove();
  }

  function listen(view) {
    const node = view.svg.node();
    const position = (event) => Math.max(0, Math.min(event.clientX - node.getBoundingClientRect().left - MARGIN.left, view.inner.width));
    let start = null, area = null;
    node.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      start = position(event);
      if (event.pointerType === "touch") showAt(view, start);
    });
    node.addEventListener("pointermove", (event) => {
      const now = position(event);
      if (start !== null && (area || Math.abs(now - start) > 8)) {
        area = area ?? (node.setPointerCapture(event.pointerId), view.plot.append("rect").attr("class", "area").attr("height", view.inner.height));
        area.attr("x", Math.min(start, now)).attr("width", Math.abs(now - start));
      }
      showAt(view, now);
    });
    node.addEventListener("pointerup", (event) => {
      const now = position(event);
      if (area && Math.abs(now - start) > 8) {
        setZoom([view.x.invert(Math.min(start, now)), view.x.invert(Math.max(start, now))]);
      }
      area?.remove();
      start = area = null;
    });
    node.addEventListener("pointercancel", () => {
      area?.remove();
      start = area = null;
      leave(view);
    });
    node.addEventListener("pointerleave", () => start === null && leave(view));
    node.addEventListener("dblclick", () => setZoom(null));
  }

  const views = charts.map((chart, index) => {
    const box = d3.select(index < data.first ? root : more()).append("figure").attr("class", "chart");
    const head = box.append("figcaption");
    head.append("b").text(chart.name);
    const view = { chart, clip: `clip-${index}`, box: box.node(), kinds: head.append("span").attr("class", "kinds") };
    view.svg = box.append("svg").attr("role", "img").attr("aria-label", `${chart.name} over the training`);
    view.tip = box.append("div").attr("class", "tip").attr("hidden", true).node();
    listen(view);
    new ResizeObserver(() => draw(view)).observe(view.box);
    return view;
  });

  function more() {
    return document.getElementById("more-curves");
  }

  function drawKinds(view) {
    view.kinds.selectAll("*").remove();
    if (view.chart.kinds.length < 2) return;
    view.chart.kinds.forEach((kind, index) => {
      const key = `${view.chart.name}\n${kind}`;
      const button = view.kinds.append("button").attr("type", "button").attr("class", "chip").attr("aria-pressed", !state.hidden.has(key));
      if (state.runs.size <= 1) button.append("i").style("background", color(index));
      else button.append("i").attr("class", isDashed(view.chart, kind) ? "mark dashes" : "mark");
      button.append("span").text(kind);
      button.on("click", () => toggle(state.hidden, key));
    });
  }

  function toggle(set, key) {
    set.has(key) ? set.delete(key) : set.add(key);
    update();
  }

  function setZoom(zoom) {
    state.zoom = zoom;
    update();
  }

  function drawTools() {
    const tools = d3.select("#curve-tools");
    tools.selectAll("*").remove();
    const button = (text, pressed, act) => tools.append("button").attr("type", "button").attr("class", "chip")
      .attr("aria-pressed", pressed).text(text).on("click", act);
    button("log axis", state.log, () => { state.log = !state.log; update(); });
    button("epochs", state.axis === "epoch", () => { state.axis = state.axis === "epoch" ? "step" : "epoch"; state.zoom = null; update(); });
    for (const [text, value] of [["raw", 0], ["smooth", 0.6], ["smoother", 0.9]]) {
      button(text, state.smoothing === value, () => { state.smoothing = value; update(); });
    }
    button("whole range", state.zoom === null, () => setZoom(null));
  }

  function drawRuns() {
    const list = d3.select("#curve-runs");
    list.selectAll("*").remove();
    if (data.runs.length < 2) return;
    data.runs.forEach((run, index) => {
      const entry = list.append("span").attr("class", "run");
      const button = entry.append("button").attr("type", "button").attr("class", "chip").attr("aria-pressed", state.runs.has(index))
        .attr("title", run.note || null);
      button.append("i").style("background", color(index));
      button.append("span").text(run.name);
      button.on("click", () => toggle(state.runs, index));
    });
    const all = shownRuns().length === data.runs.length;
    list.append("button").attr("type", "button").attr("class", "chip plain").text(all ? "first run only" : "all runs")
      .on("click", () => { state.runs = new Set(all ? [0] : data.runs.map((_, index) => index)); update(); });
  }

  function update() {
    drawTools();
    drawRuns();
    for (const view of views) {
      drawKinds(view);
      draw(view);
      leave(view);
    }
  }

  for (const chart of charts) {
    for (const kind of chart.quiet) state.hidden.add(`${chart.name}\n${kind}`);
  }
  d3.select("#curve-hint").attr("hidden", null);
  update();
})();
