// Reports how much of each answer has been played, so that the server's history holds what was heard.

const EVERY_MS = 200;

/** @param {Player} player @param {Connection} connection */
export function acknowledge(player, connection) {
  let last = { id: "", playedMs: 0 };
  const send = ({ id, playedMs }) => {
    last = { id, playedMs };
    connection.send({ type: "playback.ack", item_id: id, played_ms: Math.floor(playedMs) });
  };
  player.addEventListener("heard", ({ detail }) => {
    if (detail.id && (detail.id !== last.id || detail.playedMs - last.playedMs >= EVERY_MS)) send(detail);
  });
  player.addEventListener("finished", ({ detail }) => send(detail));
  // Without a loudspeaker, answers are read.
  player.addEventListener("dropped", ({ detail: { id, ms } }) => {
    send({ id, playedMs: ms + (id === last.id ? last.playedMs : 0) });
  });
}
