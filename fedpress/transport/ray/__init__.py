"""Simulated clients as Ray actors, on one machine or on a cluster; no other module uses Ray.

Each actor is a process that holds some clients, and works on one request at a time. A client's part
of a stage is its *side* (`fedpress.transport.actor.Side`): it answers the server's requests. Data
and model go to an actor once, through Ray's object store; after that the same bytes travel as in
every transport. Ray is imported when the engine is opened, and sends no telemetry.
"""
