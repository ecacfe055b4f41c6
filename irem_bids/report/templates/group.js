// SPDX-License-Identifier: Apache-2.0
// The group page: strip plots, one selection, a table that sorts and filters.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const PAGE = 50;
  const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];
  const methods = [...new Set(data.rows.map((row) => row[data.method]))].sort();
  const lane = data.rows.map((row) => methods.indexOf(row[data.method]));
  // A participant and session is selected, whatever the method of the point.
  const key = data.rows.map((row) => data.identity.slice(0, 4).map((i) => row[i]).join(" "));
  const names = data.rows.map((row) =>
    data.identity.slice(0, 2).map((i) => row[i]).filter((v) => v && v !== "n/a").join(" "));
  const flagged = new Map(data.metrics.map((m) => [m.column, new Set(m.outliers)]));
  const anyFlag = new Set(data.metrics.flatMap((m) => m.outliers));
  const selected = new Set();
  const plots = [];
  const show = (v) => (v === null ? "n/a" : typeof v === "number" ? String(Number(v.toPrecision(6))) : v);
  // The same place for a row in every plot and at every visit.
  const jitter = (i) => ((i * 0.6180339887) % 1) - 0.5;
  const open = (row) => data.links[row] && window.location.assign(data.links[row]);

  class Strip {
    constructor(canvas) {
      this.canvas = canvas;
      this.column = Number(canvas.dataset.column);
      this.output = canvas.parentElement.querySelector("output");
      this.rows = data.rows.map((_, i) => i).filter((i) => data.rows[i][this.column] !== null);
      this.order = [...this.rows].sort((a, b) => this.value(a) - this.value(b));
      this.at = -1;
      canvas.hidden = false;
      canvas.addEventListener("pointermove", (e) => this.hover(e));
      canvas.addEventListener("pointerdown", (e) => this.press(e));
      canvas.addEventListener("pointerup", (e) => this.release(e));
      canvas.addEventListener("dblclick", (e) => open(this.nearest(e)));
      canvas.addEventListener("keydown", (e) => this.keydown(e));
    }

    value(row) {
      return data.rows[row][this.column];
    }

    layout() {
      const width = this.canvas.clientWidth;
      const height = 26 + 34 * methods.length;
      const low = this.value(this.order[0]);
      const high = this.value(this.order[this.order.length - 1]);
      const span = high - low || 1;
      const left = methods.length > 1 ? 74 : 14;
      this.x = (v) => left + ((v - low) / span) * (width - left - 14);
      this.y = (row) => 20 + 34 * lane[row] + 22 * jitter(row);
      this.inverse = (px) => low + ((px - left) / (width - left - 14)) * span;
      return { width, height, left, low, high };
    }

    draw() {
      if (!this.canvas.clientWidth || this.canvas.closest("details:not([open])")) return;
      const { width, height, left, low, high } = this.layout();
      const ratio = window.devicePixelRatio || 1;
      this.canvas.width = width * ratio;
      this.canvas.height = height * ratio;
      this.canvas.style.height = height + "px";
      const style = getComputedStyle(document.body);
      const ink = style.color;
      const c = this.canvas.getContext("2d");
      c.scale(ratio, ratio);
      c.font = "12px sans-serif";
      c.fillStyle = ink;
      if (methods.length > 1)
        methods.forEach((name, i) => c.fillText(name, 6, 24 + 34 * i, left - 12));
      c.fillText(show(low), left, height - 4);
      c.textAlign = "right";
      c.fillText(show(high), width - 12, height - 4);
      c.textAlign = "left";
      for (const row of this.rows) this.dot(c, row, ink);
      for (const row of this.rows) if (selected.has(key[row])) this.diamond(c, row, ink);
      if (this.at >= 0) this.marker(c, this.order[this.at], ink);
      if (this.range) {
        c.strokeStyle = ink;
        const [a, b] = this.range;
        c.strokeRect(Math.min(a, b), 2, Math.abs(b - a), height - 18);
      }
    }

    dot(c, row, ink) {
      const x = this.x(this.value(row));
      const y = this.y(row);
      c.globalAlpha = this.rows.length > 300 ? 0.5 : 0.85;
      c.fillStyle = COLOURS[lane[row] % COLOURS.length];
      c.beginPath();
      c.arc(x, y, this.rows.length > 300 ? 2.2 : 3.5, 0, 7);
      c.fill();
      c.globalAlpha = 1;
      if (!flagged.get(this.column).has(row)) return;
      c.strokeStyle = ink;
      c.beginPath();
      c.arc(x, y, 6, 0, 7);
      c.stroke();
    }

    diamond(c, row, ink) {
      const x = this.x(this.value(row));
      const y = this.y(row);
      c.fillStyle = ink;
      c.beginPath();
      c.moveTo(x, y - 8);
      c.lineTo(x + 6, y);
      c.lineTo(x, y + 8);
      c.lineTo(x - 6, y);
      c.fill();
    }

    marker(c, row, ink) {
      c.strokeStyle = ink;
      c.lineWidth = 2;
      c.strokeRect(this.x(this.value(row)) - 8, this.y(row) - 8, 16, 16);
      c.lineWidth = 1;
    }

    nearest(event) {
      this.layout();
      const box = this.canvas.getBoundingClientRect();
      let best = -1;
      let least = 400;
      for (const row of this.rows) {
        const dx = this.x(this.value(row)) - (event.clientX - box.left);
        const dy = this.y(row) - (event.clientY - box.top);
        if (dx * dx + dy * dy < least) {
          least = dx * dx + dy * dy;
          best = row;
        }
      }
      return best;
    }

    tell(row) {
      const of = methods.length > 1 ? ` (${data.rows[row][data.method]})` : "";
      const flag = flagged.get(this.column).has(row) ? ", outlier" : "";
      this.output.textContent = row < 0 ? "" : `${names[row]}${of}: ${show(this.value(row))}${flag}`;
    }

    hover(event) {
      if (this.start !== undefined) {
        const now = event.clientX - this.canvas.getBoundingClientRect().left;
        this.range = Math.abs(now - this.start) > 8 ? [this.start, now] : null;
        this.draw();
        return;
      }
      const row = this.nearest(event);
      if (row >= 0) this.tell(row);
      else this.output.textContent = "";
    }

    press(event) {
      this.start = event.clientX - this.canvas.getBoundingClientRect().left;
      this.canvas.setPointerCapture(event.pointerId);
    }

    release(event) {
      const range = this.range;
      this.start = undefined;
      this.range = null;
      if (range) {
        this.layout();
        const ends = range.map((px) => this.inverse(px)).sort((a, b) => a - b);
        for (const row of this.rows)
          if (this.value(row) >= ends[0] && this.value(row) <= ends[1]) selected.add(key[row]);
        refresh();
      } else {
        const row = this.nearest(event);
        if (row >= 0) toggle(row);
      }
    }

    keydown(event) {
      const last = this.order.length - 1;
      const go = (to) => {
        this.at = Math.max(0, Math.min(last, to));
        this.tell(this.order[this.at]);
        this.draw();
      };
      const keys = {
        ArrowRight: () => go(this.at + 1),
        ArrowLeft: () => go(this.at < 0 ? last : this.at - 1),
        Home: () => go(0),
        End: () => go(last),
        Enter: () => this.at >= 0 && toggle(this.order[this.at]),
        o: () => this.at >= 0 && open(this.order[this.at]),
      };
      if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      keys[event.key]();
    }
  }

  function toggle(row) {
    if (!selected.delete(key[row])) selected.add(key[row]);
    refresh();
  }

  function refresh() {
    for (const plot of plots) plot.draw();
    const rows = data.rows.map((_, i) => i).filter((i) => selected.has(key[i]));
    const seen = new Map(rows.map((i) => [key[i], i]));
    const line = find("chosen");
    line.replaceChildren(seen.size ? `Selected (${seen.size}): ` : "Nothing is selected.");
    for (const [number, row] of [...seen.values()].slice(0, 8).entries())
      line.append(number ? ", " : "", person(row));
    if (seen.size > 8) line.append(` and ${seen.size - 8} more`);
    fill();
  }

  function person(row) {
    if (!data.links[row]) return names[row];
    const link = document.createElement("a");
    link.href = data.links[row];
    link.textContent = names[row];
    return link;
  }

  // ------------------------------------------------------------------ the table
  const sorting = { column: -1, down: false };
  let page = 0;
  let shown = [];

  function columns() {
    if (find("all-columns").checked) return data.columns.map((_, i) => i);
    return data.shown;
  }

  function tests() {
    return find("filter").value.split(/\s+/).filter(Boolean).map((word) => {
      const match = /^([^<>]+)([<>])(-?[\d.]+(?:e-?\d+)?)$/i.exec(word);
      const column = match ? data.columns.findIndex((c) => c.name === match[1]) : -1;
      if (column >= 0) {
        const limit = Number(match[3]);
        const below = match[2] === "<";
        return (row) => row[column] !== null && (below ? row[column] < limit : row[column] > limit);
      }
      const text = word.toLowerCase();
      return (row) => data.identity.some((i) => String(row[i]).toLowerCase().includes(text));
    });
  }

  function choose() {
    const all = tests();
    shown = data.rows.map((_, i) => i).filter(
      (i) =>
        all.every((test) => test(data.rows[i])) &&
        (!find("only-selected").checked || selected.has(key[i])) &&
        (!find("only-outliers").checked || anyFlag.has(i)),
    );
    if (sorting.column < 0) return;
    const sign = sorting.down ? -1 : 1;
    const compare = new Intl.Collator("en", { numeric: true }).compare;
    shown.sort((a, b) => {
      const [p, q] = [data.rows[a][sorting.column], data.rows[b][sorting.column]];
      if (p === null || q === null) return (p === null) - (q === null);
      return sign * (typeof p === "number" && typeof q === "number" ? p - q : compare(p, q));
    });
  }

  function heading() {
    const line = document.createElement("tr");
    line.append(cell("th", "selected"));
    for (const i of columns()) {
      const th = cell("th", "");
      const button = document.createElement("button");
      const here = sorting.column === i;
      button.textContent = data.columns[i].name + (here ? (sorting.down ? " ▼" : " ▲") : "");
      button.title = data.columns[i].description + (data.columns[i].unit ? `, ${data.columns[i].unit}` : "");
      button.addEventListener("click", () => {
        sorting.down = here && !sorting.down;
        sorting.column = i;
        page = 0;
        fill();
        find("rows").querySelectorAll("thead button")[columns().indexOf(i)].focus();
      });
      th.scope = "col";
      if (here) th.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
      th.append(button);
      line.append(th);
    }
    line.firstChild.scope = "col";
    find("rows").tHead.replaceChildren(line);
  }

  function cell(kind, text) {
    const made = document.createElement(kind);
    made.textContent = text;
    return made;
  }

  function fill() {
    choose();
    heading();
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    page = Math.max(0, Math.min(page, pages - 1));
    const body = document.createDocumentFragment();
    for (const row of shown.slice(page * PAGE, (page + 1) * PAGE)) body.append(line(row));
    find("rows").tBodies[0].replaceChildren(body);
    find("count").textContent = `${shown.length} of ${data.rows.length} rows`;
    find("page").textContent = `page ${page + 1} of ${pages}`;
    find("back").disabled = page === 0;
    find("forth").disabled = page === pages - 1;
  }

  function line(row) {
    const tr = document.createElement("tr");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = selected.has(key[row]);
    box.setAttribute("aria-label", `select ${names[row]}`);
    box.addEventListener("change", () => {
      toggle(row);
      const again = find("rows").querySelector(`tr[data-row="${row}"] input`);
      if (again) again.focus();
    });
    tr.dataset.row = row;
    tr.classList.toggle("selected", box.checked);
    tr.append(cell("td", ""));
    tr.firstChild.append(box);
    for (const [place, i] of columns().entries()) {
      const value = data.rows[row][i];
      const made = cell(place ? "td" : "th", place ? show(value) : "");
      if (!place) {
        made.scope = "row";
        const link = person(row);
        made.append(link);
        if (link.href) link.textContent = show(value);
      }
      if (typeof value === "number") made.className = "number";
      if (flagged.has(i) && flagged.get(i).has(row)) {
        const flag = cell("span", " outlier");
        flag.className = "flag";
        made.append(flag);
      }
      tr.append(made);
    }
    return tr;
  }

  function save() {
    const cells = (row) => data.columns.map((_, i) => show(data.rows[row][i]).replace(/\s+/g, " "));
    const lines = [data.columns.map((c) => c.name), ...shown.map(cells)].map((v) => v.join("\t"));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/tab-separated-values" }));
    link.download = "group_rows.tsv";
    link.click();
    URL.revokeObjectURL(link.href);
  }

  for (const hidden of document.querySelectorAll(".filters, .pager, #filter-help")) hidden.hidden = false;
  const again = () => {
    page = 0;
    fill();
  };
  document.querySelector(".filters").addEventListener("submit", (e) => e.preventDefault());
  find("filter").addEventListener("input", again);
  for (const id of ["only-selected", "only-outliers", "all-columns"]) find(id).addEventListener("change", again);
  find("clear").addEventListener("click", () => {
    selected.clear();
    refresh();
  });
  find("save").addEventListener("click", save);
  find("back").addEventListener("click", () => {
    page -= 1;
    fill();
  });
  find("forth").addEventListener("click", () => {
    page += 1;
    fill();
  });
  for (const canvas of document.querySelectorAll(".strip canvas")) plots.push(new Strip(canvas));
  const drawAll = () => plots.forEach((plot) => plot.draw());
  window.addEventListener("resize", drawAll);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  if (find("more-plots")) find("more-plots").addEventListener("toggle", drawAll);
  drawAll();
  fill();
})();
