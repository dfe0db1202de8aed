// The inside of one answer: its tokens in order of generation, and its timings.

const CELL = { text: 7, speech: 4 };
const SPACE = 1.5;
const HIGH = 15;
const ROW = 22;

export const STAGES = {
  tokenizer: "Speech tokenizer",
  language: "Language model",
  flow: "Flow matching",
  vocoder: "Vocoder",
  decoder: "Speech decoder",
};
// Every picture gives a stage the same color. "s5" is the line, "s6" is silence and the sound itself.
const COLORS = { tokenizer: "s1", language: "s2", flow: "s3", vocoder: "s4", decoder: "s3" };

export function seconds(ms) {
  if (!Number.isFinite(ms)) return "–";
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

/**
 * Returns the phases between the end of the user's speech and the first audio of the answer: [{name, ms, color}].
 * The page measures the total (`heardAfterMs`) and the pause (`pauseMs`), the server the phases in between.
 */
export function waiting(turn) {
  const parts = [];
  const add = (name, ms, color) => Number.isFinite(ms) && ms >= 0.5 && parts.push({ name, ms, color });
  const timings = turn.timings ?? {};
  add("Pause that ends the turn", turn.pauseMs, "s6");
  let elapsed = 0;
  const until = (name, ms, color) => {
    if (!Number.isFinite(ms) || ms <= elapsed) return;
    add(name, ms - elapsed, color);
    elapsed = ms;
  };
  until("Rest of the tokens heard", timings.tokenize_ms, COLORS.tokenizer);
  until("Prefill", elapsed + (timings.prefill_ms ?? NaN), COLORS.language);
  until("First text token", timings.first_text_ms, COLORS.language);
  until("First speech block", timings.first_audio_ms, COLORS.decoder);
  if (Number.isFinite(turn.heardAfterMs)) add("Line and jitter buffer", turn.heardAfterMs - (turn.pauseMs ?? 0) - elapsed, "s5");
  return parts;
}

function cell(tag, text, className = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  if (className) node.className = className;
  return node;
}

/** Fills a table: name, bar from `from` to `from + ms` of `whole`, and duration. */
function bars(body, rows, whole) {
  body.replaceChildren(
    ...rows.map(({ name, ms, from = 0, color, total }) => {
      const row = document.createElement("tr");
      if (total) row.className = "total";
      const head = cell("th", name);
      head.scope = "row";
      const middle = document.createElement("td");
      if (!total) {
        const track = cell("div", "", "track");
        const bar = cell("i", "", color);
        bar.style.left = `${(100 * from) / whole}%`;
        bar.style.width = `${Math.min(100, (100 * ms) / whole)}%`;
        track.append(bar);
        middle.append(track);
      }
      row.append(head, middle, cell("td", seconds(ms)));
      return row;
    }),
  );
}

export class Inside {
  #turn = null;
  #asked = 0;

  constructor(root) {
    const find = (id) => root.querySelector(`#${id}`);
    this.parts = Object.fromEntries(
      ["inside-which", "inside-empty", "inside-body", "strip", "count-text", "count-speech", "work-words", "gaps", "jitter", "ahead"].map(
        (id) => [id, find(id)],
      ),
    );
    this.wait = root.querySelector("#wait tbody");
    this.work = root.querySelector("#work tbody");
    new ResizeObserver(() => this.#later()).observe(this.parts.strip);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#later());
  }

  get turn() {
    return this.#turn;
  }

  show(turn) {
    this.#turn = turn;
    this.parts["inside-empty"].hidden = Boolean(turn);
    this.parts["inside-body"].hidden = !turn;
    this.#later();
  }

  /** Redraws a changed turn, at most once per frame. */
  update(turn) {
    if (turn === this.#turn) this.#later();
  }

  playback({ gaps, gapMs, jitterMs, waitingMs }) {
    this.parts.gaps.textContent = gaps ? `${gaps}, ${seconds(gapMs)}` : "0";
    this.parts.gaps.classList.toggle("bad", gaps > 0);
    this.parts.jitter.textContent = seconds(jitterMs);
    this.parts.ahead.textContent = seconds(waitingMs);
  }

  #later() {
    this.#asked ||= requestAnimationFrame(() => {
      this.#asked = 0;
      if (this.#turn) this.#draw(this.#turn);
    });
  }

  #draw(turn) {
    const { parts } = this;
    const count = (kind) => turn.runs.filter((run) => run.kind === kind).reduce((sum, run) => sum + run.count, 0);
    parts["inside-which"].textContent = turn.text;
    parts["count-text"].textContent = count("text");
    parts["count-speech"].textContent = count("speech");
    this.#strip(turn.runs);
    const steps = waiting(turn);
    const whole = steps.reduce((sum, step) => sum + step.ms, 0);
    let from = 0;
    const rows = steps.map((step) => {
      const row = { ...step, from };
      from += step.ms;
      return row;
    });
    if (rows.length) rows.push({ name: "Altogether", ms: whole, total: true });
    bars(this.wait, rows, whole || 1);
    this.#stages(turn.timings);
  }

  #stages(timings) {
    const stages = Object.entries(timings?.stages ?? {});
    const total = stages.reduce((sum, [, ms]) => sum + ms, 0);
    const rows = stages.map(([name, ms]) => ({ name: STAGES[name] ?? name, ms, color: COLORS[name] ?? "s5" }));
    const sound = timings?.audio_ms ?? 0;
    if (sound > 0) rows.push({ name: "Length of the sound", ms: sound, color: "s6" });
    bars(this.work, rows, Math.max(1, ...rows.map(({ ms }) => ms)));
    const rate = sound > 0 ? `, ${(timings.total_ms / sound).toFixed(2)} × its length` : "";
    this.parts["work-words"].textContent = timings
      ? `${seconds(total)} of work. Done after ${seconds(timings.total_ms)}${rate}.`
      : "";
  }

  // If there is room, each text run starts a row, so that a row is one round of the interleave.
  #place(runs, width) {
    const cells = [];
    let x = 0;
    let y = 0;
    runs.forEach((run, index) => {
      const size = CELL[run.kind];
      if (index > 0) {
        if (run.kind === "text") {
          x = 0;
          y += ROW;
        } else x += 5;
      }
      for (let i = 0; i < run.count; i += 1) {
        if (x + size > width) {
          x = 0;
          y += ROW;
        }
        cells.push({ x, y, size, kind: run.kind, id: run.ids[i] });
        x += size + SPACE;
      }
    });
    return { cells, height: y + HIGH };
  }

  #strip(runs) {
    const canvas = this.parts.strip;
    const width = canvas.clientWidth;
    if (width === 0) return;
    const { cells, height } = this.#place(runs, width);
    const scale = devicePixelRatio || 1;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(canvas);
    const color = { text: style.getPropertyValue("--token-text"), speech: style.getPropertyValue("--token-speech") };
    for (const { x, y, size, kind, id } of cells) {
      pen.fillStyle = color[kind];
      // The shade of a speech token is its code.
      pen.globalAlpha = kind === "speech" && id !== undefined ? 0.42 + 0.58 * ((id * 0.6180339887) % 1) : 1;
      pen.beginPath();
      pen.roundRect(x, y, size, HIGH, kind === "text" ? 2 : 1.2);
      pen.fill();
    }
    const said = runs.map(({ kind, count }) => `${count} ${kind}`).join(", ");
    canvas.setAttribute("aria-label", said ? `Tokens in the order in which they were made: ${said}` : "No tokens yet");
  }
}
