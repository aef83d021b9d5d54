"""Moving one request's cache between two processes: where blocks lie, what moves them, how it is timed."""
