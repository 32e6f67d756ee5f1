"""Crashes on purpose: where a process can be killed, and `eo` that kills itself there."""
