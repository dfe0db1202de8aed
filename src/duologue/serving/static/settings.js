// The user's settings, stored in the browser, and their translation to the protocol.

const PLACE = "duologue.settings";
const KEY_PLACE = "duologue.key"; // only while the tab is open
export const INCLUDE = ["duologue.tokens", "duologue.timings", "duologue.playback"];
const LOGPROBS = "item.input_audio_transcription.logprobs";

/** Returns a storage of the browser, or null: a page in a frame of another site may have none. */
function storage(name) {
  try {
    return globalThis[name];
  } catch {
    return null;
  }
}

export const DEFAULTS = {
  voice: "",
  speed: 1,
  modality: "audio",
  instructions: "",
  detection: "server_vad",
  silence: 500,
  threshold: 0.5,
  eagerness: "auto",
  interrupt: true,
  transcribe: true,
  device: "",
  noiseSuppression: true,
  hold: false, // the talk button: held while speaking, or clicked to begin and to end
};

export function load() {
  const key = storage("sessionStorage")?.getItem(KEY_PLACE) ?? "";
  try {
    const kept = JSON.parse(storage("localStorage")?.getItem(PLACE) ?? "{}");
    const known = Object.entries(kept).filter(([name, value]) => typeof value === typeof DEFAULTS[name]);
    return { ...DEFAULTS, ...Object.fromEntries(known), key };
  } catch {
    return { ...DEFAULTS, key };
  }
}

export function keep({ key, ...settings }) {
  storage("localStorage")?.setItem(PLACE, JSON.stringify(settings));
  storage("sessionStorage")?.setItem(KEY_PLACE, key);
}

/** Returns `turn_detection` for hands-free mode. */
export function detection(settings) {
  const both = { create_response: true, interrupt_response: settings.interrupt };
  if (settings.detection === "semantic_vad") return { type: "semantic_vad", eagerness: settings.eagerness, ...both };
  return {
    type: "server_vad",
    threshold: settings.threshold,
    silence_duration_ms: settings.silence,
    prefix_padding_ms: 300,
    ...both,
  };
}

/**
 * Returns the updates that configure a new session for a model: {what, session}. They are sent separately, so that one refused update
 * does not block the others.
 */
export function updates(settings, handsFree, { transcribes, follows_instructions: follows }) {
  const format = { type: "audio/pcm", rate: 24000 };
  const list = [
    {
      what: "the basics",
      session: {
        output_modalities: [settings.modality],
        audio: {
          input: { format, turn_detection: handsFree ? detection(settings) : null },
          output: { format },
        },
      },
    },
    { what: "the inside of answers", session: { include: INCLUDE } },
    { what: "speed", session: { audio: { output: { speed: settings.speed } } } },
  ];
  if (transcribes) {
    const transcription = settings.transcribe ? { model: "default" } : null;
    list.push({ what: "transcription", session: { audio: { input: { transcription } } } });
    list.push({ what: "how clearly words were heard", session: { include: [...INCLUDE, LOGPROBS] } });
  }
  if (settings.voice) list.push({ what: "voice", session: { audio: { output: { voice: settings.voice } } } });
  if (settings.instructions && follows) list.push({ what: "instructions", session: { instructions: settings.instructions } });
  return list.map(({ what, session }) => ({ what, session: { type: "realtime", ...session } }));
}

/** Returns the pause that ends a turn, in milliseconds; an estimate for semantic_vad. */
export function silenceMs(settings) {
  return settings.detection === "server_vad" ? settings.silence : DEFAULTS.silence;
}

/** Fills the fields, shows the words of the form, and calls `changed(name)` on every change. */
export function bind(fields, form, settings, changed) {
  const words = {
    speed: (value) => `${Number(value).toFixed(2)} ×`,
    silence: (value) => `${value} ms`,
    threshold: (value) => Number(value).toFixed(2),
  };
  const show = () => {
    for (const [name, text] of Object.entries(words)) form.elements[`${name}Words`].value = text(settings[name]);
    for (const row of form.querySelectorAll("[data-for]")) row.hidden = row.dataset.for !== settings.detection;
  };
  for (const [name, value] of Object.entries(settings)) {
    const field = fields.find((one) => one.name === name);
    if (!field) continue;
    if (field.type === "checkbox") field.checked = value;
    else field.value = value;
    field.addEventListener(field.type === "range" || field.type === "checkbox" ? "input" : "change", () => {
      settings[name] = field.type === "checkbox" ? field.checked : field.type === "range" ? Number(field.value) : field.value;
      keep(settings);
      show();
    });
    field.addEventListener("change", () => changed(name));
  }
  show();
}

/** Fills a select and keeps the chosen value. */
export function offer(select, values, chosen) {
  const options = [...new Map(values).entries()].map(([value, words]) => new Option(words, value, false, value === chosen));
  select.replaceChildren(...options);
  if (![...select.options].some((option) => option.value === chosen)) select.selectedIndex = 0;
}
