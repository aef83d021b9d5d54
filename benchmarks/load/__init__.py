"""Load over HTTP as many clients make it: requests come when they come, whatever becomes of earlier ones."""
