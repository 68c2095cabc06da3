"""Celery tasks and loops that move a request from received to completed, and train what was lost."""
