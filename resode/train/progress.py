"""How a training goes, as it is shown."""

from typing import Any

from tqdm import tqdm


class Bar:
    """Shows how a training goes: a bar over all its images on a terminal, else a line an epoch; or nothing."""

    def __init__(self, epochs: int, done: int, images: int, progress: bool) -> None:
        self.progress, self.epochs, self.images = progress, epochs, images
        self.bar = tqdm(
            total=epochs * images,
            initial=done * images,
            unit="image",
            unit_scale=True,
            disable=None if progress else True,
            leave=False,
        )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def batch(self, images: int, loss: float, accuracy: float, evaluations: int) -> None:
        """Note ``images`` more, and how the epoch stands."""
        self.bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}, NFE {evaluations}", refresh=False)
        self.bar.update(images)

    def epoch(self, record: dict[str, Any]) -> None:
        """Note the end of an epoch."""
        if not self.progress or not self.bar.disable:
            return
        said = f"loss {record['train_loss']:.3f}, accuracy {record['train_accuracy']:.1%}"
        if "validation_accuracy" in record:
            said += f", validation {record['validation_accuracy']:.1%}"
        said += f", NFE {record['nfe']}, {record['images_per_second']:.0f} images/s"
        print(f"epoch {record['epoch']:3d}/{self.epochs}: {said}", flush=True)
