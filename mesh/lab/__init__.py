"""Whole networks on one machine: a network file in, running processes and ``lab.json`` out."""
