// Runs on the audio thread: one channel, resampled, cut into chunks of 32 ms (one frame of the server's voice detector).

import { Resampler } from "./resampler.js";

class MicrophoneProcessor extends AudioWorkletProcessor {
  constructor({ processorOptions }) {
    super();
    this.resampler = new Resampler(sampleRate, processorOptions.rate);
    this.chunk = new Int16Array(processorOptions.chunk);
    this.filled = 0;
    this.sent = 0;
    this.port.onmessage = () => {
      this.send(this.chunk.slice(0, this.filled));
      this.filled = 0;
      this.port.postMessage({ flushed: true });
    };
  }

  send(pcm) {
    if (pcm.length === 0) return;
    let peak = 0;
    let energy = 0;
    for (const sample of pcm) {
      const value = sample / 32768;
      peak = Math.max(peak, Math.abs(value));
      energy += value * value;
    }
    const at = this.sent;
    this.sent += pcm.length;
    this.port.postMessage({ pcm, at, peak, level: Math.sqrt(energy / pcm.length) }, [pcm.buffer]);
  }

  process([channels]) {
    if (!channels || channels.length === 0) return true;
    let mono = channels[0];
    if (channels.length > 1) {
      mono = new Float32Array(channels[0].length);
      for (const channel of channels) for (let i = 0; i < mono.length; i += 1) mono[i] += channel[i] / channels.length;
    }
    for (const sample of this.resampler.process(mono)) {
      this.chunk[this.filled] = Math.round(Math.max(-1, Math.min(1, sample)) * 32767);
      this.filled += 1;
      if (this.filled === this.chunk.length) {
        this.send(this.chunk.slice());
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("microphone", MicrophoneProcessor);
