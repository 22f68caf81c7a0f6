"""Kills under checked traffic: parts that ``make torture`` and the fault tests share."""
