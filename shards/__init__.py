"""The unlearning core: which parts of a model each record touched, and how those parts are trained.

Pure: values in, values out. No web, queue, database, clock or environment; only `shards.engine` imports torch.
"""
