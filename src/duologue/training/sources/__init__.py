"""Sources of training data: one reader for each kind of data set, one writer of audio corpora (`writer.py`).

A reader takes a path and `ImportOptions` and returns a `Source` (`items.py`). To add a kind, write its reader and
name it here.
"""

KINDS = {
    "ljspeech": ("tables.read_ljspeech", "metadata.csv (id|text|normalized text) beside wavs/"),
    "folder": ("tables.read_folder", "sound files, each with a .txt of the same name"),
    "datasets": ("arrow.read_datasets", "Hugging Face data set on disk: parquet, or a folder of save_to_disk"),
    "voiceassistant": ("arrow.read_exchanges", "VoiceAssistant-400K columns: question_audio, question, answer"),
    "webdataset": ("tar.read_webdataset", "tar shards: KEY.wav or .flac beside KEY.txt or .json"),
    "lhotse": ("cuts.read_lhotse", "manifest of cuts with supervisions"),
    "ms-swift": ("messages.read_swift", 'jsonl {"messages", "audios"} of ms-swift'),
    "llama-factory": ("messages.read_factory", "dataset_info.json of LLaMA-Factory"),
    "llama-omni": ("messages.read_omni", "JSON of LLaMA-Omni, InstructS2S-200K, VocalNet"),
    "moshi": ("stereo.read_moshi", "jsonl of moshi-finetune: stereo sound, left the model, right the user"),
}
"""The reader of each kind, and what it reads. Readers import their libraries themselves."""
