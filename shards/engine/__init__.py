"""The engines: train stages, serve assemblies, replay. The only place that imports torch, peft and
transformers.
"""
