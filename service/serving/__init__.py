"""The model server: answers predictions from the newest version and stops answering from what was deactivated.

Read first: `fence` (the rules, pure), then `replica` (one model's lease and pointer), `predict` (the final check).
"""
