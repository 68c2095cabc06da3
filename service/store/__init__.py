"""The stores: Postgres, one small module per table group, and the artefact store. The only place with SQL.

Lock order everywhere: model (by id), replay, subject (by id), cell (by id), request and request_target (by id), stage
and stage_job (by key), artifact, lease, ledger_head last. No network, bucket or Redis call inside a transaction.
"""
