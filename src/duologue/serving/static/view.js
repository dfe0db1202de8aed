// The transcript, the status and the notice, on screen and for screen readers.

import { seconds } from "./inside.js";
import { shapeOf } from "./timeline.js";

const clock = (ms) => `${Math.floor(ms / 60000)}:${String(Math.floor(ms / 1000) % 60).padStart(2, "0")}`;

function node(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

/** Returns the nodes of a word of a transcript; blanks are not underlined. */
function heardWord({ text, sure }, index) {
  const word = text.trimStart();
  return [index ? text.slice(0, text.length - word.length) : "", sure ? word : node("mark", "", word)];
}

/** Event: "select" {turn}. */
export class View extends EventTarget {
  #rows = new Map();
  #dirty = new Set();
  #asked = 0;
  #chosen = null;
  #announced = new WeakSet();
  #passing = false;
  #atEnd = true;

  constructor(root = document) {
    super();
    this.find = (id) => root.getElementById(id);
    this.list = this.find("turns");
    this.scroll = this.find("scroll");
    this.scroll.addEventListener("scroll", () => {
      this.#atEnd = this.scroll.scrollHeight - this.scroll.scrollTop - this.scroll.clientHeight < 80;
    });
    new ResizeObserver(() => this.#follow()).observe(this.scroll);
  }

  clear() {
    this.#rows.clear();
    this.list.replaceChildren();
    this.find("welcome").hidden = false;
  }

  /** Adds a divider between two turns, such as "A new conversation". */
  seam(words) {
    this.list.append(node("li", "seam", words));
    this.announce(words);
    this.#follow();
  }

  choose(turn) {
    this.#chosen = turn;
    for (const one of this.#rows.keys()) this.update(one);
  }

  /** Redraws a turn, at most once per frame. */
  update(turn) {
    this.#dirty.add(turn);
    this.#asked ||= requestAnimationFrame(() => {
      this.#asked = 0;
      for (const one of this.#dirty) this.#draw(one);
      this.#dirty.clear();
      this.#follow();
    });
  }

  // Keeps the position of a user who has scrolled up.
  #follow() {
    if (this.#atEnd) this.scroll.scrollTop = this.scroll.scrollHeight;
  }

  /** Moves a turn after another. */
  move(turn, previous) {
    this.#row(previous).item.after(this.#row(turn).item);
  }

  #row(turn) {
    let row = this.#rows.get(turn);
    if (row) return row;
    this.find("welcome").hidden = true;
    const item = node("li", "turn");
    const who = node("div", "who");
    const time = node("time", "", clock(turn.startedMs));
    who.append(node("b", "", turn.role === "user" ? "You" : "Duologue"), time);
    const body = node("div");
    row = { item, said: node("p", "said"), note: node("p", "note"), about: node("button", "about plain small") };
    row.about.type = "button";
    row.about.addEventListener("click", () => this.dispatchEvent(new CustomEvent("select", { detail: { turn } })));
    body.append(row.said, row.note, row.about);
    item.append(who, body);
    this.list.append(item);
    this.#rows.set(turn, row);
    return row;
  }

  #draw(turn) {
    const row = this.#row(turn);
    row.item.className = `turn ${turn.role === "user" ? "you" : "they"} ${turn.status}`;
    row.item.dataset.item = turn.id;
    const busy = turn.status === "listening" || turn.status === "answering";
    const lasted = seconds((turn.endedMs ?? 0) - turn.startedMs);
    let text = turn.text.trim();
    const parts = [];
    if (!text && turn.role === "user" && turn.spoken) {
      if (turn.peaks?.length > 3) parts.push(shapeOf(turn.peaks));
      text = busy ? "" : `Spoken, ${lasted}`;
    }
    if (!text && turn.status === "interrupted") text = "…";
    row.said.classList.toggle("pending", !turn.text);
    if (busy && !text) row.said.setAttribute("aria-label", turn.role === "user" ? "You are speaking" : "Thinking");
    else row.said.removeAttribute("aria-label");
    const unsure = turn.words?.some((word) => !word.sure);
    if (unsure) parts.push(...turn.words.flatMap(heardWord));
    else if (text) parts.push(document.createTextNode(text));
    if (busy) parts.push(node("span", "caret"));
    row.said.replaceChildren(...parts);
    const notes = [];
    if (turn.cutMs !== undefined) notes.push(`Interrupted after ${seconds(turn.cutMs)}.`);
    else if (turn.status === "interrupted") notes.push("Interrupted.");
    if (unsure) notes.push("Underlined: not heard clearly.");
    if (turn.note) notes.push(turn.note);
    if (turn.gaps) notes.push(turn.gaps === 1 ? "One gap in its sound." : `${turn.gaps} gaps in its sound.`);
    row.note.textContent = notes.join(" ");
    row.note.hidden = notes.length === 0;
    this.#about(turn, row);
    // Spoken answers are not announced again.
    if (!busy && turn.text && turn.role === "assistant" && !turn.audioMs && !this.#announced.has(turn)) {
      this.#announced.add(turn);
      this.announce(`Duologue: ${turn.text}`);
    }
  }

  // Tokens and timings are shown in the panel, on demand.
  #about(turn, { about }) {
    about.hidden = turn.role !== "assistant" || (turn.runs.length === 0 && !turn.timings);
    about.textContent = "How it was made";
    about.setAttribute("aria-pressed", String(turn === this.#chosen));
  }

  status(words, phase) {
    const status = this.find("status");
    if (status.textContent === words) return;
    status.textContent = words;
    status.dataset.phase = phase;
  }

  line(words, state) {
    this.find("line-words").textContent = words;
    this.find("line").dataset.state = state;
  }

  /** Removes a transient message when the connection is back. */
  settled() {
    if (this.#passing) this.notice("");
  }

  /** Shows a message until it is dismissed, or `settled` if transient; `action` is {words, run}. */
  notice(words, { action = null, mild = false, passing = false } = {}) {
    this.#passing = passing;
    const box = this.find("notice");
    const button = this.find("notice-action");
    box.classList.toggle("mild", mild);
    box.hidden = words === "";
    // Screen readers announce an alert when its text changes.
    if (this.find("notice-words").textContent !== words) this.find("notice-words").textContent = words;
    button.hidden = !action;
    button.textContent = action?.words ?? "";
    button.onclick = action?.run ?? null;
  }

  announce(words) {
    this.find("announce").textContent = words;
  }
}
