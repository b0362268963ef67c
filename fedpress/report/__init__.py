"""A run folder becomes a table and one offline HTML page; nothing but the folder is read."""
