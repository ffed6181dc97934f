"""torch.distributed.checkpoint (DCP) with its own storage and with snapstone's, on one state, in one interleaved run.

rows: what is measured. crew: rank processes. rank: what one of them does. interleave: everybody in turn. comparisons:
ratios and their targets. The program that runs them is measure_under_dcp.py.
"""
