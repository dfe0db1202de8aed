// The WebSocket to /v1/realtime: opens on demand, reconnects, and resumes the conversation if the server still holds it.
// Uses the events of OpenAI's Realtime API.

const KEY_SUBPROTOCOL = "openai-insecure-api-key."; // browsers cannot set headers on a WebSocket
const BACK_OFF_S = [0.5, 1, 2, 4, 8, 15];
const OPEN_TIMEOUT_MS = 10000;
const MAX_BUFFERED = 512 * 1024; // about 8 s of audio: the connection is too slow
const NORMAL = 1000;
const WORDS = {
  1001: "The server was closed.",
  1006: "The connection was lost.",
  1008: "The server refused the connection",
  1009: "The server refused a message that was too long",
  1011: "The server had an error",
  1012: "The server is being restarted",
  1013: "The server is full",
};
// Close codes after which a retry is useless.
const FINAL = new Set([1008, 4401, 4403]);

/** Returns the address of a route of the server, which may lie below a path. */
export const place = (path) => new URL(path, document.baseURI);

/**
 * Returns the server's model: {id, trained, voices, transcribes, follows_instructions, num_parameters, questions, records}.
 * @throws {Error} with `refused` if the server refuses this page, and with `missesKey` if it wants another key.
 */
export async function modelOf(key) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch(place("v1/models"), { headers });
  if (answer.status === 401) {
    const words = key ? "This API key is wrong." : "This server needs an API key.";
    throw Object.assign(new Error(words), { refused: true, missesKey: true });
  }
  if (answer.status === 403) throw Object.assign(new Error(sentence(0, (await answer.json()).error.message)), { refused: true });
  if (!answer.ok) throw new Error(answer.statusText);
  const [model] = (await answer.json()).data;
  return { trained: true, voices: [], transcribes: true, follows_instructions: false, questions: [], records: false, ...model };
}

function sentence(code, reason) {
  const words = WORDS[code] ?? "The server closed the connection";
  if (!reason) return words.endsWith(".") ? words : `${words}.`;
  const text = reason.charAt(0).toUpperCase() + reason.slice(1);
  return text.endsWith(".") ? text : `${text}.`;
}

/**
 * Events: "state" {state: "closed" | "connecting" | "open" | "waiting" | "refused", words, retryS, code};
 * "server" with every event of the server; "sent" with every event that went out.
 */
export class Connection extends EventTarget {
  #socket = null;
  #attempt = 0;
  #timer = 0;
  #number = 0;
  #opened = null;
  #since = 0; // start of this session
  state = "closed";
  sessionId = "";
  key = "";
  model = "";

  constructor(url = place("v1/realtime")) {
    super();
    this.url = url;
    addEventListener("online", () => this.state === "waiting" && this.#connect());
    addEventListener("pagehide", () => this.#socket?.close(NORMAL));
  }

  /** Whether much of what was sent still waits in the browser. */
  get isBusy() {
    return (this.#socket?.bufferedAmount ?? 0) > MAX_BUFFERED / 4;
  }

  /** Whether the page is trying to come back after a lost connection. */
  get lost() {
    return ["waiting", "refused"].includes(this.state) || (this.state === "connecting" && this.#attempt > 0);
  }

  /** Stops trying, because the server refuses this page. */
  refuse(words) {
    this.#drop();
    const shown = sentence(0, words);
    this.#settle(new Error(shown));
    this.#become("refused", { words: shown });
  }

  #become(state, detail = {}) {
    this.state = state;
    this.dispatchEvent(new CustomEvent("state", { detail: { state, ...detail } }));
  }

  /** Resolves when a session is open; rejects when the user cancels or the server refuses. */
  open() {
    if (this.state === "open") return Promise.resolve();
    if (!this.#opened) {
      let settle;
      const promise = new Promise((resolve, reject) => (settle = { resolve, reject }));
      promise.catch(() => {}); // avoids an unhandled rejection
      this.#opened = { promise, ...settle };
    }
    const { promise } = this.#opened;
    if (this.state !== "connecting") {
      this.#attempt = 0;
      this.#connect();
    }
    return promise;
  }

  /** Closes the session without reconnecting. */
  close() {
    this.#drop();
    this.#settle(new Error("closed"));
    this.#become("closed", { words: "" });
  }

  /** Drops the session id, so that the next connection starts a new conversation. */
  forget() {
    this.sessionId = "";
    this.close();
  }

  #settle(error) {
    if (error) this.#opened?.reject(error);
    else this.#opened?.resolve();
    this.#opened = null;
  }

  #drop() {
    clearTimeout(this.#timer);
    const socket = this.#socket;
    this.#socket = null;
    if (!socket) return;
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close(NORMAL);
  }

  #connect() {
    this.#drop();
    const url = new URL(this.url);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    if (this.model) url.searchParams.set("model", this.model);
    if (this.sessionId) url.searchParams.set("session_id", this.sessionId);
    this.#become("connecting", { attempt: this.#attempt });
    const socket = new WebSocket(url, this.key ? ["realtime", KEY_SUBPROTOCOL + this.key] : []);
    this.#socket = socket;
    socket.onmessage = ({ data }) => this.#received(JSON.parse(data));
    socket.onclose = ({ code, reason }) => this.#lost(code, reason);
    this.#timer = setTimeout(() => {
      this.#drop();
      this.#lost(1006, "the server does not answer");
    }, OPEN_TIMEOUT_MS);
  }

  #received(event) {
    if (event.type === "session.created") {
      clearTimeout(this.#timer);
      this.#attempt = 0;
      this.#since = performance.now();
      const before = this.sessionId;
      this.sessionId = event.session.id ?? "";
      this.#become("open", { again: before !== "", resumed: before !== "" && before === this.sessionId });
    }
    this.dispatchEvent(new CustomEvent("server", { detail: event }));
    if (event.type === "session.created") this.#settle();
  }

  #lost(code, reason) {
    clearTimeout(this.#timer);
    const wasOpen = this.state === "open";
    this.#socket = null;
    const words = sentence(code, reason);
    if (FINAL.has(code)) {
      this.#settle(new Error(words));
      this.#become("refused", { words, code });
      return;
    }
    if (wasOpen && code === NORMAL && performance.now() - this.#since > 5000) {
      this.#become("closed", { words: reason ? words : "", code }); // such as an idle timeout: the next use reconnects
      return;
    }
    const retryS = BACK_OFF_S[Math.min(this.#attempt, BACK_OFF_S.length - 1)] * (0.8 + 0.4 * Math.random());
    this.#attempt += 1;
    this.#become("waiting", { words, code, retryS, wasOpen, attempt: this.#attempt });
    this.#timer = setTimeout(() => this.#connect(), retryS * 1000);
  }

  /** Retries at once. */
  retry() {
    if (this.state !== "open" && this.state !== "connecting") this.#connect();
  }

  /** Sends a client event; returns its id, or "" without a connection. */
  send(event) {
    if (this.state !== "open" || this.#socket?.readyState !== WebSocket.OPEN) return "";
    if (this.#socket.bufferedAmount > MAX_BUFFERED) {
      this.#drop();
      this.#lost(1006, "the connection is too slow to carry sound");
      return "";
    }
    const id = `page_${(this.#number += 1)}`;
    this.#socket.send(JSON.stringify({ event_id: id, ...event }));
    this.dispatchEvent(new CustomEvent("sent", { detail: { event_id: id, ...event } }));
    return id;
  }
}
