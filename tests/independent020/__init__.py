"""ETSI GS QKD 020 V1.1.1 once more: a key manager that shares no code with this project.

``messages``, ``certificates`` and ``peer`` are written from the standard's facts alone, on plain aiohttp, ssl
and json, and must not import ``gateway`` or ``mesh``. The peer is honest by default and can be told to
misbehave; two of them are tried against each other before they meet keymesh over the wire.
"""
