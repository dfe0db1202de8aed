// The waveforms of both sides on one clock, user above and Duologue below, and their level meters.

const SPAN_MS = 10000;
const BAR = 3;
const STEP = 5; // pixels from one bar to the next
const QUIET_MS = 700; // stops drawing when nothing changes

const decibels = (level) => Math.max(-60, Math.round(20 * Math.log10(Math.max(level, 1e-6))));

export class Timeline {
  #peaks = { you: [], they: [] }; // {t, peak}
  #levels = { you: 0, they: 0 };
  #frame = 0;
  #until = 0;
  #shown = 0;

  constructor(canvas, meters) {
    this.canvas = canvas;
    this.meters = meters;
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    new ResizeObserver(() => this.wake()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.wake());
  }

  /** Adds audio of one side ("you" or "they") that has just ended: peak and level, in [0, 1]. */
  add(side, peak, level) {
    const t = performance.now();
    this.#peaks[side].push({ t, peak });
    this.#levels[side] = Math.max(level, this.#levels[side] * 0.8);
    this.wake();
  }

  /** Sets the level of one side to silence at once. */
  quiet(side) {
    this.#levels[side] = 0;
    this.wake();
  }

  /** Returns the peaks of one side since `from` (milliseconds of performance.now). */
  since(side, from) {
    return this.#peaks[side].filter(({ t }) => t >= from).map(({ peak }) => peak);
  }

  wake() {
    this.#until = performance.now() + SPAN_MS + QUIET_MS;
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    this.#frame = 0;
    const now = performance.now();
    const keep = now - 60000;
    for (const side of ["you", "they"]) {
      const peaks = this.#peaks[side];
      while (peaks.length && peaks[0].t < keep) peaks.shift();
      const level = this.#levels[side];
      this.#levels[side] = level < 0.001 ? 0 : level * 0.94;
      this.#meter(side, level);
    }
    if (!this.calm.matches || now - this.#shown > 500) {
      this.#shown = now;
      this.#paint(now);
    }
    if (now < this.#until) this.#frame = requestAnimationFrame(() => this.#draw());
  }

  #meter(side, level) {
    const value = decibels(level);
    const meter = this.meters[side];
    meter.firstElementChild.style.transform = `scaleY(${(value + 60) / 60})`;
    if (meter.getAttribute("aria-valuenow") !== String(value)) {
      meter.setAttribute("aria-valuenow", value);
      meter.setAttribute("aria-valuetext", value <= -60 ? "silent" : `${value} decibels`);
    }
  }

  #paint(now) {
    const { canvas } = this;
    const scale = devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = canvas;
    if (width === 0) return;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const style = getComputedStyle(canvas);
    const middle = height / 2;
    pen.fillStyle = style.getPropertyValue("--line");
    pen.fillRect(0, middle - 0.5, width, 1);
    const perBar = SPAN_MS / Math.floor(width / STEP);
    const newest = Math.floor(now / perBar);
    for (const [side, up] of [["you", true], ["they", false]]) {
      pen.fillStyle = style.getPropertyValue(`--${side}`);
      const bars = new Map();
      for (const { t, peak } of this.#peaks[side]) {
        const bar = newest - Math.floor(t / perBar);
        if (bar * STEP < width) bars.set(bar, Math.max(bars.get(bar) ?? 0, peak));
      }
      const shift = ((now % perBar) / perBar) * STEP;
      for (const [bar, peak] of bars) {
        const long = Math.max(1.5, Math.min(1, Math.sqrt(peak) * 1.05) * (middle - 4));
        const x = width - (bar + 1) * STEP - shift + STEP - BAR;
        pen.beginPath();
        pen.roundRect(x, up ? middle - 1.5 - long : middle + 1.5, BAR, long, BAR / 2);
        pen.fill();
      }
    }
  }
}

/** Returns a thumbnail of a spoken turn: an SVG path of at most `count` bars. */
export function shapeOf(peaks, count = 28) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "shape");
  svg.setAttribute("viewBox", `0 0 ${count * 4} 26`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  let path = "";
  for (let i = 0; i < count; i += 1) {
    const part = peaks.slice(Math.floor((i * peaks.length) / count), Math.max(1, Math.floor(((i + 1) * peaks.length) / count)));
    const half = Math.max(0.5, Math.min(12, Math.sqrt(Math.max(0, ...part)) * 13));
    path += `M${i * 4 + 2} ${13 - half}V${13 + half}`;
  }
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}
