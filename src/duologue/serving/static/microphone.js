// The microphone, as 16-bit PCM at 24 kHz in chunks of 32 ms.

import { RATE } from "./playback.js";

export const CHUNK = 768; // 32 ms: one frame of the server's voice detector

const REFUSALS = {
  NotAllowedError:
    "The browser does not let this page use the microphone. Allow it in the address bar and press Talk again, or type below.",
  SecurityError:
    "The browser does not let this page use the microphone. Allow it in the address bar and press Talk again, or type below.",
  NotFoundError: "No microphone was found. Plug one in and press Talk again, or type below.",
  OverconstrainedError: "The chosen microphone is not there any more. Choose another in the settings, or type below.",
  NotReadableError: "Another program holds the microphone. Close that program and press Talk again, or type below.",
};

/** A microphone error with a message for the user. */
export class MicrophoneError extends Error {
  constructor(cause) {
    super(REFUSALS[cause.name] ?? `The microphone could not be opened (${cause.message}). You can type below.`);
    this.name = "MicrophoneError";
  }
}

/** Events: "chunk" {pcm: Int16Array, at, stream, level, peak}, `at` samples after its stream began; "lost" when it is unplugged or taken away. */
export class Microphone extends EventTarget {
  #stream = null;
  #context = null;
  #node = null;
  #flushed = null;
  #generation = 0;

  get open() {
    return this.#node !== null;
  }

  /** @throws {MicrophoneError} */
  async start({ deviceId = "", noiseSuppression = true } = {}) {
    if (this.open) return;
    const generation = (this.#generation += 1);
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new MicrophoneError({
        message: "browsers give it only to pages from this machine or over https",
      });
    }
    let stream;
    let context;
    try {
      stream = await navigator.mediaDevices.getUserMedia({
        audio: {
          channelCount: 1,
          echoCancellation: true,
          autoGainControl: true,
          noiseSuppression,
          ...(deviceId ? { deviceId: { exact: deviceId } } : {}),
        },
      });
      context = new AudioContext({ latencyHint: "interactive" });
      await context.audioWorklet.addModule(new URL("microphone-worklet.js", import.meta.url));
    } catch (cause) {
      stream?.getTracks().forEach((track) => track.stop());
      context?.close();
      throw new MicrophoneError(cause);
    }
    if (generation !== this.#generation) {
      stream.getTracks().forEach((track) => track.stop()); // closed while it was opening
      await context.close();
      return;
    }
    this.#stream = stream;
    this.#context = context;
    this.#node = new AudioWorkletNode(context, "microphone", {
      numberOfOutputs: 0,
      processorOptions: { rate: RATE, chunk: CHUNK },
    });
    this.#node.port.onmessage = ({ data }) => {
      if (data.flushed) this.#flushed?.();
      else this.dispatchEvent(new CustomEvent("chunk", { detail: { ...data, stream: context } }));
    };
    stream.getAudioTracks()[0].onended = () => {
      this.stop();
      this.dispatchEvent(new Event("lost"));
    };
    context.createMediaStreamSource(stream).connect(this.#node);
  }

  /** Sends the partial chunk. */
  async flush() {
    if (!this.#node) return;
    const done = new Promise((resolve) => {
      this.#flushed = resolve;
      setTimeout(resolve, 200);
    });
    this.#node.port.postMessage("flush");
    await done;
  }

  stop() {
    this.#generation += 1;
    this.#stream?.getTracks().forEach((track) => {
      track.onended = null;
      track.stop();
    });
    this.#node?.disconnect();
    this.#context?.close();
    this.#stream = this.#context = this.#node = null;
  }
}
