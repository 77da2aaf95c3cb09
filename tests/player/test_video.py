"""Frames to files: bytes as the official code rounds them, mp4s that play, PNGs that are the frames."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from toolchain.errors import RecipeError, ResourceError
from toolchain.player.video import check_outputs, to_bytes, write_frames, write_video


def moving_picture(frames: int, height: int, width: int) -> torch.Tensor:
    """Smooth colours that drift, as uint8 ``[F, H, W, 3]``: what a codec keeps well."""
    f, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (frames, height, width)), indexing="ij")
    return (torch.stack((x, y, 0.5 + 0.5 * f), dim=-1) * 255).to(torch.uint8)


def read_video(path: Path) -> tuple[np.ndarray, tuple[float, str, str]]:
    """A video's frames; and its frames a second, codec and format of pixels."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, (float(stream.average_rate or 0), stream.codec_context.name, str(stream.codec_context.pix_fmt))


def official_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """As torchvision's ``save_image`` and Open-Sora's ``save_sample`` do it: clamp, to 0 … 1, times 255, round."""
    x = pixels.clamp(-1, 1).sub(-1).div(2)
    return x.mul(255).add_(0.5).clamp_(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


def test_bytes_are_the_official_ones() -> None:
    pixels = torch.randn(3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    found = to_bytes(pixels)
    assert (found.shape, found.dtype) == ((3, 5, 7, 3), torch.uint8)
    assert found.is_contiguous()
    assert int((found.int() - official_bytes(pixels).int()).abs().max()) <= 1
    assert float((found != official_bytes(pixels)).float().mean()) < 0.01


def test_bytes_at_the_ends() -> None:
    values = torch.tensor([-9.0, -1.0, -0.999, 0.0, 0.999, 1.0, 9.0]).reshape(1, 1, 1, -1).expand(1, 3, 1, 7)
    assert to_bytes(values)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_bytes_of_half_precision() -> None:
    assert to_bytes(torch.full((1, 3, 1, 1), 0.5, dtype=torch.float16)).flatten().tolist() == [191] * 3


@pytest.mark.parametrize(("frames", "fps"), [(22, 8), (1, 24), (17, 24)])
def test_video_is_what_was_written(frames: int, fps: int, tmp_path: Path) -> None:
    pictures = moving_picture(frames, 64, 48)
    write_video(pictures, fps, tmp_path / "a.mp4")
    found, said = read_video(tmp_path / "a.mp4")
    assert found.shape == (frames, 64, 48, 3)
    assert said == (fps, "h264", "yuv420p")
    error = (found.astype(float) - pictures.numpy()) / 255
    assert -10 * np.log10((error**2).mean()) > 30
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_odd_sizes_lose_a_row_and_a_column(tmp_path: Path) -> None:
    write_video(moving_picture(3, 33, 47), 8, tmp_path / "a.mp4")
    assert read_video(tmp_path / "a.mp4")[0].shape == (3, 32, 46, 3)


def test_a_failure_leaves_the_old_video(tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    out.write_bytes(b"old")
    with pytest.raises(ValueError):
        write_video(moving_picture(2, 32, 32)[..., :2], 8, out)  # two colours
    assert out.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_an_older_video_is_replaced(tmp_path: Path) -> None:
    for frames in (3, 5):
        write_video(moving_picture(frames, 32, 32), 8, tmp_path / "a.mp4")
    assert len(read_video(tmp_path / "a.mp4")[0]) == 5


def test_frames_are_written_as_they_are(tmp_path: Path) -> None:
    pictures = torch.randint(0, 256, (12, 5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_frames(pictures, tmp_path / "a" / "b")
    files = sorted((tmp_path / "a" / "b").iterdir())
    assert [f.name for f in files] == [f"{i:03d}.png" for i in range(12)]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(f)) for f in files]), pictures.numpy())


@pytest.mark.parametrize("name", ["a.avi", "a", "mp4", "a.mp4/", "a.MP4x"])
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"\.mp4 file"):
        check_outputs(tmp_path / name if name != "a.mp4/" else _folder(tmp_path / "a.mp4"), None, None)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="folder does not exist"):
        check_outputs(tmp_path / "missing" / "a.mp4", None, None)


def test_a_name_alone_means_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_outputs(Path("a.mp4"), None, None)
    write_video(moving_picture(2, 32, 32), 8, Path("a.mp4"))
    assert (tmp_path / "a.mp4").is_file()
