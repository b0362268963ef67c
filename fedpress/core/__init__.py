"""What every room uses: streams of chance, parameters as one vector, examples in memory, files written in one step."""
