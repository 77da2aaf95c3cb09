"""Device profiles: each number says where it is from, and what is wrong is named; what calls take by them."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolchain.errors import RecipeError
from toolchain.formats.device import Figure, load_device, shipped_devices
from toolchain.planning.cost import compute_seconds, load_seconds


@pytest.mark.parametrize("name", shipped_devices())
def test_shipped_profiles_are_whole_and_named_after_their_file(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    figures = [v for _, v in device if isinstance(v, Figure)] + [t.flops_per_s for t in device.throughput]
    assert len(figures) > 6
    assert all(f.source for f in figures)
    assert 0 <= device.overlap_loss.value <= 1
    assert device.load_bytes_per_s.value > 0 and device.memory_bytes_per_s.value > 0


def test_what_the_publications_say_is_no_estimate() -> None:
    phone = load_device("iphone-15-pro")
    assert phone.memory_bytes.value == 3.3e9 and not phone.memory_bytes.estimate
    flash = {n: load_device(n).load_bytes_per_s for n in shipped_devices() if n.startswith("android")}
    assert sorted(f.value for f in flash.values()) == [0.25e9, 0.87e9, 2.1e9, 4.2e9]
    assert not any(f.estimate for f in flash.values())


def test_a_misspelt_device_is_told_which_are_near() -> None:
    with pytest.raises(RecipeError, match=r"unknown device 'iphone-15'; near ones are iphone-15-pro"):
        load_device("iphone-15")
    with pytest.raises(RecipeError, match=r"unknown device 'zzz'; known ones are android"):
        load_device("zzz")


def test_a_profile_beside_the_recipe_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        shipped_devices()["iphone-15-pro"].read_text().replace("iphone-15-pro", "mine", 1)
    )
    assert load_device("mine.yaml", tmp_path).name == "mine"
    assert load_device("iphone-15-pro", tmp_path) == load_device("iphone-15-pro")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("memory_bytes:", "memory_byts:", r"memory_byts: unknown key; did you mean 'memory_bytes'"),
        ("value: 3.3e9", "value: -1", r"memory_bytes.value: .*greater than or equal to 0"),
        ("value: 5.4e8", "value: 0", r"load_bytes_per_s: a rate of 0"),
        ("overlap_loss: {value: 0,", "overlap_loss: {value: 1.5,", r"overlap_loss: 1.5 is not within"),
        ("version: 1", "version: 2", r"version: "),
        ("name: iphone", "{", r"not YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(before: str, after: str, message: str, tmp_path: Path) -> None:
    text = shipped_devices()["iphone-15-pro"].read_text()
    assert before in text
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace(before, after, 1))
    with pytest.raises(RecipeError, match=message) as error:
        load_device(file)
    assert "\n" not in str(error.value)


def test_a_file_that_is_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("[" * 5000)
    with pytest.raises(RecipeError, match=r"mine\.yaml: cannot be read: it is nested too deeply"):
        load_device(tmp_path / "mine.yaml")


def test_the_slower_of_computing_and_moving_decides() -> None:
    phone = load_device("iphone-15-pro")
    peak, memory = phone.flops_per_s("float32"), phone.memory_bytes_per_s.value
    overhead = phone.call_overhead_s.value
    assert compute_seconds(phone, 3 * peak, memory, "float32") == pytest.approx(3 + overhead)
    assert compute_seconds(phone, peak, 3 * memory, "float32", "gpu") == pytest.approx(3 + overhead)
    assert load_seconds(phone, int(2 * phone.load_bytes_per_s.value)) == pytest.approx(2 + phone.load_overhead_s.value)
    with pytest.raises(RecipeError, match=r"has no throughput for bfloat16 on gpu; it has float32 on gpu"):
        compute_seconds(phone, 1, 1, "bfloat16", "gpu")
