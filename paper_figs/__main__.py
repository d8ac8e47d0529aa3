"""Draw every figure whose results are in ``results/``: ``python -m paper_figs``."""

from paper_figs import bench_ode, convergence, lesion, trajectories
from paper_figs.common import OUT, RESULTS, read


def main() -> None:
    """Draw them, and print where they are."""
    OUT.mkdir(exist_ok=True)
    for module in (lesion, convergence, trajectories, bench_ode):
        paths = sorted(RESULTS.glob(f"{module.SOURCE}-*.json"))
        if not paths:
            print(f"no results/{module.SOURCE}-*.json: python -m experiments.{module.SOURCE} cpu --publish results")
        for path in paths:
            target = OUT / f"{path.stem}.png"
            module.figure(read(path)).savefig(target, facecolor="white")
            print(target)


if __name__ == "__main__":
    main()
