// What the pages do with the data that the harness computed: draw, filter, and lay side by side.
"use strict";

const conform = (() => {
  const root = document.documentElement.dataset.root;
  const received = {};
  const waiting = {};
  const drawn = new Map();

  // Data comes as scripts that call this: a page from disk may load a script, but not fetch.
  function receive(name, content) {
    received[name] = content;
    for (const done of waiting[name] || []) done(content);
    delete waiting[name];
  }

  function load(name) {
    if (name in received) return Promise.resolve(received[name]);
    return new Promise((done, failed) => {
      (waiting[name] = waiting[name] || []).push(done);
      const script = document.createElement("script");
      script.src = `${root}data/${name}.js`;
      script.onerror = () => failed(new Error(`${name}.js is missing`));
      document.head.append(script);
    });
  }

  const by = (id) => document.getElementById(id);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = (value) => (typeof value === "number" ? String(Number(value.toPrecision(4))) : value ?? "–");

  function config() {
    const [text, soft, line] = ["--text", "--soft", "--line"].map(colour);
    const words = { labelColor: text, titleColor: text, domainColor: soft, tickColor: soft, gridColor: line };
    return {
      background: "transparent", axis: words, legend: words, header: words,
      view: { stroke: line }, font: "system-ui, sans-serif", title: { color: text },
    };
  }

  // A chart, and behind it the same rows as a table.
  async function draw(id, spec, rows, columns) {
    const figure = by(id);
    if (!figure) return;
    drawn.set(id, [spec, rows, columns]);
    const plot = figure.querySelector(".plot");
    const full = { ...(await load("charts"))[spec], datasets: { rows }, config: config() };
    const options = { actions: false, renderer: "svg", mode: "vega-lite", logLevel: vega.Error };
    await vegaEmbed(plot, full, options);
    // A reader that cannot see hears what is drawn; the numbers are in the table.
    const image = plot.querySelector("svg");
    for (const part of image.querySelectorAll("[role]")) {
      for (const name of ["role", "aria-roledescription", "aria-label"]) part.removeAttribute(name);
    }
    image.setAttribute("role", "img");
    image.setAttribute("aria-label", figure.querySelector("figcaption").textContent);
    table(figure.querySelector("details .wide"), columns, rows);
    figure.dataset.drawn = String(rows.length);
  }

  function table(place, columns, rows) {
    const made = document.createElement("table");
    const head = made.createTHead().insertRow();
    for (const column of columns) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = column;
      head.append(cell);
    }
    const body = made.createTBody();
    for (const row of rows) {
      const line = body.insertRow();
      for (const column of columns) {
        const cell = line.insertCell();
        if (typeof row[column] === "number") cell.className = "figure";
        cell.textContent = number(row[column]);
      }
    }
    place.replaceChildren(made);
  }

  const within = (tap, layer) => (layer === null ? tap : tap.split(`.${layer}.`).pop());

  function taps(run, mode) {
    return run.taps.filter((tap) => tap[0] === mode && tap[1] !== null).map((tap) => ({
      mode: tap[0], layer: tap[1], tap: within(tap[2], tap[1]), of_limit: tap[3], verdict: tap[4],
      statistic: tap[5], relative_error: tap[6], case: tap[7],
    }));
  }

  // -- pages ------------------------------------------------------------------------------------

  function overview() {
    const filters = ["target", "dtype", "state", "text"].map((name) => by(`by-${name}`));
    function apply() {
      const [target, dtype, state, text] = filters.map((one) => one.value.trim());
      const wanted = (item) =>
        (!target || item.dataset.target === target) && (!dtype || item.dataset.dtype === dtype);
      const right = (item) => wanted(item) && (!state || item.dataset.state === state);
      let cells = 0;
      for (const head of document.querySelectorAll(".cells thead th[data-target]")) head.hidden = !wanted(head);
      for (const row of document.querySelectorAll(".cells tbody tr")) {
        const named = row.dataset.text.includes(text);
        let some = 0;
        for (const cell of row.querySelectorAll("td")) {
          cell.hidden = !wanted(cell);
          // A column stays in place; what has another state leaves an empty cell in it.
          const match = named && right(cell);
          cell.firstElementChild.hidden = !match;
          some += match;
        }
        row.hidden = !some;
        cells += some;
      }
      let runs = 0;
      for (const row of document.querySelectorAll(".runs tbody tr")) {
        row.hidden = !(right(row) && row.textContent.includes(text));
        runs += !row.hidden;
      }
      by("shown").textContent = `${cells} cells, ${runs} runs`;
    }
    for (const one of filters) one.addEventListener("input", apply);
    by("filters").addEventListener("submit", (event) => event.preventDefault());
    apply();
  }

  async function run() {
    const name = Object.keys(received).find((key) => key.startsWith("run-"));
    const found = received[name];
    const rows = [...taps(found, "free-running"), ...taps(found, "teacher-forced")];
    await draw("heat", "heat", rows, ["mode", "layer", "tap", "of_limit", "verdict", "statistic", "relative_error", "case"]);
    const slopes = found.slopes.map(([head, expected, measured]) => ({ head, expected, measured }));
    await draw("slopes", "slopes", slopes, ["head", "expected", "measured"]);
    const curve = found.positions.flatMap(([name, points]) =>
      points.map(([position, kl]) => ({ case: name, position, kl })));
    await draw("positions", "positions", curve, ["case", "position", "kl"]);
  }

  function options(select, texts, kept) {
    select.replaceChildren(...texts.map((text, at) => new Option(text, String(at))));
    const found = texts.indexOf(kept);
    select.value = String(Math.max(found, 0));
  }

  async function trend() {
    const [cell, series, tap] = ["cell", "series", "tap"].map(by);
    const asked = new URLSearchParams(location.hash.slice(1)).get("cell");
    if (asked !== null) cell.value = asked;
    if (!cell.value) return;
    const chosen = (select) => select.selectedOptions[0]?.textContent;
    async function reload(first) {
      const about = await load(`cell-${cell.value}`);
      const names = about.series.map(([mode, metric]) => `${mode} ${metric}`);
      options(series, names, first ? "free-running of_limit" : chosen(series));
      await retap();
    }
    async function retap() {
      const about = await load(`cell-${cell.value}`);
      options(tap, about.series[series.value][2], chosen(tap) || "logits");
      await redraw();
    }
    async function redraw() {
      const about = await load(`cell-${cell.value}`);
      const [mode, metric] = about.series[series.value];
      const data = await load(`trend-${cell.value}-${mode}-${metric}`);
      const name = chosen(tap);
      const one = received.index[cell.value];
      const marks = {};
      if (about.anchor !== null) marks[about.anchor] = "anchor";
      for (const [at, names] of about.alarms) {
        if (names.includes(`${mode} ${name}`) || names.includes(`${mode} mean`)) {
          marks[at] = [marks[at], "drift alarm"].filter(Boolean).join(", ");
        }
      }
      const rows = data.values[name].map((value, at) => ({
        at, run: one.runs[at], commit: one.commits[at], verdict: one.verdicts[at],
        value, baseline: data.baselines[name][at], mark: marks[at] || "",
      }));
      await draw("trend", "trend", rows, ["at", "run", "commit", "verdict", "value", "baseline", "mark"]);
    }
    cell.addEventListener("change", () => reload(false));
    series.addEventListener("change", retap);
    tap.addEventListener("change", redraw);
    await reload(true);
  }

  async function compare() {
    const [a, b, mode] = ["run-a", "run-b", "mode"].map(by);
    if (!a.value) return;
    const asked = new URLSearchParams(location.hash.slice(1));
    const cell = received.index[0];
    a.value = asked.get("a") || cell.runs[0];
    b.value = asked.get("b") || cell.runs[cell.runs.length - 1];
    async function redraw() {
      const pair = await Promise.all([load(`run-${a.value}`), load(`run-${b.value}`)]);
      history.replaceState(null, "", `#a=${a.value}&b=${b.value}`);
      const names = [`a: ${a.value}`, `b: ${b.value}`];
      const rows = pair.flatMap((one, at) => taps(one, mode.value).map((row) => ({ run: names[at], ...row })));
      await draw("compare", "compare", rows, ["run", "layer", "tap", "of_limit", "verdict", "statistic", "case"]);
      const keys = [...new Set(pair.flatMap((one) => Object.keys(one.about)))];
      const differing = keys.filter((key) => pair[0].about[key] !== pair[1].about[key]);
      const what = [["verdict", pair[0].verdict, pair[1].verdict]];
      for (const key of differing) what.push([key, pair[0].about[key], pair[1].about[key]]);
      table(by("difference"), ["what", "a", "b"], what.map(([key, x, y]) => ({ what: key, a: x || "–", b: y || "–" })));
      by("summary").textContent = `a ${pair[0].verdict}, b ${pair[1].verdict}; ${differing.length} properties differ`;
    }
    for (const one of [a, b, mode]) one.addEventListener("change", redraw);
    by("swap").addEventListener("click", () => {
      [a.value, b.value] = [b.value, a.value];
      redraw();
    });
    await redraw();
  }

  async function certificate() {
    const every = await load("certificates");
    for (const [at, one] of every.entries()) {
      await draw(`kill-${at}`, "kill", one.kill, ["area", "caught", "of", "percent"]);
      await draw(`rivals-${at}`, "rivals", one.rivals, ["rule", "kind", "count", "of", "percent"]);
    }
  }

  const pages = { overview, run, trend, compare, certificate };
  document.addEventListener("DOMContentLoaded", async () => {
    await pages[document.body.dataset.page]();
    document.body.dataset.ready = "yes";
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", async () => {
    for (const [id, rest] of [...drawn]) await draw(id, ...rest);
  });
  return { receive, load };
})();
