"""What the experiments need: runs, data, networks, metrics, plots, explorers, adapters.

Nothing is imported here, so `import bilevel_core.lab` is cheap; import the module that you use.
The core (`bilevel_core.schedules`, `samplers`, ...) never imports this package.
"""
