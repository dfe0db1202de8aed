// A streaming resampler for two integer rates: polyphase windowed sinc, without drift. The output does not depend on the
// chunking. Used by the microphone's worklet.

const ZERO_CROSSINGS = 16;

function divisor(a, b) {
  return b === 0 ? a : divisor(b, a % b);
}

export class Resampler {
  /** @param {number} rateIn samples per second that come in  @param {number} rateOut samples per second that go out */
  constructor(rateIn, rateOut) {
    const common = divisor(rateIn, rateOut);
    this.up = rateOut / common;
    this.down = rateIn / common;
    const cutoff = Math.min(1, rateOut / rateIn) * 0.95;
    this.half = Math.ceil(ZERO_CROSSINGS / cutoff);
    this.taps = Array.from({ length: this.up }, (_, phase) => this.#row(phase / this.up, cutoff));
    this.waiting = new Float32Array(this.half); // silence before the first sample centers the first row on it
    this.phase = 0;
  }

  #row(fraction, cutoff) {
    const row = new Float32Array(2 * this.half + 1);
    let sum = 0;
    for (let i = 0; i < row.length; i += 1) {
      const time = i - this.half - fraction;
      const angle = Math.PI * time * cutoff;
      const sinc = angle === 0 ? 1 : Math.sin(angle) / angle;
      const window = Math.abs(time) > this.half ? 0 : Math.cos((Math.PI * time) / (2 * (this.half + 1))) ** 2;
      row[i] = sinc * window;
      sum += row[i];
    }
    return row.map((tap) => tap / sum);
  }

  /** @param {Float32Array} input  @returns {Float32Array} the output that is ready */
  process(input) {
    if (this.up === 1 && this.down === 1) return input.slice();
    const samples = new Float32Array(this.waiting.length + input.length);
    samples.set(this.waiting);
    samples.set(input, this.waiting.length);
    const output = [];
    let start = 0;
    while (start + 2 * this.half + 1 <= samples.length) {
      const row = this.taps[this.phase];
      let sum = 0;
      for (let i = 0; i < row.length; i += 1) sum += row[i] * samples[start + i];
      output.push(sum);
      this.phase += this.down;
      start += Math.floor(this.phase / this.up);
      this.phase %= this.up;
    }
    this.waiting = samples.slice(start);
    return Float32Array.from(output);
  }
}
