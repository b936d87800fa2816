"""Bilevel optimisation of diffusion models: a small, exact core that imports torch alone.

Read it in this order: `schedules`, `samplers`, `guidance`, `estimators`, `algorithms`, `tempering`,
`schedule_learning`; `seeds` gives each draw of a run a seed of its own, and `lab.oracles` has problems with every
answer in closed form.
What the experiments need (data, networks, metrics, plots) lives in `bilevel_core.lab`, which the core never imports.
"""

__version__ = "0.2.0"
