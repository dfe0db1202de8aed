// Runs on the audio thread: plays pushed audio, counts the played samples of every item, and fills a small jitter buffer
// before it starts and after an underrun.

const FADE = 96; // 4 ms at 24 kHz: a cut without a click
const REPORT = 1024; // 43 ms: whole blocks of the audio thread

class PlayerProcessor extends AudioWorkletProcessor {
  constructor({ processorOptions }) {
    super();
    this.smallest = processorOptions.jitter;
    this.largest = processorOptions.jitterMax;
    this.jitter = this.smallest;
    this.items = []; // {id, parts: Float32Array[], offset, waiting, played, ended}
    this.tail = [];
    this.playing = false;
    this.gap = 0; // samples of the current gap
    this.dry = false;
    this.report = new Float32Array(REPORT);
    this.filled = 0;
    this.port.onmessage = ({ data }) => this[data.do](data);
  }

  item(id) {
    let item = this.items.find((one) => one.id === id);
    if (!item) {
      item = { id, parts: [], offset: 0, waiting: 0, played: 0, ended: false, gaps: 0 };
      this.items.push(item);
    }
    return item;
  }

  push({ id, samples }) {
    const item = this.item(id);
    item.parts.push(samples);
    item.waiting += samples.length;
  }

  end({ id }) {
    const item = this.items.find((one) => one.id === id);
    if (item) item.ended = true; // otherwise it was cleared or had no audio
  }

  clear({ token }) {
    const cut = this.items.map(({ id, played, waiting }) => ({ id, played, waiting }));
    if (this.playing && this.items.length > 0) {
      const tail = new Float32Array(Math.min(FADE, this.items[0].waiting));
      this.read(this.items[0], tail, 0);
      this.tail = Array.from(tail, (sample, i) => sample * (1 - i / tail.length));
    }
    this.items = [];
    this.playing = false;
    this.dry = false;
    this.gap = 0;
    this.port.postMessage({ cleared: cut, token });
  }

  read(item, output, from) {
    let at = from;
    while (at < output.length && item.parts.length > 0) {
      const part = item.parts[0];
      const count = Math.min(output.length - at, part.length - item.offset);
      output.set(part.subarray(item.offset, item.offset + count), at);
      at += count;
      item.offset += count;
      if (item.offset === part.length) {
        item.parts.shift();
        item.offset = 0;
      }
    }
    item.waiting -= at - from;
    item.played += at - from;
    return at;
  }

  // Fills the output from the items, in order.
  fill(output) {
    let at = 0;
    while (at < output.length && this.items.length > 0) {
      const item = this.items[0];
      if (item.waiting === 0) {
        this.dry = !item.ended && item.played > 0;
        this.playing = false;
        if (!item.ended) break;
        this.gap = 0;
        if (!item.gaps) this.jitter = Math.max(this.smallest, Math.round(this.jitter * 0.8));
        this.items.shift();
        this.port.postMessage({ finished: item.id, played: item.played });
        continue;
      }
      if (!this.playing) {
        if (item.waiting < this.jitter && !item.ended) break;
        this.begin(item);
      }
      at = this.read(item, output, at);
    }
    if (this.dry) this.gap += output.length - at;
  }

  begin(item) {
    this.playing = true;
    if (item.played === 0) this.port.postMessage({ started: item.id });
    if (!this.dry) return;
    item.gaps += 1;
    this.port.postMessage({ gap: this.gap, id: item.id });
    this.jitter = Math.min(this.largest, Math.round(this.jitter * 1.5));
    this.dry = false;
    this.gap = 0;
  }

  process(_, [[output]]) {
    output.fill(0);
    this.fill(output);
    for (let i = 0; i < output.length && this.tail.length > 0; i += 1) output[i] += this.tail.shift();
    const [item] = this.items;
    if (item || this.filled > 0 || output.some((sample) => sample !== 0)) {
      this.report.set(output, this.filled);
      this.filled += output.length;
      if (this.filled >= REPORT) this.tell(item);
    }
    return true;
  }

  tell(item) {
    const waiting = this.items.reduce((sum, one) => sum + one.waiting, 0);
    const heard = this.report.slice(0, this.filled);
    this.filled = 0;
    const about = { id: item ? item.id : null, played: item ? item.played : 0, waiting, jitter: this.jitter };
    this.port.postMessage({ heard, at: currentFrame + 128 - heard.length, ...about }, [heard.buffer]);
  }
}

registerProcessor("player", PlayerProcessor);
