"""FlowKV's processes: the command line, a node with both roles, and a whole cluster on one machine."""
