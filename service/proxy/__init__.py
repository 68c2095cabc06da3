"""The fencing proxy: the lease and the final check of a model server, in front of a server that has neither.

It puts each version's merged adapter into an upstream (vLLM, TGI, Triton, MLServer ...) under the name `model@version`
and asks only for that name. Read first: `adapters` (what the upstream holds), then `relay` (one answer). No torch.
"""
