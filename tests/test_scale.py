"""Cells without Ray: their settings, the joined metrics, the arguments of the command and the Kubernetes manifest."""

from __future__ import annotations

import asyncio
import copy
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from duologue.cli import main
from duologue.cli.scale import CELL_ARGUMENTS, ServedCell, build_cell, cell_settings, read_arguments
from duologue.cli.serve import KEYS_VARIABLE
from duologue.language.talker import TalkerEngine
from duologue.scale.expositions import join_expositions
from duologue.scale.settings import CellSettings
from duologue.serving.app import create_app
from duologue.serving.metrics import Metrics
from duologue.serving.settings import Settings
from tests.live_server import scripted_bot
from tests.serving import running
from tests.text_model_server import endpoint, words

ROOT = Path(__file__).parent.parent
KEY = "a-key-of-the-tests"
MANIFEST = yaml.safe_load((ROOT / "deploy" / "kuberay.yaml").read_text(encoding="utf-8"))
SCHEMA = yaml.safe_load((Path(__file__).parent / "rayservice_schema.yaml").read_text(encoding="utf-8"))


def test_the_metrics_of_two_cells_are_one_page() -> None:
    pages = {}
    for name, num in (("b", 2), ("a", 1)):
        metrics = Metrics()
        metrics.sessions.inc(num)
        metrics.refused.labels("full").inc(10 * num)
        metrics.first_audio.labels("realtime").observe(0.25)
        metrics.errors.labels('odd "} name\\').inc()
        pages[name] = metrics.exposition().decode()
    families = list(text_string_to_metric_families(join_expositions(pages)))
    assert len({family.name for family in families}) == len(families), "a family is described once"
    assert all(sample.labels["cell"] in "ab" for family in families for sample in family.samples)

    def values(name: str, **labels: str) -> dict[str, float]:
        found = (sample for family in families for sample in family.samples if sample.name == name)
        wanted = [one for one in found if labels.items() <= one.labels.items()]
        return {one.labels["cell"]: one.value for one in wanted}

    assert values("duologue_sessions") == {"a": 1.0, "b": 2.0}
    assert values("duologue_refused_total", reason="full") == {"a": 10.0, "b": 20.0}
    assert values("duologue_time_to_first_audio_seconds_bucket", le="0.3") == {"a": 1.0, "b": 1.0}
    assert values("duologue_errors_total", code='odd "} name\\') == {"a": 1.0, "b": 1.0}
    assert join_expositions({}) == ""
    with pytest.raises(ValueError, match="is not a sample"):
        join_expositions({"a": "<html>"})


def test_a_cell_shows_the_gathered_page(tiny_folder: Path) -> None:
    bot, _ = scripted_bot(tiny_folder)
    with running(bot) as server, server.client() as client:
        assert "\nduologue_sessions 0.0\n" in client.get("/metrics").text

        async def gather() -> bytes:
            return b"all cells\n"

        server.service.gather_metrics = gather
        assert client.get("/metrics").text == "all cells\n"


def test_a_served_cell(tiny_folder: Path) -> None:
    app = create_app(scripted_bot(tiny_folder)[0], Settings())
    cell = ServedCell(app)
    assert (cell.asgi, cell.gather_metrics, cell.num_active()) == (app, None, 0)

    async def page() -> bytes:  # the tasks of the event loop are among the metrics
        return cell.exposition()

    assert b"duologue_sessions 0.0" in asyncio.run(page())
    with app.state.service.admission.request():
        assert cell.num_active() == 1
    assert not app.state.service.admission.draining.is_set()
    cell.drain()
    assert app.state.service.admission.draining.is_set()


def test_cells_fit_the_server() -> None:
    settings = Settings(max_sessions=10, max_requests=4, drain_s=7.0)
    cells = cell_settings(settings, {"replicas": 3, "max_replicas": None, "gpus": None, "cpus": 2.0}, "cuda:0")
    assert cells == CellSettings(3, None, 10, 4, gpus=1.0, cpus=2.0, drain_s=7.0)
    options = cells.options()
    assert options["num_replicas"] == 3
    assert options["ray_actor_options"] == {"num_cpus": 2.0, "num_gpus": 1.0}
    assert options["graceful_shutdown_timeout_s"] == 7.0
    # An operator's requests find a place in a full cell, which itself refuses the 11th conversation.
    assert options["max_ongoing_requests"] > 10 + 4
    assert cell_settings(settings, {"gpus": 0.25}, "cuda").gpus == 0.25
    assert cell_settings(settings, {}, "cpu").gpus == 0.0


def test_cells_follow_the_conversations() -> None:
    options = CellSettings(2, 5, capacity=10, target=0.7).options()
    assert "num_replicas" not in options
    scaling = options["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (2, 5)
    assert scaling["target_ongoing_requests"] == pytest.approx(7.0)
    with pytest.raises(ValueError, match="maximum of 1 replicas is below the 2"):
        CellSettings(2, 1)


def test_the_router_exists_where_the_options_name_it() -> None:
    module, _, name = CellSettings().options()["request_router_config"]["request_router_class"].partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    assert f"class {name}(RequestRouter)" in Path(spec.origin).read_text(encoding="utf-8")


def test_bad_arguments(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    if importlib.util.find_spec("ray") is None:
        assert main(["scale"]) == 2
        assert 'ray is not installed: run pip install -e ".[serve,scale]"' in capsys.readouterr().err
    for argv, sentence in (
        (["--replicas", "0"], "not a positive whole number"),
        (["--host", "0.0.0.0"], "needs API keys"),
        (["--talker", "runs/talker"], "--talker needs --text-model"),
        (["--replicas", "3", "--max-replicas", "2"], "maximum of 2 replicas is below the 3"),
    ):
        assert main(["scale", *argv]) == 2
        assert sentence in capsys.readouterr().err


def test_arguments_of_a_configuration_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, KEY)
    given = {"device": "cuda", "max_sessions": 5, "replicas": 2, "drain_s": 9.0, "engine": "plain"}
    model, cells, settings = read_arguments(given)
    assert model == {"model": "pocket", "device": "cuda", "engine": "plain"}
    assert (settings.api_keys, settings.max_sessions, settings.drain_s) == ((KEY,), 5, 9.0)
    assert cells == CellSettings(2, capacity=5, gpus=1.0, drain_s=9.0)
    with pytest.raises(ValueError, match="a cell has no argument max_session"):
        read_arguments({"max_session": 5})
    monkeypatch.delenv(KEYS_VARIABLE)
    with pytest.raises(ValueError, match="needs API keys"):
        read_arguments({})


def test_a_cell_is_loaded_as_the_server_loads_it(tiny_folder: Path) -> None:
    args = {**dict.fromkeys(CELL_ARGUMENTS), "model": str(tiny_folder), "device": "cpu", "engine": "plain"}
    cell = build_cell(args, Settings(max_sessions=3))
    bot = cell.asgi.state.service.bot
    assert (bot.models.card.name, bot.models.engine.max_sessions) == ("tiny", 3)


def test_a_cell_with_a_text_model() -> None:
    args = {**dict.fromkeys(CELL_ARGUMENTS), "model": "pocket", "device": "cpu", "engine": "plain"}
    with endpoint(words("It is Paris.")) as script:
        cell = build_cell({**args, "text_model": script.url, "text_model_name": "scripted"}, Settings(max_sessions=1))
        engine = cell.asgi.state.service.bot.models.engine
    assert isinstance(engine, TalkerEngine)
    assert engine.text_model.name == "scripted"


# The manifest.


def test_the_manifest_is_a_ray_service() -> None:
    jsonschema.validate(MANIFEST, SCHEMA)


@pytest.mark.parametrize(
    "path", ["spec.serveConfigV2", "spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.image", "kind"]
)
def test_the_schema_sees_faults(path: str) -> None:
    for renamed in (False, True):
        broken = copy.deepcopy(MANIFEST)
        parent: Any = broken
        *way, last = path.split(".")
        for step in way:
            parent = parent[int(step) if step.isdecimal() else step]
        value = parent.pop(last)
        if renamed:
            parent[f"{last}s"] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


def test_the_application_of_the_manifest_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, KEY)
    config = yaml.safe_load(MANIFEST["spec"]["serveConfigV2"])
    (one,) = config["applications"]
    module, _, name = one["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    model, cells, settings = read_arguments(one["args"])
    assert (model["device"], cells.gpus, settings.store) == ("cuda", 1.0, "redis://redis:6379/0")

    cluster = MANIFEST["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (worker,) = pod["containers"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    # One cell fills a worker, so that the numbers of workers are those of cells.
    assert (int(worker["resources"]["requests"]["nvidia.com/gpu"]), int(worker["resources"]["requests"]["cpu"])) == (
        cells.gpus,
        cells.cpus,
    )
    assert (group["minReplicas"], group["maxReplicas"]) == (cells.replicas, cells.max_replicas)
    assert pod["terminationGracePeriodSeconds"] > settings.drain_s
    assert MANIFEST["spec"]["rayClusterDeletionDelaySeconds"] >= settings.drain_s
    for container in (head, worker):
        assert config["http_options"]["port"] in [port["containerPort"] for port in container["ports"]]
        assert KEYS_VARIABLE in [variable["name"] for variable in container["env"]]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"\nray=={cluster['rayVersion']}\n" in constraints
