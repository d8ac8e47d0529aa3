"""Images read as they go: their order, their labels, and what cannot be read."""

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from resode.data.stream import ImageStream
from resode.errors import InvalidInput

COUNTS = {"ant": 3, "bee": 1, "cat": 5}


@pytest.fixture
def folder(tmp_path):
    """Images of 4×6 whose grey level says which they are: 20·class + place in the class."""
    for label, (name, count) in enumerate(COUNTS.items()):
        (place := tmp_path / "val" / name).mkdir(parents=True)
        for i in range(count):
            level = torch.full((3, 4, 6), 20 * label + i, dtype=torch.uint8)
            to_pil_image(level).save(place / f"{i}.png")
    (tmp_path / "val" / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def levels(stream):
    return [int(x[0, 0, 0]) for batch, _ in stream for x in batch]


# In turns: the first of each class, the second of each that has one, …
TURNS = [0, 20, 40, 1, 41, 2, 42, 43, 44]


def test_images_come_by_turns(folder):
    stream = ImageStream(folder, "val", pil_to_tensor, batch_size=4)
    assert levels(stream) == TURNS
    assert [labels.tolist() for _, labels in stream] == [[0, 1, 2, 0], [2, 0, 2, 2], [2]]
    assert (stream.names, stream.classes, stream.count, len(stream)) == (("ant", "bee", "cat"), 3, 9, 3)
    for x, labels in stream:
        assert x.shape[1:] == (3, 4, 6)
        assert labels.dtype == torch.int64


@pytest.mark.parametrize("limit", range(1, 12))
def test_a_limit_takes_the_first_of_that_order(folder, limit):
    stream = ImageStream(folder, "val", pil_to_tensor, batch_size=2, limit=limit)
    assert levels(stream) == TURNS[:limit]
    assert stream.count == min(limit, 9)
    assert len(list(stream)) == len(stream) == -(-stream.count // 2)


def test_every_pass_is_the_same_and_draws_nothing(folder):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    stream = ImageStream(folder, "val", pil_to_tensor, batch_size=4)
    assert levels(stream) == levels(stream) == TURNS
    assert torch.equal(torch.get_rng_state(), state)


def test_the_transform_is_the_models(folder):
    stream = ImageStream(folder, "val", lambda image: pil_to_tensor(image).float()[:, :2, :2] / 100, batch_size=9)
    ((x, _),) = stream
    assert x.shape == (9, 3, 2, 2)
    torch.testing.assert_close(x[:, 0, 0, 0], torch.tensor(TURNS) / 100)


def test_workers_read_the_same(folder):
    assert levels(ImageStream(folder, "val", pil_to_tensor, batch_size=2, workers=2)) == TURNS


@pytest.mark.parametrize("name", ["val", "validation"])
def test_either_name_of_the_validation_split_will_do(folder, name):
    assert levels(ImageStream(folder, name, pil_to_tensor)) == TURNS
    (folder / "val").rename(folder / "validation")
    assert levels(ImageStream(str(folder), name, pil_to_tensor)) == TURNS
    (folder / "validation").rename(folder / "holdout")
    assert levels(ImageStream(folder, "holdout", pil_to_tensor)) == TURNS


def test_the_number_of_classes_must_be_the_models(folder):
    stream = ImageStream(folder, "val", pil_to_tensor)
    stream.require_classes(3)
    with pytest.raises(InvalidInput, match="val holds 3 classes, and the model has 1000"):
        stream.require_classes(1000)


# What cannot be read


def test_a_folder_of_another_layout_is_named(folder):
    with pytest.raises(InvalidInput, match=r"there is no folder .*nowhere: expected PATH/<split>/<class>/\*"):
        ImageStream(folder / "nowhere", "val", pil_to_tensor)
    with pytest.raises(InvalidInput, match=r"there is no split 'test' in .* \(it holds val\): expected"):
        ImageStream(folder, "test", pil_to_tensor)
    with pytest.raises(InvalidInput, match=r"there is no split 'train' in .* \(it holds no folders\)"):
        ImageStream(folder / "val" / "ant", "train", pil_to_tensor)
    with pytest.raises(InvalidInput, match=r"there is no class folder in .*ant: expected PATH/<split>/<class>/\*"):
        ImageStream(folder / "val", "ant", pil_to_tensor)


def test_a_class_without_images_is_named(folder):
    for image in (folder / "val" / "cat").glob("*.png"):
        image.unlink()
    with pytest.raises(InvalidInput, match=r"there is no image in .*val/cat: put some there"):
        ImageStream(folder, "val", pil_to_tensor)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_when_it_is_read(folder, workers):
    (broken := folder / "val" / "cat" / "1.png").write_bytes(b"no image")
    stream = ImageStream(folder, "val", pil_to_tensor, batch_size=2, workers=workers)
    batches = iter(stream)
    assert [int(x[0, 0, 0]) for x in next(batches)[0]] == TURNS[:2]
    with pytest.raises(InvalidInput) as problem:
        list(batches)
    assert str(problem.value).startswith(f"cannot read the image {broken} (")
    assert str(problem.value).endswith("replace it, or remove it")


def test_images_of_two_shapes_are_refused(folder):
    to_pil_image(torch.zeros(3, 5, 5, dtype=torch.uint8)).save(folder / "val" / "bee" / "0.png")
    stream = ImageStream(folder, "val", pil_to_tensor)
    with pytest.raises(InvalidInput, match=r"shapes \(3, 4, 6\) and \(3, 5, 5\): let it resize and crop them"):
        list(stream)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.0}, r"batch_size is 2\.0"),
        ({"limit": 0}, "limit is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
    ],
)
def test_a_setting_out_of_range_is_named(folder, settings, says):
    with pytest.raises(InvalidInput, match=says):
        ImageStream(folder, "val", pil_to_tensor, **settings)
