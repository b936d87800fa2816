"""Bilevel optimisation of diffusion models: a small, exact core that imports torch alone.

Read it in this order: `schedules`, `samplers`, `guidance`, `oracles`, `estimators`, `algorithms`, `schedule_learning`.
What the experiments need (data, networks, metrics, plots) lives in `bilevel_core.lab`, which the core never imports.
"""

__version__ = "0.1.0"
