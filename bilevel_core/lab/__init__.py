"""What the experiments need: what everything uses on this floor, then `models`, `studies`, `explorers`, `report`.

Nothing is imported here, so `import bilevel_core.lab` is cheap; import the module that you use.
The core (`bilevel_core.schedules`, `samplers`, ...) never imports this package.
"""
