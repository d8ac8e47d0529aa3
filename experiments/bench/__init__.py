"""The parts of ``experiments.bench_ode``: what is to be done, by whom, in which process, and what came of it.

``work`` says what is measured; ``peers`` knows how each library is told to do it; ``station`` does and measures it
inside a worker; ``workers`` are the processes; ``summary`` makes ratios and tables of the rows.
"""
