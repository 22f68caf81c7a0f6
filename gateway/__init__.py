"""The edge: ETSI GS QKD 014 over REST on one side, the mesh's key delivery on the other."""
