"""ETSI GS QKD 020 V1.1.1: keys between key managers of different owners; HTTP only, jobs live in the node."""
