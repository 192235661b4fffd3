import numpy as np
import pytest
from PIL import Image

from pomona.data import load
from pomona.data.images import read_images
from pomona.errors import PomonaError


def save(path, mode="RGB", size=(12, 9), value=(200, 100, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def test_colour_and_gray_are_told_apart(tmp_path):
    colour = save(tmp_path / "c.png")
    gray = save(tmp_path / "g.png", "L", value=77)
    assert read_images([colour], 8).shape == (1, 3, 8, 8)
    assert read_images([gray], 8).shape == (1, 1, 8, 8)
    both = read_images([gray, colour], 8)
    assert both[0, :, 0, 0].tolist() == [77, 77, 77] and both[1, :, 0, 0].tolist() == [200, 100, 50]
    assert read_images([], 8).shape == (0, 3, 8, 8)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((5, 5), 32896, np.uint16)).save(tmp_path / "a.png")
    assert read_images([tmp_path / "a.png"], 4)[0, 0, 0, 0] == 128


@pytest.mark.parametrize("value", [b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_an_unreadable_image_is_named(tmp_path, value):
    (tmp_path / "bad.png").write_bytes(value)
    with pytest.raises(PomonaError, match=r"image '.*bad.png' cannot be read; mend or remove it"):
        read_images([tmp_path / "bad.png"], 8)


def test_a_cut_off_image_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:4000])
    with pytest.raises(PomonaError, match=r"image '.*cut.png' cannot be read"):
        read_images([tmp_path / "cut.png"], 8)


def test_a_folder_has_a_class_a_subfolder(tmp_path):
    for label, shade in (("cat", 20), ("dog", 220)):
        for i in range(15):
            save(tmp_path / label / f"{i}.png", "L", value=shade + i)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    told = []
    task = load(tmp_path, image_size=6, progress=told.append)
    assert task.inputs.kind == "image" and task.inputs.shape == (1, 6, 6)
    assert task.outputs.names == ("cat", "dog") and task.card.rows == 30
    assert told
    path = tmp_path / "cat" / "0.png"
    assert task.pipeline.transform([path]).shape == (1, 1, 6, 6)
    assert (task.pipeline.transform([path]) < 0).all()


def test_train_and_test_folders_are_kept_apart(tmp_path):
    for part, n in (("train", 12), ("test", 4)):
        for label in ("a", "b"):
            for i in range(n):
                save(tmp_path / part / label / f"{i}.png")
    sizes = {part: len(split) for part, split in load(tmp_path, image_size=4).splits.items()}
    assert sizes["test"] == 8 and sizes["train"] + sizes["valid"] == 24 and sizes["valid"] in (4, 5)


def test_a_folder_without_images_is_said(tmp_path):
    with pytest.raises(PomonaError, match="holds no images; needed is one subfolder of images a class"):
        load(tmp_path)


def test_a_table_with_paths_of_images(tmp_path):
    import pandas as pd

    for i in range(20):
        save(tmp_path / "img" / f"{i}.png", value=(i * 10, 0, 0))
    frame = pd.DataFrame({"photo": [f"img/{i}.png" for i in range(20)], "w": np.arange(20) / 3, "y": ["a", "b"] * 10})
    frame.to_csv(tmp_path / "t.csv", index=False)
    task = load(tmp_path / "t.csv", "y", image_size=4)
    assert task.inputs.columns[0].shape == (3, 4, 4) and task.inputs.shape == (49,)
    again = task.pipeline.transform(frame.iloc[task.extra["rows"]["test"]], folder=tmp_path)
    assert (again == task.splits["test"].x).all()
