"""The schema's revisions, in plain SQL, run by `service.store.migrate`."""
