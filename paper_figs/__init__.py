"""One module a figure: ``figure(results)`` draws it from a results file in ``results/``, without any model.

``python -m paper_figs`` (or ``make figures``) draws all whose results are there into ``paper_figs/out/``.
"""
