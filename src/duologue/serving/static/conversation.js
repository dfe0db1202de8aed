// The turns of a conversation, in order, built from server events. Independent of the page and of audio.

const UNSURE = 0.6; // probability of a word below which it counts as not heard clearly

/** Returns the words of a transcript, {text, sure}, blanks included in the texts; null without log probabilities. */
export function wordsOf(logprobs) {
  if (!logprobs?.length) return null;
  const words = [];
  for (const { token, logprob } of logprobs) {
    const last = words.at(-1);
    if (!last || (/^\s/.test(token) && last.text.trim())) words.push({ text: token, logprob });
    else Object.assign(last, { text: last.text + token, logprob: last.logprob + logprob });
  }
  return words.map(({ text, logprob }) => ({ text, sure: Math.exp(logprob) >= UNSURE }));
}

/**
 * One turn: {id, role: "user" | "assistant", text, spoken, status, startedMs, endedMs, responseId, audioMs, playedMs, cutMs,
 * runs: [{kind: "text" | "speech", count, ids}], timings, heardAfterMs, gaps, usage, note, words: [{text, sure}]}.
 * Status: "listening" | "heard" | "done" | "waiting" | "unsent" | "answering" | "interrupted" | "incomplete" | "failed".
 * Events: "turn" {turn, fresh}; "moved" {turn, previous}: the new position is after `previous`.
 */
export class Conversation extends EventTarget {
  turns = [];
  #byItem = new Map();
  #byResponse = new Map();
  #waiting = new Map(); // tokens and timings that arrived before their item

  /** @param {() => number} now milliseconds on the clock of the conversation */
  constructor(now) {
    super();
    this.now = now;
  }

  turn(id) {
    return this.#byItem.get(id);
  }

  reply(responseId) {
    return this.#byResponse.get(responseId);
  }

  /** The active reply, or undefined. */
  get answering() {
    return this.turns.findLast((turn) => turn.status === "answering");
  }

  clear() {
    this.turns = [];
    this.#byItem.clear();
    this.#byResponse.clear();
    this.#waiting.clear();
  }

  changed(turn, fresh = false) {
    this.dispatchEvent(new CustomEvent("turn", { detail: { turn, fresh } }));
  }

  #add(id, role, status, more = {}) {
    let turn = this.#byItem.get(id);
    if (turn) return turn;
    turn = { id, role, text: "", spoken: false, status, startedMs: this.now(), runs: [], gaps: 0, audioMs: 0, ...more };
    this.#byItem.set(id, turn);
    this.turns.push(turn);
    this.changed(turn, true);
    return turn;
  }

  /** Adds a typed turn before the server confirms it. */
  typed(id, text) {
    return this.#add(id, "user", "done", { text, endedMs: this.now() });
  }

  /** Marks a typed turn that waits, or that was sent. */
  mark(turn, status, note) {
    this.#update(turn, { status, note });
  }

  /** Ends every open turn after a lost connection. @param {boolean} asked whether a question was still being sent */
  lost(asked) {
    const last = this.turns.at(-1);
    if (asked && last?.role === "user") this.#update(last, { note: "The line dropped before this was answered." });
    for (const turn of this.turns) {
      if (turn.status === "answering" || turn.status === "listening") {
        turn.note = turn.status === "answering" ? "The line dropped." : "The line dropped: not all of this was heard.";
        turn.status = turn.status === "answering" ? "failed" : "unsent";
        turn.endedMs = this.now();
        this.changed(turn);
      }
    }
  }

  #update(turn, values) {
    if (!turn) return;
    Object.assign(turn, values);
    this.changed(turn);
  }

  // The server's order wins: a typed turn is shown before earlier speech has been committed.
  #order(turn, previousId) {
    const previous = this.#byItem.get(previousId);
    if (!previous || this.turns.indexOf(turn) > this.turns.indexOf(previous)) return;
    this.turns.splice(this.turns.indexOf(turn), 1);
    this.turns.splice(this.turns.indexOf(previous) + 1, 0, turn);
    this.dispatchEvent(new CustomEvent("moved", { detail: { turn, previous } }));
  }

  #item(item, previousId) {
    if (item.type !== "message" || item.role === "system") return;
    const parts = item.content ?? [];
    const text = parts.map((part) => part.text ?? part.transcript ?? "").join("");
    const spoken = parts.some((part) => part.type === "input_audio" || part.type === "output_audio");
    const status = item.role === "assistant" && item.status === "in_progress" ? "answering" : "done";
    const turn = this.#add(item.id, item.role, status, { text, spoken });
    const values = { spoken: turn.spoken || spoken };
    if (text && !turn.text) values.text = text;
    if (turn.status === "listening") Object.assign(values, { status: "heard", endedMs: turn.endedMs ?? this.now() });
    this.#update(turn, values);
    this.#order(turn, previousId);
  }

  #answer(event) {
    const turn = this.#add(event.item.id, "assistant", "answering");
    this.#byResponse.set(event.response_id, turn);
    turn.responseId = event.response_id;
    for (const early of this.#waiting.get(event.response_id) ?? []) this.take(early);
    this.#waiting.delete(event.response_id);
  }

  #early(event) {
    this.#waiting.set(event.response_id, [...(this.#waiting.get(event.response_id) ?? []), event]);
  }

  #tokens(turn, event) {
    // One event may hold one run or several.
    for (const { kind, count, ids } of event.runs ?? [event]) {
      const last = turn.runs.at(-1);
      const number = count ?? ids.length;
      if (last?.kind === kind) {
        last.count += number;
        if (ids) last.ids.push(...ids);
      } else {
        turn.runs.push({ kind, count: number, ids: [...(ids ?? [])] });
      }
    }
    this.changed(turn);
  }

  #done(response) {
    const turn = this.#byResponse.get(response.id);
    if (!turn) return;
    const why = response.status_details ?? {};
    const values = { endedMs: this.now(), usage: response.usage };
    if (response.status === "completed") values.status = "done";
    else if (response.status === "cancelled") values.status = "interrupted";
    else if (response.status === "incomplete") {
      Object.assign(values, { status: "incomplete", note: "The answer reached its longest length." });
    } else Object.assign(values, { status: "failed", note: why.error?.message ?? "The server could not answer." });
    this.#update(turn, values);
  }

  /** Handles one server event. */
  take(event) {
    const turn = this.#byItem.get(event.item_id);
    switch (event.type) {
      case "input_audio_buffer.speech_started":
        this.#add(event.item_id, "user", "listening", { spoken: true });
        break;
      case "input_audio_buffer.speech_stopped":
        this.#update(turn, { status: "heard", endedMs: this.now() });
        break;
      case "input_audio_buffer.committed":
        this.#add(event.item_id, "user", "heard", { spoken: true, endedMs: this.now() });
        break;
      case "conversation.item.added":
      case "conversation.item.done":
      case "conversation.item.created":
        this.#item(event.item, event.previous_item_id);
        break;
      case "conversation.item.input_audio_transcription.delta":
        this.#update(turn, { text: turn?.text + (event.delta ?? "") });
        break;
      case "conversation.item.input_audio_transcription.completed":
        this.#update(turn, { text: event.transcript, status: "done", words: wordsOf(event.logprobs) });
        break;
      case "conversation.item.input_audio_transcription.failed":
        this.#update(turn, { status: "done", note: "What was said could not be written down." });
        break;
      case "conversation.item.truncated":
        this.#update(turn, { cutMs: event.audio_end_ms, status: "interrupted" });
        break;
      case "response.output_item.added":
        this.#answer(event);
        break;
      case "response.output_text.delta":
      case "response.output_audio_transcript.delta":
        this.#update(turn, { text: turn?.text + event.delta });
        break;
      case "response.output_text.done":
        this.#update(turn, { text: event.text });
        break;
      case "response.output_audio_transcript.done":
        this.#update(turn, { text: event.transcript });
        break;
      case "response.done":
        this.#done(event.response);
        break;
      case "duologue.tokens": {
        const reply = this.#byResponse.get(event.response_id);
        if (reply) this.#tokens(reply, event);
        else this.#early(event);
        break;
      }
      case "duologue.timings": {
        const reply = this.#byResponse.get(event.response_id);
        if (reply) this.#update(reply, { timings: event });
        else this.#early(event);
        break;
      }
      default:
    }
  }
}
