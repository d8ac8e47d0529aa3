"""Models by name, their weights and what goes with them. Nothing is downloaded."""

import pickle
import sys
import urllib.request
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from torch import nn

from resode import InvalidInput, dynamics
from resode.nets import zoo
from resode.nets.weights import fit, read_state_dict

SMALL = "torchvision:resnet18"
TINY = "torchvision:squeezenet1_1"  # its last layer is a convolution


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm is no dependency")


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def picture(size=(300, 200)):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=draw, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# Without weights


@pytest.mark.parametrize(
    ("name", "settings", "classes", "size"),
    [
        (SMALL, {}, 1000, 224),
        ("torchvision:resnet18", {"num_classes": 7}, 7, 224),
        (TINY, {"num_classes": 3}, 3, 224),
        ("timm:resnet10t", {}, 1000, 176),
        ("timm:convnext_atto", {"num_classes": 5}, 5, 224),
        ("timm:resnet10t.c3_in1k", {"num_classes": 5}, 5, 176),
    ],
)
def test_a_model_by_name(name, settings, classes, size):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    found = zoo.load(name, **settings)
    assert (found.name, found.classes, found.weights) == (name, classes, None)
    assert not any(module.training for module in found.model.modules())
    x = found.transform(picture())
    assert (x.shape, x.dtype) == ((3, size, size), torch.float32)
    with torch.no_grad():
        assert found.model(x[None]).shape == (1, classes)


def test_random_weights_come_from_the_seed_alone():
    state = torch.get_rng_state()
    one, same_seed, other = (zoo.load(SMALL, num_classes=2, seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one, same_seed)
    assert not same(one, other)


def test_the_usual_preprocessing_of_imagenet():
    """The shorter side to 256, the centre square of 224, standardized by ImageNet's moments."""
    image = Image.new("RGB", (512, 256), (255, 128, 0))
    image.paste((0, 255, 64), (256, 0, 512, 256))
    x = zoo.load(SMALL, num_classes=2).transform(image)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    left, right = (torch.tensor(colour) / 255 for colour in ((255.0, 128.0, 0.0), (0.0, 255.0, 64.0)))
    torch.testing.assert_close(x[:, 0, 0], (left - mean) / std)
    torch.testing.assert_close(x[:, :, 111], ((left - mean) / std)[:, None].expand(3, 224))
    torch.testing.assert_close(x[:, :, 112], ((right - mean) / std)[:, None].expand(3, 224))


# Weights from a file


@pytest.fixture(scope="module")
def trained():
    return zoo.load(TINY, num_classes=4, seed=5).model


@pytest.mark.parametrize("wrapped", ["bare", "state_dict", "model", "parallel", "compiled and parallel", "checkpoint"])
def test_a_state_dict_file(tmp_path, trained, wrapped):
    state = trained.state_dict()
    held = {
        "bare": state,
        "state_dict": {"epoch": 3, "state_dict": state},
        "model": {"model": state, "optimizer": {"lr": 0.1}},
        "parallel": {f"module.{key}": value for key, value in state.items()},
        "compiled and parallel": {f"module._orig_mod.{key}": value for key, value in state.items()},
        "checkpoint": {"model": {"state_dict": state}},
    }[wrapped]
    torch.save(held, path := tmp_path / "weights.pth")
    for given in (path, str(path)):
        found = zoo.load(TINY, given)
        assert (found.classes, found.weights) == (4, str(path))
        assert same(found.model, trained)
        assert not found.model.training


def test_a_safetensors_file(tmp_path, trained):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(trained.state_dict(), path := tmp_path / "model.safetensors")
    assert same(zoo.load(TINY, path).model, trained)
    path.write_bytes(b"not tensors at all")
    with pytest.raises(InvalidInput, match=r"cannot read .*model\.safetensors as safetensors"):
        zoo.load(TINY, path)


def test_safetensors_without_its_package(tmp_path, monkeypatch):
    (path := tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InvalidInput, match="pip install safetensors"):
        zoo.load(SMALL, path)


def test_a_state_dict_of_timm(tmp_path, timm):
    model = timm.create_model("resnet10t", num_classes=6)
    torch.save(model.state_dict(), path := tmp_path / "weights.pt")
    found = zoo.load("timm:resnet10t", path)
    assert found.classes == 6
    assert same(found.model, model)


def test_a_state_dict_that_does_not_fit(tmp_path):
    state = zoo.load(SMALL, num_classes=4).model.state_dict()
    torch.save(state, path := tmp_path / "weights.pth")
    with pytest.raises(
        InvalidInput, match=r"weights.pth does not fit ResNet: 2 other shapes: fc.weight \(4, 512\) in place"
    ):
        zoo.load(SMALL, path, num_classes=3)
    with pytest.raises(
        InvalidInput, match=r"does not fit ResNet: \d+ missing: layer1\.2\.conv1\.weight, .*, …; load it"
    ):
        zoo.load("torchvision:resnet34", path)
    del state["layer3.0.bn1.bias"]
    state["head.bias"] = torch.zeros(2)
    torch.save(state, path)
    with pytest.raises(InvalidInput, match=r"1 missing: layer3\.0\.bn1\.bias; 1 unexpected: head\.bias; load"):
        zoo.load(SMALL, path)


def test_statistics_may_lack_their_counters():
    one, other = (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)) for _ in range(2))
    state = {key: value for key, value in one.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert len(state) < len(one.state_dict())
    fit(other, state, "a file of long ago")
    assert same(one, other)


class Bomb:
    exploded = False

    def __reduce__(self):
        return (exec, ("import test_zoo; test_zoo.Bomb.exploded = True",))


def test_a_bomb_explodes_where_a_pickle_is_trusted():
    try:
        pickle.loads(pickle.dumps(Bomb()))
        assert Bomb.exploded
    finally:
        Bomb.exploded = False


@pytest.mark.parametrize("save", [torch.save, lambda held, path: path.write_bytes(pickle.dumps(held))])
@pytest.mark.parametrize("held", [Bomb(), {"state_dict": {"fc.weight": Bomb()}}, nn.Linear(2, 2)])
def test_no_file_runs_code(tmp_path, held, save):
    save(held, path := tmp_path / "weights.pth")
    with pytest.raises(InvalidInput, match=r"cannot read .*weights\.pth as tensors alone .*expected a state dict"):
        zoo.load(SMALL, path)
    assert not Bomb.exploded


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, r"a dict of epoch \(int\), weights \(dict\)"),
        ({}, "a dict of nothing"),
        ({0: torch.ones(1)}, r"a dict of 0 \(Tensor\)"),
        ([torch.ones(1)], "a list"),
        ({"state_dict": {"a": 1}}, r"a dict of a \(int\)"),
    ],
)
def test_a_file_without_a_state_dict(tmp_path, held, says):
    torch.save(held, path := tmp_path / "weights.pth")
    with pytest.raises(InvalidInput, match=rf"weights\.pth holds {says}, and no state dict .*'state_dict' or 'model'"):
        read_state_dict(path)


def test_a_file_of_another_kind_or_none(tmp_path):
    (path := tmp_path / "weights.pth").write_text("hello")
    with pytest.raises(InvalidInput, match="as tensors alone"):
        zoo.load(SMALL, path)
    with pytest.raises(InvalidInput, match=r"there is no file .*nowhere\.pth"):
        zoo.load(SMALL, tmp_path / "nowhere.pth")
    with pytest.raises(InvalidInput, match=r"there is no file nowhere\.pt with weights for torchvision:resnet18"):
        zoo.check(SMALL, "nowhere.pt")


# Pretrained weights


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Where torchvision keeps the weights of ResNet-18 once they are downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (folder := tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return folder / "resnet18-f37072fd.pth"


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_pretrained_weights_of_torchvision(cached, weights):
    expected = zoo.load(SMALL, seed=9).model
    torch.save(expected.state_dict(), cached)
    found = zoo.load(SMALL, weights)
    assert (found.classes, found.weights) == (1000, "IMAGENET1K_V1")
    assert same(found.model, expected)
    assert found.transform(picture()).shape == (3, 224, 224)
    with pytest.raises(InvalidInput, match=r"num_classes is 10, and the weights IMAGENET1K_V1 .* are for 1000 classes"):
        zoo.load(SMALL, weights, num_classes=10)


def test_pretrained_weights_bring_their_preprocessing(cached, monkeypatch):
    from torchvision.models import ResNet50_Weights, get_model_weights

    transform = get_model_weights("resnet50").DEFAULT.transforms()
    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", lambda self, **settings: built.state_dict())
    built = zoo.load("torchvision:resnet50").model
    found = zoo.load("torchvision:resnet50", "DEFAULT")
    assert found.weights == "IMAGENET1K_V2"
    assert (found.transform.resize_size, found.transform.crop_size) == (transform.resize_size, transform.crop_size)
    assert found.transform.resize_size == [232]


def test_pretrained_weights_never_run_code(cached):
    torch.save(Bomb(), cached)
    with pytest.raises(
        InvalidInput, match="IMAGENET1K_V1 of torchvision's resnet18 can neither be read nor downloaded"
    ):
        zoo.load(SMALL, "DEFAULT")
    assert not Bomb.exploded


@pytest.mark.usefixtures("cached")
def test_a_failed_download_says_what_to_do(capsys):
    with pytest.raises(
        InvalidInput, match=r"nor downloaded \(<urlopen error no network in tests>\): connect .*state-dict"
    ):
        zoo.load(SMALL, "DEFAULT")


def test_pretrained_weights_of_timm(timm, tmp_path, monkeypatch):
    create = timm.create_model
    expected = create("resnet10t")
    torch.save(expected.state_dict(), path := tmp_path / "weights.pth")
    asked = []

    def create_from_file(name, pretrained=False, **settings):
        asked.append((name, pretrained))
        overlay = {"pretrained_cfg_overlay": {"file": str(path)}} if pretrained else {}
        return create(name, pretrained=pretrained, **overlay, **settings)

    monkeypatch.setattr(timm, "create_model", create_from_file)
    for name, weights in (("resnet10t", "DEFAULT"), ("resnet10t", "c3_in1k"), ("resnet10t.c3_in1k", "DEFAULT")):
        found = zoo.load(f"timm:{name}", weights)
        assert (found.classes, found.weights) == (1000, "c3_in1k")
        assert same(found.model, expected)
        assert found.transform(picture()).shape == (3, 176, 176)
    assert asked == [("resnet10t.c3_in1k", True)] * 3
    with pytest.raises(
        InvalidInput, match="num_classes is 10, and the weights c3_in1k of timm's resnet10t are for 1000"
    ):
        zoo.load("timm:resnet10t", "DEFAULT", num_classes=10)
    path.unlink()
    with pytest.raises(InvalidInput, match="c3_in1k of timm's resnet10t can neither be read nor downloaded"):
        zoo.load("timm:resnet10t", "DEFAULT")


@pytest.mark.usefixtures("timm")
def test_a_model_of_timm_without_a_classifier():
    with pytest.raises(InvalidInput, match="has no classifier by default: pass num_classes"):
        zoo.load("timm:vit_small_patch14_dinov2")
    with pytest.raises(InvalidInput, match="are of a model without a classifier"):
        zoo.load("timm:vit_small_patch14_dinov2", "DEFAULT")


# What is not known


@pytest.mark.parametrize(
    ("name", "weights", "says"),
    [
        ("resnet50", None, "unknown model 'resnet50': write torchvision:NAME or timm:NAME"),
        ("keras:resnet50", None, "unknown model 'keras:resnet50': write torchvision:NAME"),
        ("torchvision:resnet51", None, "unknown model 'resnet51' of torchvision's: near are resnet50"),
        ("torchvision:", None, "unknown model '' of torchvision's: near are "),
        ("torchvision:fasterrcnn_resnet50_fpn", None, "unknown model 'fasterrcnn_resnet50_fpn' of torchvision's"),
        (SMALL, "IMAGENET1K_V2", "unknown weights 'IMAGENET1K_V2' of torchvision's resnet18: near are IMAGENET1K_V1"),
        ("timm:resnet10tt", None, "unknown model 'resnet10tt' of timm's: near are resnet10t"),
        ("timm:resnet10t.c3", None, "unknown weights 'c3' of timm's resnet10t: near are c3_in1k"),
        ("timm:resnet10t", "a1_in1k", "unknown weights 'a1_in1k' of timm's resnet10t: near are c3_in1k"),
        ("timm:resnet34d.xx", None, "unknown weights 'xx' of timm's resnet34d: near are ra2_in1k"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(name, weights, says):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    for ask in (zoo.check, zoo.load):
        with pytest.raises(InvalidInput, match=says):
            ask(name, weights)


def test_a_model_of_timm_without_weights(timm):
    name = next(name for name in timm.list_models("resnet*") if not timm.list_pretrained(f"{name}.*"))
    with pytest.raises(InvalidInput, match=f"timm has no weights for {name}: pass the path"):
        zoo.check(f"timm:{name}", "DEFAULT")


@pytest.mark.parametrize("classes", [0, -1, 2.5])
def test_a_number_of_classes_out_of_range(classes):
    with pytest.raises(InvalidInput, match=r"num_classes is .*: it must be a whole number above 0"):
        zoo.load(SMALL, num_classes=classes)


def test_without_timm_the_rest_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InvalidInput, match=r"need timm, which is not installed: pip install 'timm>="):
        zoo.load("timm:resnet18")
    assert len(dynamics(zoo.load(SMALL, num_classes=2).model).steps) == 8


def test_which_names_are_meant_here():
    assert zoo.is_zoo("torchvision:resnet50")
    assert zoo.is_zoo("timm:anything")
    assert not zoo.is_zoo("runs/resnet")
    assert not zoo.is_zoo("resnet50")
