"""The durable store: the only place of the project that syncs to disk.

``store.Store`` owns one directory: an SQLite database for marks, ranges, rows and
jobs (``tables``), pad files for lanes and reserves (``pads``), and the copy of the
marks on tmpfs that proves a mere process restart (``proof``). Everything goes
through ``files.FileLayer``, so that tests can cut the power under it.
"""
