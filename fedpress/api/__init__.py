"""The front door: what `import fedpress` gives, and the same for the command line."""
