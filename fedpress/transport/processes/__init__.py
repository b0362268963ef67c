"""Simulated clients in worker processes of this machine, several at a time.

The workers are forks of the server's process, made when the first client trains. So they have data,
model and the user's own functions without a copy and without pickling. Models and updates travel in
shared memory, everything else through pipes.
"""
