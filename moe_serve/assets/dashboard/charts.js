// Lines over the last five minutes, on a canvas that is as sharp as the screen.

const LABEL_HEIGHT = 13;
// a longer pause between two points is a gap in the line
const GAP_S = 15;

export function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Make the canvas as large as it is shown, in the screen's own points; return what to draw on.
export function fit(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== across || canvas.height !== down) {
    canvas.width = across;
    canvas.height = down;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

// The least round number that is not below `value`.
function above(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  const step = [1, 1.5, 2, 3, 4, 6, 8, 10].find((candidate) => candidate * power >= value * 0.9999);
  return step * power;
}

// colors: names of custom properties, one for each line. options.top: where the axis ends, if always the same.
export function drawLines(canvas, history, nowS, colors, label, options = {}) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width || !height) return;
  const context = fit(canvas, width, height);
  const bottom = height - LABEL_HEIGHT;
  const seen = history.points.flatMap((point) => point.values).filter(Number.isFinite);
  const top = options.top ?? above(Math.max(options.least ?? 1, ...seen));
  const x = (timeS) => width * (1 - (nowS - timeS) / history.spanS);
  const y = (value) => bottom - (Math.min(value, top) / top) * (bottom - 9) - 0.5;

  context.clearRect(0, 0, width, height);
  context.lineWidth = 1;
  context.strokeStyle = cssColor("--grid");
  context.beginPath();
  for (const value of [0, top / 2, top]) {
    const at = Math.round(y(value)) + 0.5;
    context.moveTo(0, at);
    context.lineTo(width, at);
  }
  context.stroke();
  colors.forEach((color, line) => drawLine(context, history.points, line, cssColor(color), x, y, colors.length === 1 ? bottom : null));

  context.fillStyle = cssColor("--muted");
  context.font = `10px ${getComputedStyle(document.body).fontFamily}`;
  context.textBaseline = "bottom";
  [["5 min ago", 0, "left"], ["now", width, "right"]].forEach(([text, at, align]) => {
    context.textAlign = align;
    context.fillText(text, at, height);
  });
  const text = label(top);
  context.textAlign = "left";
  context.textBaseline = "middle";
  context.fillStyle = cssColor("--panel");
  context.fillRect(0, y(top) - 6, context.measureText(text).width + 5, 12);
  context.fillStyle = cssColor("--muted");
  context.fillText(text, 0, y(top));
}

function drawLine(context, points, line, color, x, y, floor) {
  context.strokeStyle = color;
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  let run = [];
  const finish = () => {
    if (run.length) drawRun(context, run, color, floor);
    run = [];
  };
  let before = -Infinity;
  for (const { timeS, values } of points) {
    if (!Number.isFinite(values[line]) || timeS - before > GAP_S) finish();
    if (Number.isFinite(values[line])) run.push([x(timeS), y(values[line])]);
    before = timeS;
  }
  finish();
}

function drawRun(context, run, color, floor) {
  const trace = () => {
    context.beginPath();
    run.forEach(([across, down], at) => (at ? context.lineTo(across, down) : context.moveTo(across, down)));
  };
  if (run.length === 1) {
    context.fillStyle = color;
    context.fillRect(run[0][0] - 1, run[0][1] - 1, 2, 2);
    return;
  }
  if (floor !== null) {
    trace();
    context.lineTo(run.at(-1)[0], floor);
    context.lineTo(run[0][0], floor);
    context.globalAlpha = 0.13;
    context.fillStyle = color;
    context.fill();
    context.globalAlpha = 1;
  }
  trace();
  context.stroke();
}
