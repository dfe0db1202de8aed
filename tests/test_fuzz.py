"""A small run of `tests/fuzz.py`, with a seed of its own."""

import asyncio

from duologue.client.process import ServerProcess
from tests.fuzz import Attack, errors_in_log, log_size


def test_random_events_requests_and_frames_break_nothing(live_server: ServerProcess) -> None:
    attack, before = Attack(live_server.url, seed=15), log_size(live_server)  # other tests have used the server
    asyncio.run(attack.run(num_events=300, num_requests=60, num_broken=20))
    assert attack.faults == []
    assert errors_in_log(live_server, before) == []
    assert len(attack.answers) > 10  # kinds of refusals
    assert attack.answers["200"]
