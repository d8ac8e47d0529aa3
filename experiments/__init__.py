"""One module a question: ``python -m experiments.NAME CONFIG`` runs it, ``--help`` says what can be set.

Each has a frozen ``Config`` of everything that changes the outcome, some named ``CONFIGS`` (smoke: seconds, in the
tests; cpu: minutes on 2 cores; paper: a GPU), and ``run(config, out)``, which computes into a run folder. With
``--publish`` the results are copied, with where and how they were computed, to ``results/NAME-CONFIG.json``.
"""
