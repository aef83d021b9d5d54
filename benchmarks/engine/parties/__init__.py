"""One program per engine: it reads one job a line on stdin and answers with one line each."""
