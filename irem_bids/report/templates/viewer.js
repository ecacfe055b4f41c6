// SPDX-License-Identifier: Apache-2.0
// The viewer: three linked planes over every method and stack, from pictures in the page.
"use strict";
(() => {
  const PLANES = {
    axial: { col: 0, row: 1, normal: 2, edges: ["R", "L", "A", "P"] },
    coronal: { col: 0, row: 2, normal: 1, edges: ["R", "L", "S", "I"] },
    sagittal: { col: 1, row: 2, normal: 0, edges: ["A", "P", "S", "I"] },
  };
  const numbers = (text) => text.split(" ").map(Number);
  const short = (value) => String(Number(value.toPrecision(3)));

  // 256 colours, red, green and blue each: between "#rrggbb #rrggbb ...", or grey.
  function palette(text) {
    const stops = (text || "#000000 #ffffff").split(" ").map((colour) =>
      [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)));
    const table = new Uint8ClampedArray(768);
    for (let i = 0; i < 256; i++) {
      const place = (i / 255) * (stops.length - 1);
      const below = Math.min(Math.floor(place), stops.length - 2);
      for (let c = 0; c < 3; c++)
        table[3 * i + c] = stops[below][c] + (place - below) * (stops[below + 1][c] - stops[below][c]);
    }
    return table;
  }

  async function decode(holder, shape) {
    const picture = new Image();
    picture.src = "data:image/webp;base64," + holder.dataset.image;
    await picture.decode();
    const sheet = document.createElement("canvas");
    sheet.width = picture.width;
    sheet.height = picture.height;
    const context = sheet.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    const [nx, ny, nz] = shape;
    const columns = Number(holder.dataset.columns);
    const values = new Uint8Array(nx * ny * nz);
    for (let z = 0; z < nz; z++) {
      const left = (z % columns) * nx;
      const top = Math.floor(z / columns) * ny;
      const pixels = context.getImageData(left, top, nx, ny).data;
      for (let i = 0, o = z * nx * ny; i < pixels.length; i += 4, o++) values[o] = pixels[i];
    }
    return values;
  }

  class Viewer {
    constructor(root) {
      this.root = root;
      this.shape = numbers(root.dataset.shape);
      this.voxel = Number(root.dataset.voxel);
      this.origin = numbers(root.dataset.origin);
      this.axes = numbers(root.dataset.axes);
      this.cursor = numbers(root.dataset.start);
      this.zoom = 1;
      this.volumes = new Map();
      this.holders = [...root.querySelectorAll("template.volume")];
      this.palettes = this.holders.map((holder) => palette(holder.dataset.colours));
      this.scale = root.querySelector(".scale");
      this.output = root.querySelector("output");
      this.canvases = [...root.querySelectorAll("canvas")];
      this.radios = [...root.querySelectorAll("input[type=radio]")];
      this.scratch = document.createElement("canvas");
      for (const radio of this.radios) radio.addEventListener("change", () => this.choose());
      for (const button of root.querySelectorAll("button"))
        button.addEventListener("click", () => this.act(button.value));
      for (const canvas of this.canvases) this.listen(canvas);
      root.hidden = false;
      window.addEventListener("resize", () => this.draw());
      this.choose();
    }

    get chosen() {
      return this.radios.findIndex((radio) => radio.checked);
    }

    async choose() {
      const number = this.chosen;
      if (!this.volumes.has(number))
        this.volumes.set(number, await decode(this.holders[number], this.shape));
      this.draw();
    }

    act(what) {
      if (what === "in") this.zoom = Math.min(8, this.zoom * 1.5);
      if (what === "out") this.zoom = Math.max(1, this.zoom / 1.5);
      if (what === "reset") {
        this.zoom = 1;
        this.cursor = numbers(this.root.dataset.start);
      }
      this.draw();
    }

    move(axis, step) {
      const last = this.shape[axis] - 1;
      this.cursor[axis] = Math.max(0, Math.min(last, this.cursor[axis] + step));
      this.draw();
    }

    listen(canvas) {
      const plane = PLANES[canvas.dataset.plane];
      const point = (event) => {
        const box = canvas.getBoundingClientRect();
        const view = this.view(canvas);
        const x = ((event.clientX - box.left) / box.width) * view.columns + view.left;
        const y = ((event.clientY - box.top) / box.height) * view.rows + view.top;
        const limit = (value, axis) => Math.max(0, Math.min(this.shape[axis] - 1, value));
        this.cursor[plane.col] = limit(this.shape[plane.col] - 1 - Math.floor(x), plane.col);
        this.cursor[plane.row] = limit(this.shape[plane.row] - 1 - Math.floor(y), plane.row);
        this.draw();
      };
      canvas.addEventListener("pointerdown", (event) => {
        canvas.focus();
        canvas.setPointerCapture(event.pointerId);
        this.grip = this.view(canvas);
        point(event);
      });
      canvas.addEventListener("pointermove", (event) => event.buttons && point(event));
      canvas.addEventListener("pointerup", () => {
        this.grip = null;
        this.draw();
      });
      canvas.addEventListener(
        "wheel",
        (event) => {
          if (document.activeElement !== canvas) return;
          event.preventDefault();
          this.move(plane.normal, event.deltaY > 0 ? -1 : 1);
        },
        { passive: false },
      );
      canvas.addEventListener("keydown", (event) => {
        const keys = {
          ArrowLeft: () => this.move(plane.col, 1),
          ArrowRight: () => this.move(plane.col, -1),
          ArrowUp: () => this.move(plane.row, 1),
          ArrowDown: () => this.move(plane.row, -1),
          PageUp: () => this.move(plane.normal, 1),
          PageDown: () => this.move(plane.normal, -1),
          "+": () => this.act("in"),
          "=": () => this.act("in"),
          "-": () => this.act("out"),
          Home: () => this.act("reset"),
          n: () => this.next(1),
          p: () => this.next(-1),
        };
        if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        keys[event.key]();
      });
    }

    next(step) {
      const count = this.radios.length;
      this.radios[(this.chosen + step + count) % count].checked = true;
      this.choose();
    }

    // The part of a plane that is shown, in voxels; still while the pointer is held down.
    view(canvas) {
      if (this.grip && this.grip.canvas === canvas) return this.grip;
      const plane = PLANES[canvas.dataset.plane];
      const all = [this.shape[plane.col], this.shape[plane.row]];
      const size = all.map((n) => n / this.zoom);
      const at = [plane.col, plane.row].map((a) => this.shape[a] - 1 - this.cursor[a] + 0.5);
      const low = at.map((v, i) => Math.max(0, Math.min(all[i] - size[i], v - size[i] / 2)));
      return { canvas, left: low[0], top: low[1], columns: size[0], rows: size[1] };
    }

    draw() {
      const values = this.volumes.get(this.chosen);
      if (!values) return;
      if (this.scale) this.scale.hidden = !this.holders[this.chosen].dataset.colours;
      for (const canvas of this.canvases) this.paint(canvas, values);
      this.describe(values);
    }

    paint(canvas, values) {
      const plane = PLANES[canvas.dataset.plane];
      const strides = [1, this.shape[0], this.shape[0] * this.shape[1]];
      const columns = this.shape[plane.col];
      const rows = this.shape[plane.row];
      this.scratch.width = columns;
      this.scratch.height = rows;
      const flat = this.scratch.getContext("2d");
      const image = flat.createImageData(columns, rows);
      const colours = this.palettes[this.chosen];
      const base = this.cursor[plane.normal] * strides[plane.normal];
      for (let r = 0, o = 0; r < rows; r++) {
        const line = base + (rows - 1 - r) * strides[plane.row];
        for (let c = columns - 1; c >= 0; c--, o += 4) {
          const from = 3 * values[line + c * strides[plane.col]];
          for (let i = 0; i < 3; i++) image.data[o + i] = colours[from + i];
          image.data[o + 3] = 255;
        }
      }
      flat.putImageData(image, 0, 0);
      // As many pixels as the screen has there, so that thin lines and letters stay.
      const ratio = window.devicePixelRatio || 1;
      canvas.width = Math.max(columns, Math.round(ratio * (canvas.clientWidth || 480)));
      canvas.height = Math.round((canvas.width * rows) / columns);
      const view = this.view(canvas);
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = false;
      const { left, top } = view;
      const size = [canvas.width, canvas.height];
      context.drawImage(this.scratch, left, top, view.columns, view.rows, 0, 0, ...size);
      const x = ((columns - this.cursor[plane.col] - 0.5 - left) / view.columns) * size[0];
      const y = ((rows - this.cursor[plane.row] - 0.5 - top) / view.rows) * size[1];
      this.cross(context, x, y, size, ratio);
      this.letters(context, plane.edges, size, ratio);
    }

    cross(context, x, y, size, ratio) {
      const gap = 8 * ratio;
      for (const [colour, width] of [["#000", 3], ["#ffd400", 1.2]]) {
        context.strokeStyle = colour;
        context.lineWidth = width * ratio;
        context.beginPath();
        context.moveTo(x, 0);
        context.lineTo(x, y - gap);
        context.moveTo(x, y + gap);
        context.lineTo(x, size[1]);
        context.moveTo(0, y);
        context.lineTo(x - gap, y);
        context.moveTo(x + gap, y);
        context.lineTo(size[0], y);
        context.stroke();
      }
    }

    letters(context, edges, [width, height], ratio) {
      context.font = `bold ${16 * ratio}px sans-serif`;
      context.lineWidth = 4 * ratio;
      const inset = 12 * ratio;
      const places = [
        [edges[0], inset, height / 2],
        [edges[1], width - inset, height / 2],
        [edges[2], width / 2, inset],
        [edges[3], width / 2, height - inset],
      ];
      context.textAlign = "center";
      context.textBaseline = "middle";
      for (const [text, x, y] of places) {
        context.strokeStyle = "#000";
        context.strokeText(text, x, y);
        context.fillStyle = "#fff";
        context.fillText(text, x, y);
      }
    }

    describe(values) {
      const mm = [0, 1, 2].map(
        (axis) =>
          this.origin[axis] +
          this.cursor.reduce((sum, v, i) => sum + v * this.voxel * this.axes[3 * i + axis], 0),
      );
      const sides = [["R", "L"], ["A", "P"], ["S", "I"]];
      const place = mm.map((v, i) => `${sides[i][v < 0 ? 1 : 0]} ${Math.abs(v).toFixed(1)}`);
      const [x, y, z] = this.cursor;
      const value = values[x + this.shape[0] * (y + this.shape[1] * z)];
      const { name, ends, colours } = this.holders[this.chosen].dataset;
      const [low, high] = numbers(ends);
      const at = low + ((high - low) * value) / 255;
      const most = value === 255 ? "at least " : "";
      const words = colours
        ? `standard deviation ${most}${short(at)}, 95 % within ± ${most}${short(1.96 * at)}`
        : `intensity ${most}${short(at)}, ${Math.round((100 * value) / 255)} % of white`;
      const zoom = this.zoom > 1 ? `, zoom ${this.zoom.toFixed(1)}` : "";
      this.output.textContent = `${name} at ${place.join(", ")} mm: ${words}${zoom}`;
    }
  }

  for (const root of document.querySelectorAll(".viewer")) new Viewer(root);
})();
