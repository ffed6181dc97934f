"""What `benchmarks/gpu.py` is made of: parts that each run in a process of their own, and the document they fill.

`parts` lists them, `building` and `device_tests` come first, `child` is the process of the others and `bench` what they
measure with; `copies`, `tensors`, `unchanged`, `loads` and `training` are the measurements, `goals` judges them.
"""
