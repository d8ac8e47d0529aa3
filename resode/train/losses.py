"""The losses of a training, of logits (B, K) and what is wanted of them.

Wanted are labels (B,) or, where images were mixed, shares of the classes (B, K) that sum to 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from resode.errors import choose

LOSSES = ("cross-entropy", "bce")


def training_loss(
    logits: Tensor, wanted: Tensor, kind: str = "cross-entropy", smoothing: float = 0.0, threshold: float = 0.0
) -> Tensor:
    """The mean loss of a batch, in float32.

    With y the one-hot labels or the shares, s the label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7)
    and τ the threshold:

    * cross-entropy: −Σ_k ((1 − s)·y_k + s/K)·log softmax(z)_k, the mean over the batch;
    * bce (binary cross-entropy, each class a question by itself): the mean over the batch and the classes of
      −u_k·log σ(z_k) − (1 − u_k)·log(1 − σ(z_k)), with u_k = (1 − s)·[y_k > τ] + s/K. A mixed image has all of the
      classes whose share in it is above τ; at τ = 0 all that were mixed (Wightman et al. 2021, arXiv 2110.00476,
      section 3.1). With τ ≥ 1/2 an image that is half of each of two classes has none.

    Raises:
        InvalidInput: for an unknown kind.
    """
    choose(kind, LOSSES, "loss")
    logits = logits.float()
    if kind == "cross-entropy":
        return F.cross_entropy(logits, wanted, label_smoothing=smoothing)
    classes = logits.shape[1]
    present = (
        (wanted > threshold).to(logits.dtype) if wanted.dim() == 2 else F.one_hot(wanted, classes).to(logits.dtype)
    )
    return F.binary_cross_entropy_with_logits(logits, (1.0 - smoothing) * present + smoothing / classes)


def right_answers(logits: Tensor, wanted: Tensor) -> Tensor:
    """How many of a batch were answered right; of a mixed image its larger part counts."""
    labels = wanted if wanted.dim() == 1 else wanted.argmax(1)
    return torch.sum(logits.argmax(1) == labels)
