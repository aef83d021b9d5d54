"""Policies that the scheduler is compared with."""
