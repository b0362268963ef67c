"""The public functions and classes of `import fedpress`; the command line uses them too."""
