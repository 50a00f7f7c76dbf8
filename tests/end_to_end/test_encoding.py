"""A set is encoded in parts, a damaged file is made again, and a run says what it uses."""

import pytest
from settings import QUICK


@pytest.mark.slow
def test_parts_are_encoded_checked_and_trained_on(launch, clips, tmp_path):
    settings = [f"data.instance_data_root={clips}", "data.max_bad_fraction=0.5"]
    (clips / "videos" / "3.mp4").write_bytes(b"no video")
    parts = launch("-m", "task=encode", "data.shard=1/2,2/2", *settings, cwd=tmp_path)
    assert parts.returncode == 0, parts.stderr
    logs = [path.read_text() for path in sorted(tmp_path.rglob("log.txt"))]
    assert len(logs) == 2 and all("encode  3 clips; 0 of 3 found in the cache" in x for x in logs)
    assert sum("videos.txt:4 3.mp4 cannot be opened as a video" in log for log in logs) == 1

    cache = tmp_path / "outputs" / "cache"
    files = sorted((cache / "latents").rglob("*.safetensors"))
    assert len(files) == 5
    content = bytearray(files[2].read_bytes())
    content[-9] ^= 1
    files[2].write_bytes(content)
    checked = launch("task=cache", "task.do=verify", cwd=tmp_path).stdout
    assert f"damaged outputs/cache/latents/{files[2].parent.name}/{files[2].name}" in checked
    assert not files[2].is_file() and files[1].is_file()

    train = [*QUICK, *settings, "output_dir=outputs/run", "train.max_train_steps=3"]
    trained = launch(*train, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "encode  2 clips; 4 of 6 found in the cache" in trained.stdout, "the bad one is tried"
    assert len(sorted((cache / "latents").rglob("*.safetensors"))) == 5

    said = launch("task=cache", cwd=tmp_path).stdout
    [line] = [line.split() for line in said.splitlines() if line.startswith("outputs/run ")]
    # Five clips and their prompts, the empty prompt.
    assert line[1] == "11" and "of no run" not in said
