// Parallel coordinates: a line for each job of a sweep, which crosses an axis for each parameter and figure.
"use strict";
(() => {
  const root = document.getElementById("parallel");
  if (!root || !window.d3) return;
  const data = JSON.parse(document.getElementById("parallel-data").textContent);
  const HEIGHT = 320, MARGIN = { top: 40, right: 46, bottom: 14, left: 62 }, SPACE = 120, BRUSH = 26, LONGEST = 14;
  const rows = new Map([...document.querySelectorAll("tr[data-job]")].map((row) => [Number(row.dataset.job), row]));
  const ranges = new Map();
  const shorten = (text) => (text.length > LONGEST ? `${text.slice(0, LONGEST - 1)}…` : text);

  function scaleOf(axis) {
    const range = [HEIGHT - MARGIN.bottom, MARGIN.top];
    if (!axis.numbers) return d3.scalePoint().domain([...new Set(axis.values.filter((v) => v !== null))]).range(range).padding(0.5);
    const values = axis.values.filter((v) => v !== null);
    const [low, high] = d3.extent(values);
    if (low === high) return d3.scaleLinear().domain([low - 1, high + 1]).range(range);
    // Learning rates and such span several powers of ten.
    return (low > 0 && high / low >= 50 ? d3.scaleLog() : d3.scaleLinear()).domain([low, high]).range(range);
  }

  const axes = data.axes.map((axis) => ({ ...axis, scale: scaleOf(axis) }));
  const objective = axes.find((axis) => axis.objective);
  const isNumber = (v) => typeof v === "number";
  const [best, worst] = (() => {
    const [low, high] = objective && objective.numbers ? d3.extent(objective.values.filter(isNumber)) : [0, 1];
    return data.maximize ? [high, low] : [low, high];
  })();
  const number = d3.format(".4~g");
  // The theme of the page sets both ends.
  const tone = (job) => {
    const value = objective?.values[job];
    if (!isNumber(value)) return "var(--muted)";
    const share = best === worst ? 0 : (value - best) / (worst - best);
    return `color-mix(in oklab, var(--c1) ${(100 * Math.sqrt(share)).toFixed(1)}%, var(--c0))`;
  };

  const svg = d3.select(root).append("svg").attr("role", "img").attr("aria-label", "parameters and figures of the jobs");
  const name = d3.select("#parallel-job");
  const hint = name.text();

  function isSelected(job) {
    return [...ranges].every(([axis, [top, bottom]]) => {
      const value = axes[axis].values[job];
      const place = value === null ? NaN : axes[axis].scale(value);
      return place >= top && place <= bottom;
    });
  }

  function mark() {
    const selected = data.jobs.map((_, job) => isSelected(job));
    svg.selectAll(".job").classed("faded", (job) => !selected[job]);
    for (const [job, row] of rows) row.hidden = !selected[job];
  }

  function point(job) {
    svg.selectAll(".job").classed("pointed", (other) => other === job);
    for (const [other, row] of rows) row.classList.toggle("pointed", other === job);
    name.text(job === null ? hint : `${data.jobs[job].name}${data.jobs[job].note ? `: ${data.jobs[job].note}` : ""}`);
  }

  function draw() {
    const width = Math.max(root.clientWidth, MARGIN.left + MARGIN.right + SPACE * (axes.length - 1));
    const x = d3.scalePoint().domain(axes.map((_, index) => index)).range([MARGIN.left, width - MARGIN.right]);
    svg.attr("width", width).attr("height", HEIGHT).selectAll("*").remove();
    const line = (job) => d3.line().defined(([, y]) => y !== null && y !== undefined)(
      axes.map((axis, index) => [x(index), axis.values[job] === null ? null : axis.scale(axis.values[job])]));
    const order = data.jobs.map((_, job) => job).sort((a, b) => (a === data.best) - (b === data.best));
    svg.append("g").selectAll("path").data(order).enter().append("path").attr("d", line)
      .attr("class", (job) => (job === data.best ? "job best" : "job")).style("stroke", tone)
      .on("mouseover", point).on("mouseout", () => point(null))
      .on("click", (job) => rows.get(job)?.scrollIntoView({ block: "center", behavior: "smooth" }));
    const axis = svg.append("g").selectAll("g").data(axes).enter().append("g").attr("class", "axis")
      .attr("transform", (_, index) => `translate(${x(index)},0)`);
    axis.each(function ({ scale, numbers }) {
      const drawn = d3.axisLeft(scale);
      d3.select(this).call(numbers ? drawn.ticks(5, number) : drawn.tickFormat(shorten));
    });
    axis.append("text").attr("class", "title").attr("y", (_, index) => (index % 2 ? 14 : 26)).text((a) => shorten(a.name)).append("title").text((a) => a.name);
    axis.append("g").attr("class", "brush").each(function (_, index) {
      const brush = d3.brushY().extent([[-BRUSH / 2, MARGIN.top - 6], [BRUSH / 2, HEIGHT - MARGIN.bottom + 6]]).on("brush end", () => {
        d3.event.selection ? ranges.set(index, d3.event.selection) : ranges.delete(index);
        mark();
      });
      d3.select(this).call(brush);
      if (ranges.has(index)) d3.select(this).call(brush.move, ranges.get(index));
    });
    mark();
  }

  for (const [job, row] of rows) {
    row.addEventListener("mouseenter", () => point(job));
    row.addEventListener("mouseleave", () => point(null));
  }
  new ResizeObserver(draw).observe(root);
  draw();
})();
