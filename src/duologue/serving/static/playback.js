// Plays the server's audio through an AudioWorklet and counts the played samples of every item.

import { samplesOf } from "./sound.js";

export const RATE = 24000;

const START_MS = 3000; // without a loudspeaker the browser never starts, and reports no error

/**
 * Events: "broken"; "silent"; "audible"; "started" {id, latencyMs}, "finished" {id, playedMs}, "gap" {id, ms}, "dropped" {id, ms}
 * without a loudspeaker; and "heard" {pcm: Float32Array, at, stream, id, playedMs, level, peak, waitingMs} with all that
 * was played, `at` samples after its stream began.
 */
export class Player extends EventTarget {
  #node = null;
  #context = null;
  #silent = false;
  #tokens = 0;
  #cuts = new Map();
  gaps = 0;
  gapMs = 0;
  jitterMs = 0;

  /** Jitter buffer in milliseconds, and its maximum after repeated gaps. */
  constructor({ jitterMs = 80, jitterMaxMs = 600 } = {}) {
    super();
    this.options = { jitter: (jitterMs * RATE) / 1000, jitterMax: (jitterMaxMs * RATE) / 1000 };
    this.jitterMs = jitterMs;
  }

  /**
   * Must be called from a user gesture, as browsers require. Without a device ("silent"), pushed audio is dropped until the
   * browser starts after all ("audible"), or a later start succeeds.
   */
  async start() {
    const late = new Promise((resolve) => setTimeout(resolve, START_MS, false));
    const started = this.#running().catch(() => {
      this.ready = null;
      return false;
    });
    const plays = await Promise.race([started, late]);
    this.#silent = !plays;
    if (plays) return;
    this.#tell("silent");
    started.then((startsLate) => {
      if (!startsLate || !this.#silent) return;
      this.#silent = false;
      this.#tell("audible");
    });
  }

  async #running() {
    this.ready ??= this.#start();
    await this.ready;
    if (this.#context.state !== "running") await this.#context.resume();
    return this.#context.state === "running";
  }

  async #start() {
    this.#context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
    await this.#context.audioWorklet.addModule(new URL("player-worklet.js", import.meta.url));
    this.#node = new AudioWorkletNode(this.#context, "player", {
      numberOfInputs: 0,
      outputChannelCount: [1],
      processorOptions: this.options,
    });
    this.#node.port.onmessage = ({ data }) => this.#report(data);
    this.#node.onprocessorerror = () => this.#tell("broken");
    this.#node.connect(this.#context.destination);
  }

  /** Posts to the worklet, but not while it is suspended: it would not read its messages. */
  get #port() {
    return this.#silent ? undefined : this.#node?.port;
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  #report(data) {
    if ("heard" in data) {
      let peak = 0;
      let energy = 0;
      for (const sample of data.heard) {
        peak = Math.max(peak, Math.abs(sample));
        energy += sample * sample;
      }
      this.jitterMs = (data.jitter * 1000) / RATE;
      const level = Math.sqrt(energy / data.heard.length);
      const waitingMs = (data.waiting * 1000) / RATE;
      const playedMs = (data.played * 1000) / RATE;
      const where = { at: data.at, stream: this.#context, id: data.id, playedMs };
      this.#tell("heard", { pcm: data.heard, ...where, peak, level, waitingMs });
    } else if ("gap" in data) {
      this.gaps += 1;
      this.gapMs += (data.gap * 1000) / RATE;
      this.#tell("gap", { id: data.id, ms: (data.gap * 1000) / RATE });
    } else if ("cleared" in data) {
      this.#cuts.get(data.token)(data.cleared);
      this.#cuts.delete(data.token);
    } else if ("started" in data) {
      // Rendered audio is audible after the output latency.
      const latencyMs = 1000 * (this.#context.outputLatency || this.#context.baseLatency || 0);
      this.#tell("started", { id: data.started, latencyMs });
    } else if ("finished" in data) {
      this.#tell("finished", { id: data.finished, playedMs: (data.played * 1000) / RATE });
    }
  }

  /** Queues audio of an item. `base64` is 16-bit little-endian PCM at 24 kHz. Returns its milliseconds. */
  push(id, base64) {
    const samples = samplesOf(base64);
    const ms = (samples.length * 1000) / RATE;
    if (this.#port) this.#port.postMessage({ do: "push", id, samples }, [samples.buffer]);
    else this.#tell("dropped", { id, ms });
    return ms;
  }

  end(id) {
    this.#port?.postMessage({ do: "end", id });
  }

  /** Stops at once. Resolves to the cut items: [{id, playedMs, waitingMs}], the playing one first. */
  async clear() {
    if (!this.#port) return [];
    const token = (this.#tokens += 1);
    const cut = new Promise((resolve) => this.#cuts.set(token, resolve));
    this.#port.postMessage({ do: "clear", token });
    const items = await cut;
    return items.map(({ id, played, waiting }) => ({
      id,
      playedMs: (played * 1000) / RATE,
      waitingMs: (waiting * 1000) / RATE,
    }));
  }
}
