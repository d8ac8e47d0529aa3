"""Draw every figure whose results are in ``results/``: ``python -m paper_figs``."""

from pathlib import Path
from types import ModuleType

from paper_figs import (
    bench_ode,
    convergence,
    degradation,
    depth_limit,
    lesion,
    lesion_number,
    lesion_order,
    presets,
    scaling_at_init,
    scaling_trained,
    smoothness,
    spectrum,
    spectrum_by_step,
    trajectories,
)
from paper_figs.common import OUT, RESULTS, read

FIGURES = (
    lesion,
    lesion_number,
    lesion_order,
    spectrum,
    spectrum_by_step,
    convergence,
    scaling_at_init,
    scaling_trained,
    degradation,
    depth_limit,
    smoothness,
    presets,
    trajectories,
    bench_ode,
)


def main() -> None:
    """Draw them, and print where they are."""
    OUT.mkdir(exist_ok=True)
    for module in FIGURES:
        paths = results_of(module)
        if not paths:
            print(f"no results/{module.SOURCE}-*.json: python -m experiments.{module.SOURCE} cpu --publish results")
        for path in paths:
            target = OUT / f"{file_name(module, path)}.png"
            module.figure(read(path)).savefig(target, facecolor="white")
            print(target)


def results_of(module: ModuleType) -> list[Path]:
    """The committed results that the figure of ``module`` is drawn from."""
    return sorted(RESULTS.glob(f"{module.SOURCE}-*.json"))


def file_name(module: ModuleType, path: Path) -> str:
    """The name of the figure of ``module`` from the results in ``path``."""
    return path.stem.replace(module.SOURCE, module.__name__.rpartition(".")[2], 1)


if __name__ == "__main__":
    main()
