"""Benchmarks: what design.md section 9 promises, measured on this machine.

`python -m benchmarks` runs every group and writes `results.json`. Each module with a `measure` is a group; `data`,
`children` and `system` are what they share, `sisa` is the baseline. Ratios compare what was measured in the same run.
"""
