"""Every kind of data set is imported from a small one; those of a library are written by that library."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from duologue.cli import main
from duologue.config import read_json, read_json_lines
from duologue.training.corpus import Task, TokenCorpus
from duologue.training.data import Clips
from duologue.training.sources.items import ImportOptions
from duologue.training.sources.writer import import_source
from duologue.training.tokenize import TokensRecipe, run_tokens
from duologue.turns import Modality

RATE = 24_000
TEXTS = ["One small step.", "Two green birds.", "Three old men."]


def tone(number: int, seconds: float = 0.5, rate: int = RATE) -> NDArray[np.float32]:
    """A tone whose frequency tells clips apart: 200, 400, 600 Hz."""
    wave: NDArray[np.float32] = (
        0.3 * np.sin(2 * np.pi * 200 * (number + 1) * np.arange(int(seconds * rate)) / rate)
    ).astype(np.float32)
    return wave


def write_tones(folder: Path, suffix: str = "wav") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"clip{number}.{suffix}" for number in range(len(TEXTS))]
    for number, file in enumerate(files):
        soundfile.write(file, tone(number), RATE)
    return files


def pitch(wav: NDArray[np.float32]) -> int:
    """Number of the tone that is heard."""
    power = np.abs(np.fft.rfft(wav * np.hanning(len(wav))))
    return round(int(power.argmax()) * 16_000 / len(wav) / 200) - 1


def said(folder: Path) -> list[tuple[str, int]]:
    """(text, tone) of every clip, in order; the length and the rate are checked."""
    clips = Clips(folder)
    for clip in clips.records:
        assert clip.sample_rate == 16_000
        assert clip.num_samples == pytest.approx(8000, abs=2)
    return [(clip.text, pitch(clips.wav(index))) for index, clip in enumerate(clips.records)]


def dialogues(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("dialogues*.jsonl")) for _, row in read_json_lines(file)]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


EXPECTED = [(text, number) for number, text in enumerate(TEXTS)]


# Tables and folders.


def test_ljspeech(tmp_path: Path) -> None:
    source = tmp_path / "LJ"
    write_tones(source / "wavs")
    lines = [f"clip{number}|raw {number}|{text}" for number, text in enumerate(TEXTS)]
    (source / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = ImportOptions(voice="linda", role="reply")
    done = import_source("ljspeech", source, tmp_path / "corpus", options, valid_share=0)
    assert said(tmp_path / "corpus") == EXPECTED
    assert (done.num_clips, done.skipped, done.num_samples) == (3, {}, 24_000)
    assert {(clip.voice, clip.role, clip.split) for clip in Clips(tmp_path / "corpus").records} == {
        ("linda", "reply", "train")
    }


def test_folder(tmp_path: Path) -> None:
    for file, text in zip(write_tones(tmp_path / "in" / "anna", "flac"), TEXTS, strict=True):
        file.with_suffix(".txt").write_text(f"  {text}\n", encoding="utf-8")
    import_source("folder", tmp_path / "in", tmp_path / "corpus")
    assert said(tmp_path / "corpus") == EXPECTED
    assert {clip.voice for clip in Clips(tmp_path / "corpus").records} == {"anna"}


# Libraries.


@pytest.mark.parametrize("stored", ["parquet", "folder of parquet", "save_to_disk", "dict"])
def test_datasets(tmp_path: Path, stored: str) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    sounds = [{"bytes": file.read_bytes(), "path": None} for file in write_tones(tmp_path / "wavs")]
    rows = {"audio": sounds, "sentence": TEXTS, "client_id": ["a", "b", "c"], "answer_snac": ["1 2", "3", "4"]}
    made = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())
    source = tmp_path / "in"
    if stored == "save_to_disk":
        made.save_to_disk(str(source))
    elif stored == "dict":
        datasets.DatasetDict({"train": made.select([0, 1]), "validation": made.select([2])}).save_to_disk(str(source))
    else:
        source = source / "data" / "train-00000-of-00001.parquet"
        source.parent.mkdir(parents=True)
        made.to_parquet(str(source))
        source = source if stored == "parquet" else tmp_path / "in"
    done = import_source("datasets", source, tmp_path / "corpus", valid_share=0)
    assert said(tmp_path / "corpus") == EXPECTED
    records = Clips(tmp_path / "corpus").records
    assert [clip.voice for clip in records] == ["a", "b", "c"]
    assert [clip.split for clip in records] == ["train", "train", "valid" if stored == "dict" else "train"]
    assert list(done.left_out) == ["answer_snac"]
    with pytest.raises(ValueError, match="codes of another speech tokenizer mean nothing"):
        import_source("datasets", source, tmp_path / "no", ImportOptions(columns={"audio": "answer_snac"}))


def test_voiceassistant(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    rows = {
        "split_name": ["qa_assistant", "identity"],
        "index": ["0", "1"],
        "round": [None, "1"],
        "question": ["Who is there?", "What is your name?"],
        "question_audio": [{"bytes": file.read_bytes(), "path": "a.wav"} for file in write_tones(tmp_path / "w")[:2]],
        "answer": ["A bird.", "I am Omni."],
        "answer_snac": ["# 1 2 3", "# 4 5 6"],
    }
    made = datasets.Dataset.from_dict(rows).cast_column("question_audio", datasets.Audio())
    made.to_parquet(str(tmp_path / "in.parquet"))
    done = import_source("voiceassistant", tmp_path / "in.parquet", tmp_path / "corpus")
    assert said(tmp_path / "corpus") == [("Who is there?", 0)]
    (row,) = dialogues(tmp_path / "corpus")
    assert row["turns"] == [
        {"role": "user", "text": "Who is there?", "clip": ["qa_assistant-0.00"]},
        {"role": "assistant", "text": "A bird."},
    ]
    assert done.skipped == {"the answer names another assistant": 1}
    assert "mean nothing" in done.left_out["answer_snac"]


def test_answers_with_sound(tmp_path: Path) -> None:
    """Sound as bare numbers, as in Instruct_S2S_eu."""
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    rows = {
        "id": ["x"],
        "question": [TEXTS[0]],
        "answer": [TEXTS[1]],
        "question_audio": [tone(0).tolist()],
        "answer_audio": [tone(1).tolist()],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "in"))
    import_source("voiceassistant", tmp_path / "in", tmp_path / "corpus", ImportOptions(sample_rate=RATE))
    assert said(tmp_path / "corpus") == EXPECTED[:2]
    assert [clip.role for clip in Clips(tmp_path / "corpus").records] == ["user", "reply"]


def test_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="the extra data is not installed")
    files = write_tones(tmp_path / "wavs", "flac")
    with webdataset.TarWriter(str(tmp_path / "shard-000.tar")) as writer:
        writer.write({"__key__": "a", "flac": files[0].read_bytes(), "txt": TEXTS[0]})
        writer.write({"__key__": "b", "flac": files[1].read_bytes(), "json": {"text": TEXTS[1], "speaker": "bo"}})
        writer.write({"__key__": "mute", "txt": "No sound."})
    with webdataset.TarWriter(str(tmp_path / "shard-001.tar")) as writer:
        writer.write({"__key__": "c", "flac": files[2].read_bytes(), "txt": TEXTS[2], "units": b"1 2"})
    done = import_source("webdataset", tmp_path, tmp_path / "corpus")
    assert said(tmp_path / "corpus") == EXPECTED
    assert Clips(tmp_path / "corpus").records[1].voice == "bo"
    assert done.skipped == {"there is no sound": 1}
    assert list(done.left_out) == ["units"]
    whole = (tmp_path / "shard-001.tar").read_bytes()
    (tmp_path / "shard-001.tar").write_bytes(whole[:1500])
    cut = import_source("webdataset", tmp_path, tmp_path / "cut")
    assert cut.num_clips == 2
    assert "cannot be read" in cut.left_out["shard-001.tar"]


def test_lhotse(tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse", reason="the extra data is not installed")
    long = tmp_path / "long.wav"
    soundfile.write(long, np.concatenate([tone(number) for number in range(3)]), RATE)
    recording = lhotse.Recording.from_file(long)
    spans = [
        lhotse.SupervisionSegment(f"s{n}", recording.id, start=0.5 * n, duration=0.5, text=text, speaker="sam")
        for n, text in enumerate(TEXTS)
    ]
    cuts = [lhotse.MonoCut("talk", 0, recording.duration, 0, recording=recording, supervisions=spans)]
    fast = recording.perturb_speed(1.1)
    cuts.append(lhotse.MonoCut("fast", 0, fast.duration, 0, recording=fast, supervisions=[spans[0]]))
    cuts.append(lhotse.MonoCut("empty", 0, recording.duration, 0, recording=recording))
    lhotse.CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    done = import_source("lhotse", tmp_path / "cuts.jsonl.gz", tmp_path / "corpus")
    assert said(tmp_path / "corpus") == EXPECTED
    assert [clip.id for clip in Clips(tmp_path / "corpus").records] == ["talk-s0", "talk-s1", "talk-s2"]
    assert sum(done.skipped.values()) == 2


def test_a_command_of_lhotse_is_never_run(tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse", reason="the extra data is not installed")
    source = lhotse.AudioSource("command", [0], f"touch {tmp_path / 'ran'}; cat x.wav")
    recording = lhotse.Recording("r", [source], 16_000, 8000, 0.5)
    span = lhotse.SupervisionSegment("s", "r", 0, 0.5, text="Hello.")
    cut = lhotse.MonoCut("c", 0, 0.5, 0, recording=recording, supervisions=[span])
    lhotse.CutSet.from_cuts([cut]).to_file(tmp_path / "cuts.jsonl")
    done = import_source("lhotse", tmp_path / "cuts.jsonl", tmp_path / "corpus")
    assert done.skipped == {"the recording is a command, not a file": 1}
    assert not (tmp_path / "ran").exists()


# Messages.


def test_swift(tmp_path: Path) -> None:
    write_tones(tmp_path)
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "<audio>"},
                {"role": "assistant", "content": f"<|audio|>{TEXTS[1]}"},
            ],
            "audios": ["clip0.wav", "clip1.wav"],
        },
        {"query": "Hello?", "response": "Hi.", "history": [["One?", "Two."]]},
        {"messages": [{"role": "user", "content": "<audio>What is it?"}, {"role": "assistant", "content": "A bird."}]},
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"messages": 3},
    ]
    rows[2]["audios"] = ["clip2.wav"]
    source = write_lines(tmp_path / "in.jsonl", rows)
    done = import_source("ms-swift", source, tmp_path / "corpus")
    assert said(tmp_path / "corpus") == [("", 0), (TEXTS[1], 1)]
    spoken, written = dialogues(tmp_path / "corpus")
    assert [turn["role"] for turn in spoken["turns"]] == ["user", "assistant"]
    assert [turn["text"] for turn in written["turns"]] == ["One?", "Two.", "Hello?", "Hi."]
    assert sum(done.skipped.values()) == 3
    again = import_source("ms-swift", source, tmp_path / "other", ImportOptions(transcripts=True))
    assert (again.num_dialogues, again.num_clips) == (3, 3)


def test_llama_factory(tmp_path: Path) -> None:
    write_tones(tmp_path / "sounds")
    info = {
        "mine": {
            "file_name": "mine.json",
            "formatting": "sharegpt",
            "columns": {"messages": "talk", "audios": "sounds"},
            "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "it"},
        },
        "plain": {"file_name": "plain.json", "columns": {"prompt": "ask", "response": "say"}},
        "far": {"hf_hub_url": "someone/something"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    talk = [{"who": "me", "what": "<audio>"}, {"who": "it", "what": TEXTS[1]}]
    token = json.dumps({"path": "sounds/clip0.wav", "text": TEXTS[0], "token": [1, 2]})
    (tmp_path / "mine.json").write_text(json.dumps([{"talk": talk, "sounds": [token]}]))
    (tmp_path / "plain.json").write_text(json.dumps([{"ask": "Hello?", "input": "Now.", "say": "Hi."}]))
    done = import_source("llama-factory", tmp_path, tmp_path / "corpus")
    assert said(tmp_path / "corpus") == EXPECTED[:1]
    assert [[turn["text"] for turn in row["turns"]] for row in dialogues(tmp_path / "corpus")] == [
        [TEXTS[0], TEXTS[1]],
        ["Hello? Now.", "Hi."],
    ]
    assert list(done.left_out) == ["far"]


def test_llama_omni(tmp_path: Path) -> None:
    write_tones(tmp_path)
    conversation = [
        {"from": "human", "text": TEXTS[0], "speech": "clip0.wav"},
        {"from": "gpt", "text": TEXTS[1], "speech": "clip1.wav", "tgt_units": [1, 2, 3]},
    ]
    vocal = {"from": "human", "value": "<speech>"}, {"from": "gpt", "value": TEXTS[2]}
    rows = [
        {"id": "omni", "conversation": conversation},
        {"id": "vocal", "speech": "clip2.wav", "conversations": vocal, "units": "u.npy"},
    ]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    options = ImportOptions(transcripts=True)
    done = import_source("llama-omni", tmp_path / "in.json", tmp_path / "corpus", options)
    assert said(tmp_path / "corpus") == [*EXPECTED[:2], ("", 2)]
    assert [row["id"] for row in dialogues(tmp_path / "corpus")] == ["omni", "vocal"]
    assert set(done.left_out) == {"units", "tgt_units"}


# Two speakers.


@pytest.mark.parametrize("aligned", [True, False], ids=["both aligned", "the model aligned"])
def test_moshi(tmp_path: Path, aligned: bool) -> None:
    """The model greets, the user asks, the model answers, the user says mhm, the model goes on, the user leaves."""
    sound = np.zeros((int(12 * RATE), 2), np.float32)
    spans = [
        (0, 0.0, "Hello."),
        (1, 2.0, "Who"),
        (0, 5.0, "A bird"),
        (1, 5.2, "mhm"),
        (0, 6.0, "it is."),
        (1, 10.0, "Bye"),
    ]
    for channel, start, _ in spans:
        at, short = int(start * RATE), 0.3 if start == 5.2 else 1.0
        sound[at : at + int(short * RATE), channel] = tone(channel, short)
    soundfile.write(tmp_path / "talk.wav", sound, RATE)
    names = ("SPEAKER_MAIN", "SPEAKER_OTHER")
    words = [
        [text, [start, start + (0.3 if text == "mhm" else 1.0)], names[channel]]
        for channel, start, text in spans
        if channel == 0 or aligned
    ]
    (tmp_path / "talk.json").write_text(json.dumps({"alignments": words}))
    source = write_lines(
        tmp_path / "in.jsonl", [{"path": "talk.wav", "duration": 12}, {"path": "no.wav", "duration": 1}]
    )
    done = import_source("moshi", source, tmp_path / "corpus")
    (row,) = dialogues(tmp_path / "corpus")
    assert [turn["text"] for turn in row["turns"]] == ["Who" if aligned else "", "A bird it is."]
    clips = Clips(tmp_path / "corpus")
    assert [pitch(clips.wav(index)) for index in range(2)] == [1, 0]  # the user is right, the model left
    assert [clip.num_samples / 16_000 for clip in clips.records] == pytest.approx([1.2, 2.2], abs=0.05)
    assert done.skipped == {"the sound file is missing": 1}


def test_an_imported_corpus_becomes_tokens(tmp_path: Path, tiny_folder: Path) -> None:
    write_tones(tmp_path)
    soundfile.write(tmp_path / "long.wav", tone(1, 4.0), RATE)
    talk = [{"role": "user", "content": "<audio>"}, {"role": "assistant", "content": "<audio>Two birds."}]
    written = [talk[0], {"role": "assistant", "content": "Two birds."}]
    rows = [{"messages": talk, "audios": ["clip0.wav", "long.wav"]}, {"messages": written, "audios": ["clip1.wav"]}]
    source = write_lines(tmp_path / "in.jsonl", rows)
    import_source("ms-swift", source, tmp_path / "corpus", valid_share=0)
    parts: dict[str, Any] = {name: str(tiny_folder / name) for name in ("tokenizer", "vocabulary")}
    recipe = TokensRecipe((str(tmp_path / "corpus"),), **parts, out=str(tmp_path / "tokens"))
    assert run_tokens(recipe).tasks == {"clip": 3, "chat": 2}
    tasks: tuple[Task, ...] = ("chat",)
    chats = TokenCorpus(tmp_path / "tokens", tasks=tasks)
    modalities = [[labeled.turn.modality for labeled in chat.turns] for chat in chats]
    assert modalities == [[Modality.SPEECH, Modality.INTERLEAVED], [Modality.SPEECH, Modality.TEXT]]


# Faults.


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Eleven entries, of which three are good."""
    source = tmp_path / "faulty"
    files = write_tones(source / "wavs")
    nan = tone(0)
    nan[100] = np.nan
    soundfile.write(source / "wavs" / "nan.wav", nan, RATE, subtype="FLOAT")
    (source / "wavs" / "noise.wav").write_bytes(b"no sound at all, only text" * 99)
    soundfile.write(source / "wavs" / "whole.flac", tone(0, 3.0), RATE)
    whole = (source / "wavs" / "whole.flac").read_bytes()
    (source / "wavs" / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (source / "wavs" / "none.wav").write_bytes(b"")
    soundfile.write(source / "wavs" / "long.wav", tone(0, 3.0), RATE)
    lines = [f"{file.stem}|{text}" for file, text in zip(files, TEXTS, strict=True)]
    lines[1:1] = ["gone|Missing.", "nan|Not a number.", "noise|Corrupt.", "cut|Cut."]
    lines[6:6] = ["none|Empty.", "clip0|Double.", "long|Long."]
    lines.append("whole| ")
    (source / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return source


def test_what_is_skipped_and_why(faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "import", "ljspeech", str(faulty), "-o", str(tmp_path / "corpus"), "--max-s", "2"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert said(tmp_path / "corpus") == EXPECTED
    reasons = {row["id"]: row["reason"] for _, row in read_json_lines(tmp_path / "corpus" / "skipped-00000.jsonl")}
    for name, reason in (
        ("gone", "missing"),
        ("nan", "NaN"),
        ("noise", "not a sound file"),
        ("cut", "damaged"),
        ("none", "empty"),
        ("long", "longer than 2 s"),
        ("clip0", "the id came before"),
        ("whole", "transcript is empty"),
    ):
        assert reason in reasons.pop(name)
    assert not reasons
    assert sum(report["skipped"].values()) == 8
    assert (report["num_items"], report["num_clips"]) == (11, 3)
    assert main(command) == 0
    assert "3 clips" in (out := capsys.readouterr().out)
    assert "skipped 1: the transcript is empty" in out
    assert said(tmp_path / "corpus") == EXPECTED


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "import.json"}


def test_killed_and_resumed(faulty: Path, tmp_path: Path) -> None:
    """A process is killed between two shards; the corpus is then that of an import without a break."""
    program = (
        "import sys, time\n"
        "from duologue.training.sources import writer\n"
        "close = writer._Shard.close\n"
        "def slow(self, *args):\n"
        "    if self._done.num_shards == 2:\n"
        "        self._path('clips', 'jsonl').write_text('half')\n"
        "        print('here', flush=True); time.sleep(600)\n"
        "    return close(self, *args)\n"
        "writer._Shard.close = slow\n"
        "writer.import_source('ljspeech', sys.argv[1], sys.argv[2], shard_items=3)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(faulty), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=env,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == b"here"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert read_json(folder / "import.json")["num_items"] == 6
    assert (folder / "clips-00002.jsonl").read_text() == "half"
    resumed = import_source("ljspeech", faulty, folder, shard_items=3)
    whole = import_source("ljspeech", faulty, tmp_path / "whole", shard_items=3)
    assert resumed == whole
    assert contents(folder) == contents(tmp_path / "whole")
    assert len(contents(folder)) > 4


def test_a_source_that_grows_and_one_that_changes(faulty: Path, tmp_path: Path) -> None:
    first = import_source("ljspeech", faulty, tmp_path / "corpus")
    table = faulty / "metadata.csv"
    table.write_text(table.read_text() + "wavs/clip2|More.\n")
    grown = import_source("ljspeech", faulty, tmp_path / "corpus")
    assert grown.num_clips == first.num_clips + 1
    assert [clip.text for clip in Clips(tmp_path / "corpus").records].count("More.") == 1
    table.write_text("new|Other.\n" + table.read_text())
    with pytest.raises(ValueError, match="has changed since"):
        import_source("ljspeech", faulty, tmp_path / "corpus")
    with pytest.raises(ValueError, match="was imported as ljspeech"):
        import_source("folder", faulty, tmp_path / "corpus")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "clips-0.jsonl").write_text("")
    with pytest.raises(ValueError, match="not imported"):
        import_source("ljspeech", faulty, tmp_path / "made")


def test_nothing_imported_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metadata.csv").write_text("a|Missing.\n")
    assert main(["data", "import", "ljspeech", str(tmp_path), "-o", str(tmp_path / "corpus")]) == 1
    assert "skipped 1: the sound file is missing" in capsys.readouterr().out
    assert main(["data", "import", "no-such-kind", str(tmp_path), "-o", str(tmp_path / "x")]) == 2
    assert main(["data", "import", "ljspeech", str(tmp_path / "nowhere"), "-o", str(tmp_path / "y")]) == 2


def test_a_missing_library_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    assert main(["data", "import", "webdataset", str(tmp_path), "-o", str(tmp_path / "corpus")]) == 2
    assert "webdataset is not installed: run pip install" in capsys.readouterr().err
