// OpenAI's Node SDK, unmodified: one request of each kind. Prints one line of JSON for each.
//
//   node sdk.mjs BASE_URL KEY [realtime]

import net from 'node:net';
import OpenAI, { toFile } from 'openai';

const [baseURL, apiKey, realtime] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const tell = (kind, fields = {}) => console.log(JSON.stringify({ kind, ...fields }));

async function attempt(kind, work) {
  try {
    tell(kind, await work());
  } catch (error) {
    tell(kind, { error: error.message, status: error.status });
  }
}

const messages = [{ role: 'user', content: 'Hello' }];
const neutral = { frequency_penalty: 0, presence_penalty: 0, tool_choice: 'auto', parallel_tool_calls: true, stop: null };
const wav = Buffer.alloc(44 + 3200);
wav.write('RIFF', 0);
wav.writeUInt32LE(36 + 3200, 4);
wav.write('WAVEfmt ', 8);
wav.writeUInt32LE(16, 16);
wav.writeUInt16LE(1, 20);
wav.writeUInt16LE(1, 22);
wav.writeUInt32LE(16000, 24);
wav.writeUInt32LE(32000, 28);
wav.writeUInt16LE(2, 32);
wav.writeUInt16LE(16, 34);
wav.write('data', 36);
wav.writeUInt32LE(3200, 40);

await attempt('models', async () => ({ ids: (await client.models.list()).data.map(({ id }) => id) }));
await attempt('chat', async () => {
  const answer = await client.chat.completions.create({ model: 'gpt-audio', messages, tools: [], ...neutral });
  return { role: answer.choices[0].message.role };
});
await attempt('chat.stream', async () => {
  let chunks = 0;
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const _ of await client.chat.completions.create({ model: 'gpt-audio', messages, ...options })) chunks += 1;
  return { chunks };
});
await attempt('chat.audio', async () => {
  const audio = { voice: 'nova', format: 'wav' };
  const modalities = ['text', 'audio'];
  const answer = await client.chat.completions.create({ model: 'gpt-audio', messages, modalities, audio });
  return { bytes: answer.choices[0].message.audio.data.length };
});
await attempt('speech', async () => {
  const asked = { model: 'gpt-4o-mini-tts', voice: 'onyx', input: 'Hi', response_format: 'pcm' };
  return { bytes: (await (await client.audio.speech.create(asked)).arrayBuffer()).byteLength };
});
await attempt('transcription', async () => {
  const file = await toFile(wav, 'silence.wav');
  return { text: (await client.audio.transcriptions.create({ model: 'whisper-1', file, language: 'en' })).text };
});
await attempt('client_secret', async () => {
  const session = { type: 'realtime', model: 'gpt-realtime', output_modalities: ['text'] };
  const made = await client.realtime.clientSecrets.create({ session });
  return { prefix: made.value.slice(0, 3), modalities: made.session.output_modalities };
});
await attempt('tools', async () => {
  const tools = [{ type: 'function', function: { name: 'get_weather', parameters: {} } }];
  await client.chat.completions.create({ model: 'gpt-audio', messages, tools });
  return {};
});

if (realtime) {
  const { OpenAIRealtimeWS } = await import('openai/realtime/ws');
  // The SDK takes wss: only, as behind a proxy with TLS. Its messages go over plain TCP here.
  const { hostname: host, port } = new URL(baseURL);
  const options = { createConnection: () => net.connect({ host, port }) };
  const socket = new OpenAIRealtimeWS({ model: 'gpt-realtime', options }, client);
  socket.on('error', (error) => tell('realtime', { error: error.message }) ?? process.exit(0));
  socket.on('session.created', () => {
    const item = { type: 'message', role: 'user', content: [{ type: 'input_text', text: 'Hello' }] };
    socket.send({ type: 'session.update', session: { type: 'realtime', output_modalities: ['text'] } });
    socket.send({ type: 'conversation.item.create', item });
    socket.send({ type: 'response.create' });
  });
  socket.on('response.output_text.done', ({ text }) => {
    tell('realtime', { text });
    socket.close();
  });
}
