"""Deployment: a server and clients on different machines, under each data owner's policy."""
