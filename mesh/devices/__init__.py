"""The simulated QKD device pair: a process of its own behind the interface real devices have."""
