"use strict";
const root = document.documentElement, wants = matchMedia("(prefers-color-scheme: dark)");
const data = JSON.parse(document.getElementById("data").textContent), drawn = data.figures;
const body = document.querySelector("#results tbody"), rows = body ? [...body.rows] : [];
const filters = [...document.querySelectorAll("[data-filter]")], find = document.getElementById("find");
function filter() {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const fits = filters.every(f => !f.value || row.getAttribute("data-of-" + f.dataset.filter) === f.value)
      && words.every(word => row.dataset.text.toLowerCase().includes(word));
    row.hidden = !fits;
    shown += fits;
  }
  refilter();
  document.getElementById("count").textContent = shown === rows.length ? `${shown} ${shown === 1 ? "row" : "rows"}` : `${shown} of ${rows.length} rows`;
}
if (body) {
  filters.forEach(f => f.addEventListener("change", filter));
  find.addEventListener("input", filter);
  document.querySelectorAll("#results thead th").forEach((th, column) => {
    th.firstElementChild.addEventListener("click", () => {
      const down = th.getAttribute("aria-sort") === "ascending", number = th.dataset.kind === "number";
      document.querySelectorAll("#results th[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => row.cells[column].dataset.key;
      rows.sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === "" || y === "" || x === "nan" || y === "nan") return (x === "" || x === "nan") - (y === "" || y === "nan");
        const order = number ? x - y : x.localeCompare(y, undefined, { numeric: true });
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
}
// Which row to take: the least costly of those that are good enough and within every budget.
function perplexity(value) { return value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 }); }  // as harness/results/numbers.py
const above = document.getElementById("above"), least = document.getElementById("least"), budgets = [...document.querySelectorAll("[data-budget]")];
function choose() {
  const known = data.rows.filter(row => row.perplexity), lowest = Math.min(...known.map(row => row.perplexity[0])), by = least.value;
  const fit = known.filter(row => row.costs[by] !== undefined
    && (above.value === "" || (above.value === "tie" ? row.tie : row.perplexity[0] <= lowest * (1 + above.value / 100)))
    && budgets.every(box => box.value === "" || row.costs[box.dataset.budget] <= box.value * box.dataset.unit));
  fit.sort((a, b) => a.costs[by] - b.costs[by] || a.perplexity[0] - b.perplexity[0]);
  const said = document.getElementById("chosen");
  if (!fit.length) { said.textContent = "No row is that good within these budgets."; return; }
  const row = fit[0], name = document.createElement("strong");
  name.textContent = row.name;
  said.replaceChildren("Take ", name, `: test perplexity ${perplexity(row.perplexity[0])}, ${row.perplexity[0] === lowest ? "the lowest" : `${perplexity(row.perplexity[0] / lowest)} times the lowest`}; ${row.spent.join(", ")}.`);
}
if (above) { [above, least, ...budgets].forEach(box => ["input", "change"].forEach(event => box.addEventListener(event, choose))); choose(); }
function narrow() { return innerWidth < 600; }
function isDark() { return root.dataset.theme ? root.dataset.theme === "dark" : wants.matches; }
function look(figure) {
  const style = getComputedStyle(root), ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
  return { ...figure.layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12 },
    margin: { l: 60, r: 12, t: 8, b: 44 }, xaxis: { ...figure.layout.xaxis, ...axis }, yaxis: { ...figure.layout.yaxis, ...axis },
    legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom", traceorder: "normal", maxheight: 0.3, font: { size: narrow() ? 10 : 11 } } };
}
// What is hidden in the table is hidden in the figures, and a front is one of what is left.
function plainText(markup) { return new DOMParser().parseFromString(markup, "text/html").body.textContent; }
function hiddenNames() { return new Set(rows.filter(row => row.hidden).map(row => row.dataset.name)); }
function without(trace, hidden) {
  const bar = trace.orientation === "h" || trace.meta === "ink", names = bar ? trace.y : trace.text;
  if (!hidden.size || trace.type === "heatmap" || names === undefined) return trace;
  if (typeof names === "string") return hidden.has(plainText(names)) ? null : trace;
  const kept = names.map((name, i) => hidden.has(plainText(name)) ? -1 : i).filter(i => i >= 0);
  if (!kept.length) return null;
  const of = values => Array.isArray(values) ? kept.map(i => values[i]) : values, found = { ...trace, x: of(trace.x), y: of(trace.y), text: of(trace.text) };
  if (trace.error_y) found.error_y = { ...trace.error_y, array: of(trace.error_y.array), arrayminus: of(trace.error_y.arrayminus) };
  return found;
}
function front(points) {  // of [x, y, name]: no other has both smaller
  const found = [];
  for (const point of [...points].sort((a, b) => a[0] - b[0] || a[1] - b[1])) if (!found.length || point[1] < found[found.length - 1][1]) found.push(point);
  return found;
}
function shownTraces(figure) {
  const hidden = hiddenNames(), gone = new Set(), traces = [];
  for (const trace of figure.data) {
    const left = without(trace, hidden);
    if (left === null) gone.add(trace.legendgroup); else traces.push(left);
  }
  const points = traces.filter(t => t.meta === "rows").flatMap(t => t.x.map((x, i) => [x, t.y[i], Array.isArray(t.text) ? t.text[i] : t.text])).filter(p => p[1] !== null);
  return traces.filter(t => t.text !== undefined || !gone.has(t.legendgroup)).map(t => {
    if (t.meta !== "front" || !hidden.size) return t;
    const ends = front(points);
    return { ...t, x: ends.map(p => p[0]), y: ends.map(p => p[1]), text: ends.map(p => p[2]) };
  });
}
// What hovering over a point says: the row's own numbers.
const known = new Map(data.rows.map(row => [row.name, row]));
function markup(text) { return text.replace(/&/g, "&amp;").replace(/</g, "&lt;"); }
function told(name) {
  const row = known.get(name);
  return row ? row.told.map(markup).join("<br>") : "";
}
function hovers(trace) {
  if (trace.type !== "scatter" || trace.text === undefined || trace.hoverinfo === "skip" || trace.meta === "ink") return trace;
  const names = Array.isArray(trace.text) ? trace.text : trace.x.map(() => trace.text);
  return { ...trace, customdata: names.map(name => told(plainText(name))), hovertemplate: trace.hovertemplate.replace("<extra>", "<br>%{customdata}<extra>"), hoverlabel: { align: "left" } };
}
// The line under the pointer, or under its name in the legend, stands out.
function single(box, group) {
  box.querySelectorAll(".scatterlayer .trace").forEach(node => {
    const trace = node.__data__ && node.__data__[0] && node.__data__[0].trace;
    node.style.opacity = group === null || (trace && trace.legendgroup === group) ? "" : "0.15";
  });
}
function highlights(box) {
  if (box.data.filter(trace => /lines/.test(trace.mode || "")).length < 3) return;
  for (const event of ["plotly_hover", "plotly_unhover"]) box.removeAllListeners(event);
  box.on("plotly_hover", event => single(box, event.points[0].fullData.legendgroup));
  box.on("plotly_unhover", () => single(box, null));
  box.querySelectorAll(".legend .traces").forEach(entry => {
    const group = () => entry.__data__ && entry.__data__[0] ? entry.__data__[0].trace.legendgroup : null;
    entry.addEventListener("mouseenter", () => single(box, group()));
    entry.addEventListener("mouseleave", () => single(box, null));
  });
}
const boxes = [...document.querySelectorAll("[data-figure]")], there = new Set();
function refilter() { if (typeof Plotly !== "undefined" && there) [...there].forEach(draw); explore(); }
function draw(box) {
  const ink = getComputedStyle(root).getPropertyValue("--ink").trim(), figure = drawn[box.dataset.figure];
  const data = shownTraces(figure).map(t => hovers(t.meta === "ink" ? { ...t, marker: { ...t.marker, color: ink, line: { ...t.marker.line, color: ink } } } : t));
  const layout = look(figure);
  if (layout.barmode === "stack" && data.length && data[0].orientation === "h") { if (narrow()) layout.xaxis = { ...layout.xaxis, nticks: 2 }; layout.yaxis = { ...layout.yaxis, range: [data[0].y.length - 0.4, -0.6] }; layout.height = 150 + 24 * data[0].y.length; box.style.height = `${layout.height}px`; }
  const entries = data.filter(t => t.showlegend !== false).length;
  if (layout.showlegend && narrow() && entries > 4 && entries <= 16) { layout.height = figure.layout.height + 19 * (entries - 4); layout.legend.maxheight = 0.7; box.style.height = `${layout.height}px`; }  // every name, a line each
  if (box.closest(".hero") && narrow()) layout.showlegend = false;  // its points have their names beside them
  Plotly.react(box, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  there.add(box);
  highlights(box);
  if (box.closest(".hero")) { delete box.dataset.named; label(box); ["plotly_autosize", "plotly_restyle"].forEach(event => { box.removeAllListeners(event); box.on(event, () => label(box)); }); }
}
// Names beside the points of the first figure, the best first, where they cover nothing.
const canvas = document.createElement("canvas").getContext("2d");
function label(box) {
  const { xaxis, yaxis } = box._fullLayout, own = drawn[box.dataset.figure].layout.annotations, points = [], taken = [];
  canvas.font = "11px system-ui, sans-serif";
  for (const { x, y, yanchor, text } of own) {
    const wide = canvas.measureText(text).width, at = yaxis.r2p(y), left = x ? xaxis._length - wide : 0;
    taken.push([left, at - (yanchor === "bottom" ? 16 : 0), left + wide, at + (yanchor === "bottom" ? 0 : 16)]);
  }
  for (const trace of box.data) if (trace.meta === "rows" && trace.visible !== "legendonly") {
    const line = box.dataset.figure.startsWith("swept-") && trace.mode.includes("lines"), spots = [];  // whose axis says what tells its points apart
    trace.x.forEach((x, i) => { if (trace.y[i] !== null) spots.push({ text: Array.isArray(trace.text) ? trace.text[i] : trace.text, x: xaxis.d2p(x), y: yaxis.d2p(trace.y[i]) }); });
    spots.forEach(({ x, y }) => taken.push([x - 8, y - 8, x + 8, y + 8]));
    // A line has one name, which the legend says where there is one; else it stands at its right end.
    const named = !line ? spots : box._fullLayout.showlegend || !spots.length ? [] : [{ ...spots[spots.length - 1], text: trace.name, line, falls: spots.length > 1 && spots[spots.length - 2].y < spots[spots.length - 1].y }];
    for (const spot of named) points.push({ ...spot, wide: canvas.measureText(new DOMParser().parseFromString(spot.text, "text/html").body.textContent).width + 4 });
  }
  const named = [];
  for (const p of points.sort((a, b) => b.y - a.y)) {
    for (const [x, y] of p.line ? [[p.x - p.wide + 8, p.y + (p.falls ? 11 : -26)], [p.x - p.wide + 8, p.y + (p.falls ? -26 : 11)]] : [[p.x + 12, p.y - 8], [p.x - 12 - p.wide, p.y - 8], [p.x + 9, p.y - 23], [p.x - 9 - p.wide, p.y + 8], [p.x + 9, p.y + 8], [p.x - 9 - p.wide, p.y - 23]]) {
      const room = [x, y, x + p.wide, y + 15];
      if (x < 0 || y < 0 || room[2] > xaxis._length || room[3] > yaxis._length || taken.some(t => t[0] < room[2] && t[2] > room[0] && t[1] < room[3] && t[3] > room[1])) continue;
      taken.push(room);
      named.push({ text: p.text, showarrow: false, xref: "paper", yref: "paper", x: x / xaxis._length, y: 1 - y / yaxis._length, xanchor: "left", yanchor: "top", borderpad: 0, font: { size: 11 } });
      break;
    }
  }
  // What has been said is not said again: a change of the layout asks for the names anew.
  const said = JSON.stringify(named);
  if (said === box.dataset.named) return;
  box.dataset.named = said;
  Plotly.relayout(box, { annotations: [...own, ...named] });
}
// One figure at a time: first those that come into view, then the others while nobody scrolls.
const coming = new Set();
let asked = false, scrolled = -1e9;
function next() {
  asked = false;
  const resting = performance.now() - scrolled > 400;
  const box = coming.values().next().value || (resting && boxes.find(box => !there.has(box)));
  if (box) { coming.delete(box); draw(box); }
  ask();
}
function ask() {
  if (asked || there.size === boxes.length) return;
  asked = true;
  if (coming.size) requestAnimationFrame(() => setTimeout(next)); else setTimeout(next, 100);
}
const watcher = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) if (isIntersecting && !there.has(target)) coming.add(target); else coming.delete(target);
  ask();
}, { rootMargin: "50% 0%" });
boxes.forEach(box => watcher.observe(box));
addEventListener("scroll", () => { scrolled = performance.now(); }, { passive: true });
addEventListener("beforeprint", () => boxes.filter(box => !there.has(box)).forEach(draw));
document.getElementById("theme").addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; [...there].forEach(draw); });
wants.addEventListener("change", () => [...there].forEach(draw));
// Two rows that are chosen: their paired difference.
const pairs = new Map(data.pairs.map(([a, b, ...rest]) => [`${a},${b}`, rest]));
const panel = document.getElementById("pair");
let picked = [];
function pick(row) {
  picked = picked.includes(row) ? picked.filter(other => other !== row) : [...picked, row].slice(-2);
  rows.forEach(other => { other.classList.toggle("picked", picked.includes(other)); other.setAttribute("aria-selected", picked.includes(other)); });
  panel.hidden = !picked.length;
  if (picked.length) panel.textContent = picked.length < 2 ? `${row.dataset.name || ""}: choose a second row to compare it with` : compared(picked[0].dataset.name, picked[1].dataset.name);
}
function compared(one, other) {
  const place = name => data.rows.findIndex(row => row.name === name), a = place(one), b = place(other);
  const found = pairs.get(`${a},${b}`), turned = pairs.get(`${b},${a}`);
  if (!found && !turned) return `${one} and ${other}: there is no paired test of them (${data.rows[a].apart || data.rows[b].apart ? "they were not evaluated alike" : "one has no test perplexity, or no seed in common"})`;
  let [difference, low, high, p, adjusted] = found || turned;
  if (!found) [difference, low, high] = [-difference, high === null ? null : -high, low === null ? null : -low];
  const ratio = value => Math.exp(value).toLocaleString("en", { maximumSignificantDigits: 4 });
  const interval = low === null ? "no interval" : `95 % ${ratio(low)} to ${ratio(high)}`;
  const verdict = adjusted === null ? "not tested" : adjusted < 0.05 ? (difference < 0 ? "significantly lower" : "significantly higher") : "not told apart";
  const value = p => p === null ? "none" : p < 0.0001 ? "<0.0001" : String(Number(p.toPrecision(2)));
  return `${one} has ${ratio(difference)} times the test perplexity of ${other} (${interval}; ${difference.toFixed(4)} nats per token): ${verdict}, p ${value(p)}, by Holm over all pairs ${value(adjusted)}`;
}
rows.forEach(row => {
  row.tabIndex = 0;
  row.addEventListener("click", event => { if (!event.target.closest("a, summary, details")) pick(row); });
  row.addEventListener("keydown", event => { if (event.target === row && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); pick(row); } });
});
// Which columns are shown, and what is shown as text for elsewhere.
const hiddenColumns = new Set(), rules = document.head.appendChild(document.createElement("style"));
function columnsShown() {
  rules.textContent = [...hiddenColumns].map(i => `#results tr > :nth-child(${i + 1}) { display: none; }`).join(" ");
}
if (narrow()) document.querySelectorAll("#results thead th").forEach((th, i) => {  // room for what differs
  if (!("alike" in th.dataset)) return;
  hiddenColumns.add(i);
  document.querySelectorAll("#columns input")[i].checked = false;
});
columnsShown();
document.querySelectorAll("#columns input").forEach((box, i) => box.addEventListener("change", () => { hiddenColumns[box.checked ? "delete" : "add"](i); columnsShown(); }));
function shownCells() {
  const kept = cells => [...cells].filter((_, i) => !hiddenColumns.has(i));
  const heads = kept(document.querySelectorAll("#results thead th")).map(th => th.firstElementChild.textContent);
  const lines = [...body.rows].filter(row => !row.hidden).map(row => kept(row.cells).map(cell => cell.classList.contains("runs") ? cell.querySelector("a, summary").textContent : cell.textContent));
  return [heads, lines];
}
const forms = {
  CSV: (heads, lines) => [heads, ...lines].map(line => line.map(text => /[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text).join(",")).join("\n") + "\n",
  Markdown: (heads, lines) => [heads, heads.map(() => "---"), ...lines].map(line => `| ${line.map(text => text.replace(/\|/g, "\\|")).join(" | ")} |`).join("\n") + "\n",
  LaTeX: (heads, lines) => {
    const tex = text => text.replace(/[\\&%$#_{}~^]/g, c => ({ "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}" })[c] || `\\${c}`).replace(/–/g, "--");
    const side = heads.map((_, i) => lines.every(line => /^[-–\d.,~* ]*$/.test(line[i])) ? "r" : "l").join("");
    return ["% needs \\usepackage{booktabs}", `\\begin{tabular}{${side}}`, "\\toprule", `${heads.map(tex).join(" & ")} \\\\`, "\\midrule", ...lines.map(line => `${line.map(tex).join(" & ")} \\\\`), "\\bottomrule", "\\end{tabular}", ""].join("\n");
  },
};
document.querySelectorAll("[data-copy]").forEach(button => button.addEventListener("click", async () => {
  const text = forms[button.dataset.copy](...shownCells());
  try { await navigator.clipboard.writeText(text); } catch {
    const area = document.body.appendChild(document.createElement("textarea"));
    area.value = text; area.select(); document.execCommand("copy"); area.remove();
  }
  button.dataset.copied = text;
  document.getElementById("copied").textContent = `${button.dataset.copy} copied`;
}));
// A scatter whose axes are chosen, with the front of what is shown.
const plot = document.getElementById("explore"), across = document.getElementById("across"), upwards = document.getElementById("upwards");
function explore() {
  if (!plot || typeof Plotly === "undefined" || !plot.dataset.open) return;
  const hidden = hiddenNames(), x = across.value, y = upwards.value;
  const points = data.rows.filter(row => !row.apart && !hidden.has(row.name) && Number.isFinite(row.values[x]) && Number.isFinite(row.values[y]));
  const scale = key => key.endsWith("bytes") ? 2 ** 20 : 1, family = row => [row.values["method.label"], row.values["method.targets"]].filter(Boolean).join(" ");
  const title = select => markup(select.selectedOptions[0].textContent);
  // A method has its colour of the other figures; what shares one is told apart by its mark.
  const marks = new Map();
  const traces = [...new Set(points.map(family))].map((name, i) => {
    const own = points.filter(row => family(row) === name), color = own[0].color, symbol = marks.get(color) || 0;
    marks.set(color, symbol + 1);
    const values = row => [[across, x], [upwards, y]].map(([select, key]) => `${title(select)}: ${row.shown[key]}`);
    return { type: "scatter", mode: "markers", name: markup(name), legendgroup: String(i), meta: "rows", x: own.map(row => row.values[x] / scale(x)), y: own.map(row => row.values[y] / scale(y)), text: own.map(row => markup(row.name)), customdata: own.map(row => [...values(row), ...row.told.map(markup)].join("<br>")), hovertemplate: "<b>%{text}</b><br>%{customdata}<extra></extra>", hoverlabel: { align: "left" }, marker: { size: 9, color, symbol: symbol % 8 } };
  });
  const better = data.lower[y] ? 1 : -1, cheap = data.lower[x] ? 1 : -1;
  const ends = front(points.map(row => [cheap * row.values[x], better * row.values[y], row.name]));
  if (ends.length > 1) traces.push({ type: "scatter", mode: "lines", name: "best for its cost", x: ends.map(p => cheap * p[0] / scale(x)), y: ends.map(p => better * p[1] / scale(y)), line: { color: "#808080", dash: "dash", width: 1.5 }, hoverinfo: "skip" });
  const wide = key => { const values = points.map(row => row.values[key]); return Math.min(...values) > 0 && Math.max(...values) > 8 * Math.min(...values); };
  const axis = (key, select) => ({ title: { text: title(select) }, type: wide(key) ? "log" : "linear", automargin: true, tickangle: 0, ...(wide(key) ? { dtick: 1, exponentformat: "power" } : { nticks: narrow() ? 4 : 8, separatethousands: true }) });
  Plotly.react(plot, traces, look({ layout: { xaxis: axis(x, across), yaxis: axis(y, upwards), height: 440, hovermode: "closest", showlegend: true } }), { responsive: true, displaylogo: false, displayModeBar: false });
}
if (plot) {
  [across, upwards].forEach(select => select.addEventListener("change", explore));
  new IntersectionObserver(entries => { if (entries.some(entry => entry.isIntersecting) && !plot.dataset.open) { plot.dataset.open = "1"; explore(); } }, { rootMargin: "50% 0%" }).observe(plot);
}
document.getElementById("theme").addEventListener("click", explore);
wants.addEventListener("change", explore);
if (body) filter();
