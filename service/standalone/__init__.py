"""`expunge up`: embedded Postgres and Valkey, and a supervisor for them and for every Expunge program.

Read in this order: `state` (the directory), `launch` (how one child is started), `supervisor`, `postgres`,
`valkey`, `programs` (what is run), `up` (the whole).
"""
