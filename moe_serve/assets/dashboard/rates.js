// What counters tell: how much they grew over the last seconds, and how a figure went.

// Samples of counters, over at least the last `spanS` seconds where there are as many.
// A count that fell, or a clock that went back, means that whoever counts began anew, and so does this.
export class Growth {
  constructor(spanS) {
    this.spanS = spanS;
    this.samples = [];
  }

  push(timeS, values) {
    const last = this.samples.at(-1);
    if (last) {
      if (timeS === last.timeS) return;
      if (timeS < last.timeS || isLess(values, last.values)) this.samples = [];
    }
    this.samples.push({ timeS, values });
    while (this.samples.length > 2 && this.samples[1].timeS <= timeS - this.spanS) this.samples.shift();
  }

  clear() {
    this.samples = [];
  }

  // seconds that `of` is over; 0 until there are two samples
  get elapsedS() {
    return this.samples.length < 2 ? 0 : this.samples.at(-1).timeS - this.samples[0].timeS;
  }

  // growth of the count at `index`, null until there are two samples
  of(index) {
    if (this.samples.length < 2) return null;
    return this.samples.at(-1).values[index] - this.samples[0].values[index];
  }

  // growth of all counts
  all() {
    const [first, last] = [this.samples[0].values, this.samples.at(-1).values];
    return last.map((value, index) => value - first[index]);
  }

  perS(index) {
    const growth = this.of(index);
    return growth === null ? null : growth / this.elapsedS;
  }

  // between the latest two samples
  latestPerS(index) {
    const samples = this.samples;
    if (samples.length < 2) return null;
    const [before, after] = [samples.at(-2), samples.at(-1)];
    return (after.values[index] - before.values[index]) / (after.timeS - before.timeS);
  }
}

function isLess(values, before) {
  if (values.length !== before.length) return true;
  for (let i = 0; i < values.length; i++) if (values[i] < before[i]) return true;
  return false;
}

// The share of `part` in the sum of all, null where that is 0 or a part is not known.
export function share(part, ...others) {
  if (part === null || others.includes(null)) return null;
  const whole = others.reduce((sum, value) => sum + value, part);
  return whole > 0 ? part / whole : null;
}

// Points of several lines over time; the oldest go.
export class History {
  constructor(spanS) {
    this.spanS = spanS;
    this.points = [];
  }

  push(timeS, values) {
    this.points.push({ timeS, values });
    while (this.points[0].timeS < timeS - this.spanS) this.points.shift();
  }
}
