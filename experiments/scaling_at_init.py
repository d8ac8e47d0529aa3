"""What becomes of a residual stage at initialization as its depth L grows, by the factor L^(−β) of its branches?

How far does the stage take a state, and a gradient, at depths up to 1000, for weights that are independent from block
to block, smooth in depth, or the same in all blocks, with and without a norm, and with SkipInit? Is there an explosion,
the identity, or a non-trivial limit (Marion et al. 2022, arXiv 2206.06929; De & Smith 2020, arXiv 2002.10444)? What
becomes of such nets in training is asked by ``experiments.scaling_trained``.

    python -m experiments.scaling_at_init cpu --publish results       vectors; about 5 minutes on a CPU core
    python -m experiments.scaling_at_init conv --publish results      convolutions, depths to 256; about 2 minutes
    python -m experiments.scaling_at_init paper --publish results     convolutions, depths to 1000, a GPU
"""

import json
from dataclasses import dataclass, replace
from itertools import product

from tqdm import tqdm

from experiments.common import main
from resode.limits.scaling import DEPTHS, Growth, measure, tabulate
from resode.limits.stages import SKIPINIT, Stage
from resode.runs import Run, jsonable


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the study.

    Args:
        kind: residual branch: mlp for vectors, preact for images.
        channels: channels of the state.
        side: height and width of the images.
        batch: samples.
        betas: the β.
        weights: how the weights run over depth: iid, smooth, tied.
        length_scale: of smooth weights, in units of the whole depth.
        norms: norms of the branch.
        depths: the L.
        seeds: seeds of weights and inputs.
        device: cpu, cuda, cuda:1.
    """

    kind: str = "mlp"
    channels: int = 64
    side: int = 8
    batch: int = 16
    betas: tuple[float, ...] = (0.0, 0.5, 1.0)
    weights: tuple[str, ...] = ("iid", "smooth", "tied")
    length_scale: float = 0.2
    norms: tuple[str, ...] = ("none", "batch", "group")
    depths: tuple[int, ...] = DEPTHS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    device: str = "cpu"

    def stages(self) -> list[Stage]:
        """The stages; SkipInit's, which is the identity with any weights and norm, once."""
        names = ("kind", "channels", "side", "batch", "length_scale")
        same = {name: getattr(self, name) for name in names}
        found = [
            Stage(beta=beta, weights=weights, norm=norm, **same)
            for norm, weights, beta in product(self.norms, self.weights, self.betas)
        ]
        return [*found, Stage(beta=SKIPINIT, weights="iid", norm="none", **same)]


_CONV = Config(kind="preact", channels=16)

CONFIGS = {
    "smoke": Config(channels=8, betas=(0.5,), weights=("iid",), norms=("none",), depths=(1, 2, 4, 8, 16), seeds=(0, 1)),
    "cpu": Config(),
    "conv": replace(_CONV, depths=(8, 16, 32, 64, 128, 256), seeds=(0, 1, 2)),
    "paper": replace(_CONV, side=16, device="cuda"),
}


def run(config: Config, out: Run) -> None:
    """Measure each stage at each depth, from each seed."""
    for stage in config.stages():
        name = f"{stage.norm}-{stage.weights}-{stage.beta}"
        growths = _growths(config, stage, out, f"progress/{name}.json")
        table = tabulate(stage, growths)
        print(f"{name}: states: {table.verdict}; gradients: {table.gradient_verdict}", flush=True)
        out.save_result(name, table.to_dict())


def _growths(config: Config, stage: Stage, out: Run, name: str) -> list[Growth]:
    """What is measured of a stage; what was measured before an interruption is read."""
    path = out.path / name
    found = [Growth.from_dict(each) for each in json.loads(path.read_text())] if path.exists() else []
    plan = [(depth, seed) for seed in config.seeds for depth in config.depths][len(found) :]
    for depth, seed in tqdm(plan, desc=path.stem, leave=False, disable=None):
        found.append(measure(stage, depth, seed, device=config.device))
        out.write(name, json.dumps(jsonable(found)))
    return found


if __name__ == "__main__":
    main("scaling_at_init", "What becomes of a residual stage at initialization as its depth grows?", CONFIGS, run)
