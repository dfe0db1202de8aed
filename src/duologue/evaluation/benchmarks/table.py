"""The benchmarks that are asked question by question, by their name on the command line."""

from __future__ import annotations

from duologue.evaluation.benchmarks.bigbenchaudio import BIG_BENCH_AUDIO
from duologue.evaluation.benchmarks.openaudiobench import OPENAUDIOBENCH, SPOKEN_QA_BENCHMARK
from duologue.evaluation.benchmarks.seedtts import SEED_TTS_EVAL
from duologue.evaluation.benchmarks.urobench import UROBENCH
from duologue.evaluation.benchmarks.voicebench import VOICEBENCH

BENCHMARKS = {
    one.name: one for one in (VOICEBENCH, OPENAUDIOBENCH, SPOKEN_QA_BENCHMARK, UROBENCH, BIG_BENCH_AUDIO, SEED_TTS_EVAL)
}
