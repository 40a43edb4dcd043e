"""`make faults`: the scripts killed at random moments and started again, against undisturbed runs."""
