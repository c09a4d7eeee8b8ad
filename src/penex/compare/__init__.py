"""Which loss for this data? Data flows one way, and every stage leaves a file.

config → data → model → fit (loss, seed) → logits.npz → metrics → report
"""
