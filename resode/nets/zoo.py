"""Models of other packages by name: ``torchvision:resnet50``, ``timm:resnet26d``.

Pretrained weights come by the package's own mechanism, or from a state-dict file, and never through a pickle that runs
code. timm is no dependency: it is needed for its own models alone, and imported when one is named.
"""

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from resode.errors import InvalidInput
from resode.nets.weights import StateDict, fit, last_layer, read_state_dict
from resode.seeding import seeded

SOURCES = ("torchvision", "timm")

_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_TIMM = "timm>=1.0.25,<2"


@dataclass(frozen=True, eq=False)
class ZooModel:
    """A model, and what goes with it.

    Args:
        name: such as "torchvision:resnet50".
        model: in evaluation mode, on the CPU.
        transform: from a PIL image to the model's input, (C, H, W).
        classes: number of logits.
        weights: name of the pretrained weights, or the file that they come from; None for random ones.
    """

    name: str
    model: nn.Module
    transform: Callable[[Any], Tensor]
    classes: int
    weights: str | None


def is_zoo(name: str) -> bool:
    """Whether ``name`` is meant as that of a model here."""
    return name.partition(":")[0] in SOURCES


def check(name: str, weights: str | Path | None = None) -> None:
    """Look whether `load` knows the model and the weights, without building or downloading anything.

    Raises:
        InvalidInput: as `load` does.
    """
    source, architecture = _source(name)
    source.check(architecture)
    if weights is not None:
        if (file := _file(weights)) is not None:
            if not file.is_file():
                raise InvalidInput(f"there is no file {file} with weights for {name}")
        else:
            source.weights_name(architecture, str(weights))


def load(name: str, weights: str | Path | None = None, *, num_classes: int | None = None, seed: int = 0) -> ZooModel:
    """A model by name.

    Args:
        name: ``torchvision:NAME`` or ``timm:NAME``, as the package's ``list_models`` has it.
        weights: "DEFAULT" or another name of pretrained weights (torchvision's, such as "IMAGENET1K_V1"; timm's tags,
            such as "a1_in1k"); the path of a state-dict file (see `nets.weights`); None for random weights.
        num_classes: None for those of the weights; without any, the package's default, 1000 for most.
        seed: what random weights are drawn from; the global random state is left as it is.

    With pretrained weights, ``transform`` is their own preprocessing; otherwise what is usual for ImageNet, at the size
    that the model is made for.

    Raises:
        InvalidInput: for an unknown name or unknown weights (with near ones), weights that do not fit, a download that
            fails, or timm when it is not installed.
    """
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise InvalidInput(f"num_classes is {num_classes!r}: it must be a whole number above 0")
    check(name, weights)
    source, architecture = _source(name)
    file = None if weights is None else _file(weights)
    if file is not None:
        state = read_state_dict(file)
        model = _for_state(lambda classes: _drawn(seed, source.build, architecture, classes), state, num_classes)
        fit(model, state, file)
        transform, said = source.usual_transform(model), str(file)
    elif weights is not None:
        said = source.weights_name(architecture, str(weights))
        model, transform = _drawn(seed, source.pretrained, architecture, said, num_classes)
    else:
        said, model = None, _drawn(seed, source.build, architecture, num_classes)
        transform = source.usual_transform(model)
    return ZooModel(name, model.eval(), transform, _classes(model), said)


def _for_state(build: Callable[[int | None], nn.Module], state: StateDict, num_classes: int | None) -> nn.Module:
    """A model with as many classes as ``state`` is for, unless ``num_classes`` says otherwise."""
    model = build(num_classes)
    weight = state.get(f"{last_layer(model)}.weight")
    if num_classes is None and weight is not None and len(weight) != _classes(model):
        return build(len(weight))
    return model


def _classes(model: Any) -> int:
    """As the model itself says, or as many as its last layer gives."""
    said = getattr(model, "num_classes", None)
    return said if isinstance(said, int) else len(model.get_submodule(last_layer(model)).weight)


def _drawn(seed: int, build: Callable[..., Any], *arguments: Any) -> Any:
    """``build(*arguments)``, which draws from ``seed``."""
    with seeded(seed):
        return build(*arguments)


def _file(weights: str | Path) -> Path | None:
    """The file that ``weights`` mean; None if it is a name."""
    path = Path(weights).expanduser()
    is_file = isinstance(weights, Path) or len(path.parts) > 1 or path.suffix in _FILES
    return path if is_file else None


def _source(name: str) -> "tuple[_Torchvision | _Timm, str]":
    package, colon, architecture = name.partition(":")
    if not colon or package not in SOURCES:
        raise InvalidInput(
            f"unknown model {name!r}: write {' or '.join(f'{source}:NAME' for source in SOURCES)}, such as "
            "torchvision:resnet50"
        )
    return (_Torchvision() if package == "torchvision" else _Timm()), architecture


def _require(name: str, known: Iterable[str], what: str) -> None:
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:8]
    said = f"near are {', '.join(near)}" if near else "there are none"
    raise InvalidInput(f"unknown {what}: {said}")


@contextmanager
def _downloading(what: str) -> Iterator[None]:
    try:
        yield
    except InvalidInput:
        raise
    except Exception as error:  # the network, the disk and the clients of a hub raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidInput(
            f"the weights {what} can neither be read nor downloaded ({reason}): connect to the network, or pass the "
            "path of a state-dict file as weights"
        ) from error


class _Torchvision:
    """torchvision's models for classification."""

    def __init__(self) -> None:
        self.models = importlib.import_module("torchvision.models")  # here, because it takes seconds

    def check(self, architecture: str) -> None:
        known = self.models.list_models(module=self.models)
        _require(architecture, known, f"model {architecture!r} of torchvision's")

    def weights_name(self, architecture: str, weights: str) -> str:
        known = self.models.get_model_weights(architecture)
        if weights != "DEFAULT":
            names = [each.name for each in known]
            _require(weights, names, f"weights {weights!r} of torchvision's {architecture}")
        return known[weights].name

    def build(self, architecture: str, num_classes: int | None) -> nn.Module:
        return self.models.get_model(architecture, **_given(num_classes))

    def pretrained(
        self, architecture: str, weights: str, num_classes: int | None
    ) -> tuple[nn.Module, Callable[[Any], Tensor]]:
        chosen = self.models.get_model_weights(architecture)[weights]
        _require_classes(num_classes, len(chosen.meta["categories"]), f"{weights} of torchvision's {architecture}")
        with _downloading(f"{weights} of torchvision's {architecture}"):
            # torchvision's own reader would run code in the file: look first whether tensors are all it holds.
            chosen.get_state_dict(progress=True, check_hash=True, weights_only=True)
            return self.models.get_model(architecture, weights=chosen), chosen.transforms()

    def usual_transform(self, model: nn.Module) -> Callable[[Any], Tensor]:
        """The shorter side to 8/7 of the size, the centre of that size, and ImageNet's mean and standard deviation."""
        size = getattr(model, "image_size", 224)
        return self.models.ResNet50_Weights.IMAGENET1K_V1.transforms(crop_size=size, resize_size=round(size * 8 / 7))


class _Timm:
    """timm's models."""

    def __init__(self) -> None:
        self.timm: ModuleType = _import_timm()

    def check(self, architecture: str) -> None:
        if not self.timm.is_model(architecture):
            _require(architecture, self.timm.list_models(), f"model {architecture!r} of timm's")
        name, _, tag = architecture.partition(".")
        if tag:
            self.weights_name(name, tag)

    def weights_name(self, architecture: str, weights: str) -> str:
        name, _, tag = architecture.partition(".")
        known = [full.partition(".")[2] for full in self.timm.list_pretrained(f"{name}.*")]
        if not known:
            raise InvalidInput(f"timm has no weights for {name}: pass the path of a state-dict file, or none")
        if weights == "DEFAULT":
            return tag or self.timm.get_pretrained_cfg(name).tag
        _require(weights, known, f"weights {weights!r} of timm's {name}")
        return weights

    def build(self, architecture: str, num_classes: int | None) -> nn.Module:
        model = self.timm.create_model(architecture, **_given(num_classes))
        if model.num_classes == 0:
            raise InvalidInput(f"timm's {architecture} has no classifier by default: pass num_classes")
        return model

    def pretrained(
        self, architecture: str, weights: str, num_classes: int | None
    ) -> tuple[nn.Module, Callable[[Any], Tensor]]:
        full = f"{architecture.partition('.')[0]}.{weights}"
        made_for = self.timm.get_pretrained_cfg(full).num_classes
        if made_for == 0:
            raise InvalidInput(f"the weights {weights} of timm's {architecture} are of a model without a classifier")
        _require_classes(num_classes, made_for, f"{weights} of timm's {architecture}")
        with _downloading(f"{weights} of timm's {architecture}"):
            model = self.timm.create_model(full, pretrained=True)
        return model, self.usual_transform(model)

    def usual_transform(self, model: nn.Module) -> Callable[[Any], Tensor]:
        """The preprocessing in the model's configuration: that of its weights."""
        data = importlib.import_module("timm.data")
        return data.create_transform(**data.resolve_data_config(model=model))


def _import_timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise InvalidInput(f"timm's models need timm, which is not installed: pip install {_TIMM!r}") from error
    return timm


def _given(num_classes: int | None) -> dict[str, int]:
    return {} if num_classes is None else {"num_classes": num_classes}


def _require_classes(num_classes: int | None, made_for: int, weights: str) -> None:
    if num_classes not in (None, made_for):
        raise InvalidInput(
            f"num_classes is {num_classes}, and the weights {weights} are for {made_for} classes: leave it out, or "
            "pass the path of a state-dict file with another head"
        )
