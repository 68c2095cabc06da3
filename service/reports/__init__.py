"""Papers and files for auditors: rows as JSON Lines, CSV, Parquet and zip, figures and certificates as PDF.

Rows and figures come in, bytes go out: nothing here knows a database.
"""
