// Figures as people read them. Every text that goes into the page passes through here or `plain`.

export const NONE = "\u2013";

export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 1e9) return `${fixed(value / 1e9)}G`;
  if (size >= 1e6) return `${fixed(value / 1e6)}M`;
  if (size >= 1e5) return `${fixed(value / 1e3)}k`;
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return fixed(value);
}

export function whole(value) {
  return Number.isFinite(value) ? Math.round(value).toLocaleString("en") : NONE;
}

// three digits that count; a whole number stays one
function fixed(value) {
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1000) return String(value);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2);
}

export function bytes(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  while (Math.abs(value) >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit++;
  }
  return `${unit ? fixed(value) : Math.round(value)} ${units[unit]}`;
}

export function percent(share) {
  if (share === null || share === undefined || !Number.isFinite(share)) return NONE;
  const value = 100 * share;
  return `${value >= 99.95 || value === 0 ? value.toFixed(0) : value < 10 ? value.toFixed(2) : value.toFixed(1)} %`;
}

export function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  if (value < 0.9995) return `${fixed(value * 1000)} ms`;
  return value < 120 ? `${fixed(value)} s` : duration(value);
}

export function duration(value) {
  if (!Number.isFinite(value)) return NONE;
  const whole = Math.floor(value);
  const [days, hours] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24];
  const [minutes, rest] = [Math.floor(whole / 60) % 60, whole % 60];
  const two = (part) => String(part).padStart(2, "0");
  if (days) return `${days} d ${two(hours)} h`;
  if (hours) return `${hours} h ${two(minutes)} min`;
  return minutes ? `${minutes} min ${two(rest)} s` : `${rest} s`;
}

// A text from elsewhere: what would not be seen, or would turn its neighbours round, is shown as a mark.
export function plain(text) {
  const seen = String(text).replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, "\ufffd");
  return seen.length > 300 ? `${seen.slice(0, 299)}\u2026` : seen;
}

export function put(id, text) {
  const element = document.getElementById(id);
  if (element.textContent !== text) element.textContent = text;
}

// An element with texts and elements in it.
export function make(name, className, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children);
  return element;
}
