"""Federated learning over a network: server, clients, and the policies of the data owners."""
