"""What scheduling does on more nodes than this host has cores: the nodes only take the time of a model.

`tests/paced` says what is real in such a cluster (all but the engines) and holds its engines to the contract.
"""
