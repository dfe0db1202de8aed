// A realtime session of @openai/agents, told by lines of JSON on standard input what to do; tells what it hears.
//
//   node talk.mjs URL KEY

import readline from 'node:readline';
import { RealtimeAgent, RealtimeSession } from '@openai/agents/realtime';

const [url, apiKey] = process.argv.slice(2);
const agent = new RealtimeAgent({ name: 'Assistant', instructions: 'You are brief.' });
const session = new RealtimeSession(agent, { transport: 'websocket', model: 'gpt-realtime' });
const tell = (type, fields = {}) => console.log(JSON.stringify({ type, ...fields }));

session.on('audio', (event) => tell('audio', { num_bytes: event.data.byteLength }));
session.on('audio_interrupted', () => tell('audio_interrupted'));
session.on('agent_end', (_context, _agent, output) => tell('agent_end', { output }));
session.on('error', ({ error }) => tell('error', { error: error instanceof Error ? error.message : JSON.stringify(error) }));

const acts = {
  say: ({ pcm }) => {
    const bytes = Buffer.from(pcm, 'base64');
    for (let start = 0; start < bytes.length; start += 9600) {
      const chunk = Uint8Array.from(bytes.subarray(start, start + 9600));
      session.sendAudio(chunk.buffer);
    }
  },
  write: ({ text }) => session.sendMessage(text),
  interrupt: () => session.interrupt(),
  history: () => tell('history', { items: session.history }),
};

await session.connect({ apiKey, url });
tell('connected');
for await (const line of readline.createInterface({ input: process.stdin })) {
  const { act, ...fields } = JSON.parse(line);
  acts[act](fields);
}
session.close();
