"""Presets: known trainings, each with its source, the number to expect and the time it takes.

``resode train --preset he2016`` trains one, and every other flag replaces a setting of it; in Python,
``dataclasses.replace`` does. Where there is no validation split (``validation=0``) all training images are trained on
and the last epoch is the result, as in the papers: hold images out, ``--validation 0.1``, to choose anything.
"""

from resode.data.augment import Augment
from resode.errors import choose
from resode.nets import Architecture
from resode.stack import Stack
from resode.train.averaging import Average
from resode.train.recipe import Recipe
from resode.train.session import Data, Setup

__all__ = ["PRESETS", "fast", "he2016", "lecture", "odenet_mnist", "preset", "strikes_back_a3"]


def he2016() -> Setup:
    """The residual nets of He et al. 2016 (arXiv 1512.03385, section 4.2) for CIFAR-10.

    SGD with momentum 0.9 and batches of 128, weight decay 1e-4, the rate 0.1 divided by 10 after 1/2 and 3/4 of 64,000
    steps (164 epochs), mirrored and cropped from a frame of 4 pixels; shortcuts of option A. The paper decays norms and
    biases too, and warms ResNet-110 up at 0.01 (here: ``--warmup 1``).

    Expect: test error 8.75 % for ResNet-20, 7.51 % (32), 7.17 % (44), 6.97 % (56) and 6.61 ± 0.16 % (110), table 6.
    Time: 8.2 million images for each net.
    """
    return Setup(
        architecture=Architecture(net="resnet", depth=20),
        stack=Stack(augment=Augment(flip=True, crop=4)),
        data=Data(data="cifar10", validation=0.0),
        recipe=Recipe(epochs=164, batch_size=128, lr=0.1, weight_decay=1e-4, schedule="step", milestones=(0.5, 0.75)),
    )


def lecture() -> Setup:
    """A first look at how depth and pooling pay: a small VGG net, Adam, three epochs, nothing else.

    The net (Simonyan & Zisserman 2015, with batch norm and global average pooling) is one of a grid: ``--blocks 1`` to
    ``3`` and ``--convs 1`` to ``3`` are blocks, each ended by a pooling, and convolutions in a block.

    Expect: a test error of 30.0 % on CIFAR-10 (JPEG: the files encoded anew), one seed; 62.3 % for one block of one
    convolution, 28.7 % for three of three.
    Time: 135,000 images for each net.
    """
    return Setup(
        architecture=Architecture(net="vgg", blocks=3, convs=2),
        data=Data(data="cifar10"),
        recipe=Recipe(epochs=3, optimizer="adam", lr=1e-3, weight_decay=0.0, schedule="constant"),
    )


def fast() -> Setup:
    """A speed run: a short training with the means of Jordan 2024 (airbench, arXiv 2404.00498), for a wide ResNet-20.

    Nesterov's momentum, a rate that rises and falls once, label smoothing, lookahead with a growing decay, images
    mirrored in every other epoch, moved by up to 2 pixels, and evaluated along with their mirror images; bfloat16 and
    channels-last, for GPUs and for CPUs with AMX (``--precision float32`` elsewhere), and ``--compile`` makes it faster
    still. airbench's own net, its whitened first layer and its scaled biases are not here.

    Expect: a test error of 10.8 % on CIFAR-10 (JPEG: the files encoded anew) with 1.07 million parameters, one seed;
    airbench's own net has 6 % on the original files.
    Time: 0.8 million images.
    """
    return Setup(
        architecture=Architecture(net="resnet", depth=20, width=32),
        stack=Stack(augment=Augment(alternate_flip=True, shift=2)),
        data=Data(data="cifar10", validation=0.0),
        recipe=Recipe(
            epochs=16,
            batch_size=128,
            lr=0.2,
            nesterov=True,
            weight_decay=5e-4,
            schedule="one-cycle",
            warmup=4.0,
            label_smoothing=0.1,
            average=Average(kind="lookahead", decay=0.95**5, every=5, power=3.0),
            mirrored=True,
            precision="bfloat16",
            channels_last=True,
        ),
    )


def strikes_back_a3() -> Setup:
    """Procedure A3 of Wightman et al. 2021 (ResNet strikes back, arXiv 2110.00476, table 2) scaled to 32×32 images.

    A question for each class (binary cross-entropy), RandAugment of 2 operations (magnitude 6 of 10, here 18 of 30),
    MixUp with α = 0.1 or CutMix with α = 1, random resized crops, cosine with 5 epochs of warm-up, 100 epochs. A class
    is asked for where more than 1/5 of the image is of it, as in the configurations that came with the paper. What
    differs: AdamW in place of LAMB, which torch does not have, and with it the rate and the decay; batches of 510, not
    2048; crops of at least 1/4 of the area, not 8 %, as 32×32 pixels hold less to lose; and each image three times in a
    batch (repeated augmentation, Hoffer et al. 2020), which the procedures A1 and A2 have (``--repeats 1``: as A3).

    Expect: the paper has 78.1 % on ImageNet, with ResNet-50; this scaled form was not trained to its end yet.
    Time: 5 million images.
    """
    return Setup(
        architecture=Architecture(net="resnet", depth=20),
        stack=Stack(
            augment=Augment(flip=True, resized_crop=0.25, randaugment=2, magnitude=18, mixup=0.1, cutmix=1.0),
        ),
        data=Data(data="cifar10", validation=0.0),
        recipe=Recipe(
            epochs=100,
            batch_size=510,
            repeats=3,
            optimizer="adamw",
            lr=4e-3,
            weight_decay=0.02,
            schedule="cosine",
            warmup=5.0,
            loss="bce",
            target_threshold=0.2,
        ),
    )


def odenet_mnist() -> Setup:
    """A small ODE net for MNIST, as in Chen et al. 2018 (arXiv 1806.07366, table 1).

    Its field is of their kind, norm – ReLU – convolution twice, with a time channel; but it stands in each of three
    stages, has batch norm, which learns several times as fast as their group norm, and is solved by two steps of the
    midpoint rule; theirs is one field, solved by dopri5, behind two strided convolutions. ``--net resnet --depth 14
    --time none`` is its discrete counterpart.

    Expect: a test error of 0.37 % with 0.17 million parameters (one seed), and its counterpart 0.32 %; the paper has
    0.42 % with 0.22 million.
    Time: 0.6 million images.
    """
    return Setup(
        architecture=Architecture(net="odenet", width=16, kind="preact", time="concat", solver="midpoint", steps=2),
        stack=Stack(augment=Augment(shift=2, rotate=10.0)),
        data=Data(data="mnist", validation=0.0),
        recipe=Recipe(
            epochs=10,
            batch_size=128,
            lr=0.1,
            nesterov=True,
            weight_decay=5e-4,
            schedule="one-cycle",
            warmup=2.0,
            average=Average(kind="ema", decay=0.999),
            channels_last=True,
        ),
    )


PRESETS = {
    "he2016": he2016,
    "lecture": lecture,
    "fast": fast,
    "strikes-back-a3": strikes_back_a3,
    "odenet-mnist": odenet_mnist,
}


def preset(name: str) -> Setup:
    """The settings of the preset ``name``, one of ``PRESETS``.

    Raises:
        InvalidInput: for an unknown name, with those there are.
    """
    choose(name, PRESETS, "preset")
    return PRESETS[name]()
