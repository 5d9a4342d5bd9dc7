// The experts of all layers as cells: how often each was used, beside the mean of its layer.

import { cssColor, fit } from "./charts.js";
import { number, percent, whole } from "./figures.js";

const LEFT = 30;
const BOTTOM = 16;
const HEIGHT = 340;
const LEAST = { across: 2, down: 4 };
const MOST = { across: 120, down: 18 };
// the ramp ends at 2 ** 3 times the mean, and begins at 2 ** -3
const OCTAVES = 3;
const SHADES = 64;

export class HeatMap {
  // readout: what the eye follows, anew with each answer; said: what a screen reader says, on a step alone
  constructor(canvas, readout, said) {
    this.canvas = canvas;
    this.readout = readout;
    this.said = said;
    this.experts = null;
    this.elapsedS = 0;
    this.counts = null;
    this.means = [];
    this.cell = null;
    this.shades = null;
    for (const name of ["pointermove", "pointerdown"]) {
      canvas.addEventListener(name, (event) => this.pointAt(this.cellAt(event)));
    }
    // a finger that was lifted leaves too, and what it chose is read after that
    canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.pointAt(null));
    canvas.addEventListener("blur", () => this.pointAt(null));
    canvas.addEventListener("keydown", (event) => this.walk(event));
  }

  // experts: of the snapshot; growth: of its uses, flat
  show(experts, growth) {
    this.experts = experts;
    this.elapsedS = growth.elapsedS;
    this.counts = growth.all();
    this.canvas.dataset.layers = experts.layers.length;
    this.canvas.dataset.experts = experts.num_experts;
    this.means = experts.layers.map((_, row) => this.usesOf(row) / experts.num_experts);
    this.draw();
    this.tell();
  }

  usesOf(row) {
    let sum = 0;
    for (let expert = 0; expert < this.experts.num_experts; expert++) sum += this.used(row, expert);
    return sum;
  }

  used(row, expert) {
    return this.counts[row * this.experts.num_experts + expert];
  }

  isHeld(row, expert) {
    const resident = this.experts.resident;
    return !resident.length || resident[row][expert] === 1;
  }

  forgetColors() {
    this.shades = null;
  }

  // sizes in points of the screen, whole ones, so that cells are all alike
  measure() {
    const ratio = window.devicePixelRatio || 1;
    const { layers, num_experts: columns } = this.experts;
    const room = this.canvas.parentElement.clientWidth - LEFT;
    const clamp = (value, least, most) => Math.floor(Math.min(most, Math.max(least, value)) * ratio);
    const across = clamp(room / columns, LEAST.across, MOST.across);
    const down = clamp(HEIGHT / layers.length, LEAST.down, MOST.down);
    return { ratio, across, down, rows: layers.length, columns };
  }

  draw() {
    if (!this.experts || !this.canvas.parentElement.clientWidth) return;
    const size = (this.size = this.measure());
    const [width, height] = [size.across * size.columns, size.down * size.rows];
    const [shownWidth, shownHeight] = [LEFT + width / size.ratio, height / size.ratio + BOTTOM];
    this.canvas.style.width = `${shownWidth}px`;
    this.canvas.style.height = `${shownHeight}px`;
    const context = fit(this.canvas, shownWidth, shownHeight);
    context.clearRect(0, 0, shownWidth, shownHeight);
    context.putImageData(this.paint(context, width, height), Math.round(LEFT * size.ratio), 0);
    this.drawLabels(context, shownHeight);
    this.drawMark(context);
  }

  paint(context, width, height) {
    const { across, down, rows, columns } = this.size;
    const image = context.createImageData(width, height);
    const points = new Uint32Array(image.data.buffer);
    const { empty, idle, ramp } = (this.shades ??= readShades());
    points.fill(empty);
    const gapAcross = across >= 5 ? 1 : 0;
    const gapDown = down >= 4 ? 1 : 0;
    const thin = Math.max(1, Math.floor((down - gapDown) * 0.45));
    const inset = Math.floor((down - gapDown - thin) / 2);
    for (let row = 0; row < rows; row++) {
      const mean = this.means[row];
      for (let column = 0; column < columns; column++) {
        const used = this.used(row, column);
        const held = this.isHeld(row, column);
        if (!used && (!held || !this.experts.resident.length)) continue;
        const shade = used ? ramp[shadeOf(used / mean)] : idle;
        const begin = row * down + (held ? 0 : inset);
        const end = held ? row * down + down - gapDown : begin + thin;
        for (let line = begin; line < end; line++) {
          const first = line * width + column * across;
          points.fill(shade, first, first + across - gapAcross);
        }
      }
    }
    return image;
  }

  drawLabels(context, height) {
    const { ratio, across, down, rows, columns } = this.size;
    context.fillStyle = cssColor("--muted");
    context.font = `10px ${getComputedStyle(document.body).fontFamily}`;
    context.textAlign = "right";
    context.textBaseline = "middle";
    const everyRow = spacing((13 * ratio) / down);
    for (let row = 0; row < rows; row += everyRow) {
      context.fillText(this.experts.layers[row], LEFT - 6, Math.max(5, ((row + 0.5) * down) / ratio));
    }
    context.textAlign = "center";
    context.textBaseline = "bottom";
    const everyColumn = spacing((44 * ratio) / across);
    for (let column = 0; column < columns; column += everyColumn) {
      context.fillText(column, LEFT + ((column + 0.5) * across) / ratio, height);
    }
  }

  drawMark(context) {
    if (!this.cell) return;
    const { ratio, across, down } = this.size;
    context.strokeStyle = cssColor("--mark");
    context.lineWidth = 2;
    const [left, top] = [LEFT + (this.cell.column * across) / ratio, (this.cell.row * down) / ratio];
    context.strokeRect(left - 1.5, top - 1.5, across / ratio + 2, down / ratio + 2);
  }

  cellAt(event) {
    if (!this.size) return null;
    const box = this.canvas.getBoundingClientRect();
    const { ratio, across, down, rows, columns } = this.size;
    const column = Math.floor(((event.clientX - box.left - LEFT) * ratio) / across);
    const row = Math.floor(((event.clientY - box.top) * ratio) / down);
    return row >= 0 && row < rows && column >= 0 && column < columns ? { row, column } : null;
  }

  walk(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if (!step || !this.size) return;
    event.preventDefault();
    const { rows, columns } = this.size;
    const { row, column } = this.cell ?? { row: 0, column: 0 };
    const [down, across] = this.cell ? step : [0, 0];
    this.pointAt({ row: (row + down + rows) % rows, column: (column + across + columns) % columns });
    this.said.textContent = this.readout.textContent;
  }

  pointAt(cell) {
    if (cell?.row === this.cell?.row && cell?.column === this.cell?.column) return;
    this.cell = cell;
    this.draw();
    this.tell();
  }

  tell() {
    const text = this.cell ? this.describe(this.cell.row, this.cell.column) : "Point at a cell, or use the arrow keys.";
    if (this.readout.textContent !== text) this.readout.textContent = text;
  }

  describe(row, column) {
    if (row >= this.means.length || column >= this.experts.num_experts) return "";
    const [used, mean] = [this.used(row, column), this.means[row]];
    const parts = [`Layer ${this.experts.layers[row]}`, `expert ${column}`];
    parts.push(`${number(this.elapsedS ? used / this.elapsedS : null)} uses/s`);
    if (mean > 0) {
      parts.push(`${percent(used / (mean * this.experts.num_experts))} of the layer's`);
      parts.push(`${number(used / mean)}\u00d7 its mean`);
    }
    if (this.experts.resident.length) parts.push(this.isHeld(row, column) ? "held" : "not held");
    return parts.join(" \u00b7 ");
  }

  // what the table has of a row of cells
  summary(row) {
    const columns = this.experts.num_experts;
    let [busiest, unused, held] = [0, 0, 0];
    for (let column = 0; column < columns; column++) {
      if (this.used(row, column) > this.used(row, busiest)) busiest = column;
      if (!this.used(row, column)) unused++;
      if (this.isHeld(row, column)) held++;
    }
    const mean = this.means[row];
    const used = this.used(row, busiest);
    return [
      whole(this.experts.layers[row]),
      number(this.elapsedS ? (mean * columns) / this.elapsedS : null),
      mean > 0 ? whole(busiest) : number(null),
      percent(mean > 0 ? used / (mean * columns) : null),
      number(mean > 0 ? used / mean : null),
      whole(unused),
      whole(held),
    ];
  }
}

function shadeOf(ratio) {
  const at = Math.round(((Math.log2(ratio) + OCTAVES) / (2 * OCTAVES)) * (SHADES - 1));
  return Math.min(SHADES - 1, Math.max(0, at));
}

// every how many a label fits, as people count
function spacing(least) {
  return [1, 2, 4, 8, 16, 32, 64, 128, 256, 512].find((step) => step >= least) ?? 1024;
}

function readShades() {
  const stops = [0, 1, 2, 3, 4, 5].map((stop) => channels(cssColor(`--heat-${stop}`)));
  const ramp = Array.from({ length: SHADES }, (_, shade) => {
    const at = (shade / (SHADES - 1)) * (stops.length - 1);
    const below = Math.min(stops.length - 2, Math.floor(at));
    return packed(stops[below].map((from, i) => from + (stops[below + 1][i] - from) * (at - below)));
  });
  return { empty: packed(channels(cssColor("--empty"))), idle: packed(channels(cssColor("--idle"))), ramp };
}

function channels(color) {
  return [1, 3, 5].map((at) => Number.parseInt(color.slice(at, at + 2), 16));
}

// as ImageData has it in memory, whatever the machine's order of bytes
function packed([red, green, blue]) {
  return new Uint32Array(new Uint8ClampedArray([red, green, blue, 255]).buffer)[0];
}
