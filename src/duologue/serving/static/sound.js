// Conversions between samples, base64 on the wire and WAV files.

/** 16-bit little-endian PCM in base64 -> samples in [-1, 1]. */
export function samplesOf(base64) {
  const bytes = atob(base64);
  const samples = new Float32Array(bytes.length >> 1);
  for (let i = 0; i < samples.length; i += 1) {
    const value = bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8);
    samples[i] = (value < 32768 ? value : value - 65536) / 32768;
  }
  return samples;
}

/** Int16Array -> base64 of its little-endian bytes. */
export function base64Of(pcm) {
  const view = new DataView(new ArrayBuffer(pcm.length * 2));
  pcm.forEach((sample, i) => view.setInt16(2 * i, sample, true));
  let text = "";
  const bytes = new Uint8Array(view.buffer);
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

/** Samples in [-1, 1] -> Int16Array. */
export function pcmOf(samples) {
  return Int16Array.from(samples, (sample) => Math.round(Math.max(-1, Math.min(1, sample)) * 32767));
}

/** Two channels of Int16Array of any length -> Blob of a stereo WAV file; the shorter one ends in silence. */
export function wavOf(left, right, rate) {
  const length = Math.max(left.length, right.length);
  const view = new DataView(new ArrayBuffer(44 + 4 * length));
  const text = (at, word) => [...word].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 4 * length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 2, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, rate * 4, true);
  view.setUint16(32, 4, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 4 * length, true);
  for (let i = 0; i < length; i += 1) {
    view.setInt16(44 + 4 * i, left[i] ?? 0, true);
    view.setInt16(46 + 4 * i, right[i] ?? 0, true);
  }
  return new Blob([view.buffer], { type: "audio/wav" });
}

const ADRIFT_S = 1; // realigns a stream after a pause (sleep, suspended page)

/** The audio of one side on the conversation's clock. The oldest pieces beyond `maxSeconds` are dropped. */
export class Recording {
  #stream = null;
  #offset = 0; // from samples of the stream to samples of the clock

  constructor(rate, maxSeconds = 1800) {
    this.rate = rate;
    this.maxSamples = maxSeconds * rate;
    this.clear();
  }

  clear() {
    this.pieces = []; // {start, pcm}, in samples of the clock
    this.kept = 0;
    this.dropped = false;
  }

  /**
   * Adds audio that ended at about `endS` seconds. `at` is its sample position in its stream, so that pieces of one stream
   * stay contiguous even if a busy page receives them late.
   */
  add(pcm, { endS, at, stream }) {
    const about = Math.round(endS * this.rate) - pcm.length;
    if (stream !== this.#stream || Math.abs(about - at - this.#offset) > ADRIFT_S * this.rate) {
      this.#stream = stream;
      this.#offset = about - at;
    }
    const last = this.pieces.at(-1);
    const start = Math.max(0, at + this.#offset, last ? last.start + last.pcm.length : 0);
    this.pieces.push({ start, pcm });
    this.kept += pcm.length;
    while (this.kept > this.maxSamples) {
      this.kept -= this.pieces.shift().pcm.length;
      this.dropped = true;
    }
  }

  /** Position of the first sample; Infinity without audio. */
  get start() {
    return this.pieces.length ? this.pieces[0].start : Infinity;
  }

  /** Returns the samples from position `from` as an Int16Array. */
  flat(from) {
    const last = this.pieces.at(-1);
    const flat = new Int16Array(last ? Math.max(0, last.start + last.pcm.length - from) : 0);
    for (const { start, pcm } of this.pieces) flat.set(pcm, start - from);
    return flat;
  }
}

/** Maps the server's audio positions (milliseconds of the connection) to the time of sending. */
export class SentSound {
  #ms = 0;
  #marks = []; // {ms, at}

  constructor(rate) {
    this.rate = rate;
  }

  clear() {
    this.#ms = 0;
    this.#marks = [];
  }

  add(pcm, at) {
    this.#ms += (pcm.length * 1000) / this.rate;
    this.#marks.push({ ms: this.#ms, at });
    if (this.#marks.length > 2000) this.#marks.splice(0, 1000); // keeps at least a minute
  }

  /** Returns the time on the clock of `add`, or undefined. */
  when(ms) {
    const mark = this.#marks.find((one) => one.ms >= ms);
    return mark && mark.at - (mark.ms - ms);
  }
}
