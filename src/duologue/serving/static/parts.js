// The parts of the page, each made once, and the state that they share.

import { Conversation } from "./conversation.js";
import { Inside } from "./inside.js";
import { Microphone } from "./microphone.js";
import { Player, RATE } from "./playback.js";
import { Connection } from "./protocol.js";
import * as settingsOf from "./settings.js";
import { Recording, SentSound } from "./sound.js";
import { Timeline } from "./timeline.js";
import { View } from "./view.js";

export const began = new Date();
const zero = performance.now();
export const now = () => performance.now() - zero;
export const find = (id) => document.getElementById(id);

export const settings = settingsOf.load();
export const view = new View();
export const inside = new Inside(find("inside"));
export const timeline = new Timeline(find("timeline"), { you: find("meter-you"), they: find("meter-they") });
export const conversation = new Conversation(now);
export const connection = new Connection();
export const microphone = new Microphone();
export const player = new Player();
export const recordings = { you: new Recording(RATE), they: new Recording(RATE) };
export const sent = new SentSound(RATE);

export const state = {
  mode: "off", // "off" | "hands-free" | "holding" | "releasing"
  speaking: false, // an answer is playing
  sending: false, // a question is being sent
  waiting: false, // resend the question when the active answer ends
  question: null, // {endedMs, pauseMs} of the latest question
  model: { name: "", transcribes: true, follows_instructions: false },
};
