"""The harness voicebench calls a session in this process, in simulated time."""

import asyncio
from pathlib import Path

import pytest

import duologue
from duologue.evaluation.simulated_time import run_simulated
from duologue.language.engine import PlainEngine
from duologue.serving.in_process import connect_in_process
from duologue.serving.settings import Settings

pytest.importorskip("voicebench", reason="the harness is not installed: pip install voicebench==0.2.0")
from voicebench.adapters import AdapterError, load_adapter_class
from voicebench.metrics import analyze
from voicebench.runner import SessionRecord, run_session
from voicebench.scenario import load_scenario

from duologue.evaluation.voicebench_adapter import LoopClock, RealtimeAdapter

SCENARIOS = sorted((Path(__file__).parent.parent / "examples" / "voicebench").glob("*.yaml"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_a_scenario_is_played(path: Path, tiny_folder: Path) -> None:
    bot, scenario = duologue.load(tiny_folder), load_scenario(path)
    engine, worker = bot.models.engine, bot.worker
    assert isinstance(engine, PlainEngine)
    assert load_adapter_class(scenario.adapter.type) is RealtimeAdapter

    async def call() -> SessionRecord:
        adapter = RealtimeAdapter(connect=lambda: connect_in_process(bot, Settings(resume_s=0.0)))
        return await run_session(scenario, adapter, LoopClock())

    record = run_simulated(call(), lambda: engine.busy or worker.busy)
    assert not record.truncated
    assert [window.turn.id for window in record.windows] == [turn.id for turn in scenario.turns]
    assert record.packets
    assert record.agent_track.any()
    assert len(analyze(record).turns) == len(scenario.turns)
    spoken = sum(turn.audio.file is not None for turn in scenario.turns)
    assert len(record.clears) >= spoken  # each is heard as speech, so the client drops what it has not played


def test_a_missing_server_is_an_error_of_the_adapter() -> None:
    scenario = load_scenario(SCENARIOS[0])

    async def call() -> None:
        await run_session(scenario, RealtimeAdapter(server="http://127.0.0.1:9"), LoopClock())

    with pytest.raises(AdapterError, match="there is no real-time server"):
        asyncio.run(call())
