"""The benchmark harness: what checkpoints cost a training run, measured the same way for every engine.

`snapstone bench ...`, or `python -m snapstone.bench ...` under torchrun. `results` has the documents that measurements
leave and reports read; nothing else of this package is needed to read them.
"""
