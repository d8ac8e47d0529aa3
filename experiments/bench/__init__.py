"""The parts of the benchmarks.

Of ``experiments.bench_ode``: ``work`` says what is measured; ``peers`` knows how each library is told to do it;
``station`` does and measures it inside a worker; ``workers`` are the processes; ``rounds`` compares, and gives everyone
a turn; ``summary`` makes ratios and tables of the rows.

Of ``experiments.bench_paths``: ``lesions`` and ``spectra`` are the ways to these, and ``turns`` measures ways in turns.
"""
