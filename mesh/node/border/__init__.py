"""A border: keys to and from other owners' key managers (ETSI GS QKD 020; architecture 2.8, protocol 6).

``ledger`` moves keys through the machines of ``mesh.core.border`` within one transaction; ``requests``
takes what peers ask, ``posts`` what gateways report, ``messages`` what other KMEs of ours seal;
``board`` leases requests to gateways, ``calls`` sends sealed messages, ``border`` builds it all.
"""
