"""Compute the rounds of bipartite matching, with one module for each way to compute them.

`rounds.py` is plain JAX and compares features. `gram.py` is plain JAX and compares sums of one Gram matrix.
`tpu_kernel.py` and `gpu_kernel.py` are Pallas kernels, which share `kernels.py`. A way is a function

    match_rounds(target_BNC, merges_BK, order_BKN, rules) -> slot_BN

that `morphing.bipartite_match` takes as its argument `rounds`. It returns the slot of each token after all
rounds: tokens of one group share a slot. `implementations.py` has the names that a config uses.
docs/method.md lists other ways that were measured and rejected.
"""
